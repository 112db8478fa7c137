"""Run exported programs and compare them with samples of the student that they stand for.

This file is a script for a fresh process: it must never import the package it belongs to. ONNX programs are run with
numpy and onnxruntime alone, ``.pt2`` programs with torch. Arguments: a folder with ``program.json``, then files of
cases (safetensors: the inputs by name, ``output_N`` for N steps). It prints one line of JSON: the largest error of
every program at every number of rows, as a share of the largest value (at least 1).
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def runner(file: str) -> Any:
    """The program in a file, as a function of its inputs by name, numpy in and out."""
    if file.endswith(".onnx"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS") or 0)
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda given: session.run(None, given)[0]
    import torch

    program = torch.export.load(file).module()

    def run(given: dict[str, Any]) -> Any:
        tensors = {name: torch.from_numpy(value) for name, value in given.items()}
        with torch.no_grad():
            return program(tensors.pop("noise"), **tensors).numpy()

    return run


def compare(folder: str, files: list[str]) -> dict[str, dict[str, float]]:
    """The errors by program and number of rows."""
    import numpy as np
    from safetensors.numpy import load_file

    facts = json.loads(Path(folder, "program.json").read_text(encoding="utf-8"))
    cases = [load_file(file) for file in files]
    errors: dict[str, dict[str, float]] = {}
    for program in facts["programs"]:
        run = runner(os.path.join(folder, program["file"]))
        found = errors.setdefault(program["file"], {})
        for case in cases:
            got = np.asarray(run({one["name"]: case[one["name"]] for one in program["inputs"]}))
            wanted = case[f"output_{program['steps']}"]
            if got.shape != wanted.shape:
                raise SystemExit(f"{program['file']} gave {list(got.shape)}, the student gives {list(wanted.shape)}")
            error = np.abs(got.astype(np.float64) - wanted).max() / max(1.0, float(np.abs(wanted).max()))
            rows = str(len(wanted))
            found[rows] = max(found.get(rows, 0.0), float(error)) if np.isfinite(error) else float("inf")
    return errors


if __name__ == "__main__":
    answer = compare(str(Path(sys.argv[1]).resolve()), sys.argv[2:])
    assert "fewstep" not in sys.modules
    print(json.dumps({"errors": answer}))
