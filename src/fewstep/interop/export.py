"""Exports: a student for machines without this package, compared with the student before it is written."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..cond import Cond, count, rows
from ..errors import Failed, Refused, need
from ..student import Student
from .card import card
from .contract import Contract
from .files import components, written_whole
from .image import MARKER
from .plain import wrapped
from .program import Decoder, Draws, Input, Program, traced
from .student import GOLDEN, LoadedStudent, check_student, load_student, read_golden
from .teacher import load_pipeline

Kind = Literal["onnx", "pt2"]
KINDS: tuple[str, ...] = get_args(Kind)
PROGRAMS = "program.json"
TOLERANCE = 1e-5  # of the largest value, or of 1: the same arithmetic, in another order
BATCHES = (1, 3, 64)
SEED = 1_000_003  # of the noise that is not the golden one
SCRIPT = File(__file__).with_name("golden_program.py")
# what a pipeline carries to keep its pictures safe and marked
GUARDS = ("safety_checker", "feature_extractor", "watermarker", "watermark")
PAPERS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """What was written where, and the largest error of each file by number of rows."""

    out: File
    files: tuple[str, ...]
    errors: dict[str, dict[int, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def max_error(self) -> float:
        return max((error for found in self.errors.values() for error in found.values()), default=0.0)


def _quiet(line: str) -> None:
    pass


def _same(x: Tensor) -> Tensor:
    return x


# -- programs ---------------------------------------------------------------------------------------


def export_programs(
    folder: File | str,
    out: File | str,
    kind: Kind,
    *,
    steps: int | None = None,
    batches: Sequence[int] = BATCHES,
    decode: bool = False,
    overwrite: bool = False,
    timeout: float = 3600,
    say: Say = _quiet,
) -> Exported:
    """Write a student's sampler as programs, one for each step count (or for ``steps`` alone).

    Every program takes any number of rows. Before the folder gets its name, each is run in a fresh process that
    never imports this package, on the golden noise and on other noise of ``batches`` rows, and must give the
    student's own samples to 1e-5. ``decode`` puts the autoencoder's decoder behind the sample. Refused where a
    student has no such form, Failed where a program differs; then nothing is left at the destination.
    """
    if kind not in KINDS:
        raise Refused(f"a program is one of {', '.join(KINDS)}, got {kind!r}")
    if not batches or min(batches) < 1:
        raise Refused(f"batches to compare are whole numbers from 1, got {list(batches)}")
    if kind == "onnx":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            need(module, "onnx")
    source = File(folder).expanduser()
    contract = _student_contract(source)
    counts = [one.count for one in contract.steps] if steps is None else [contract.step(steps).count]
    with written_whole(File(out), overwrite) as partial, tempfile.TemporaryDirectory() as scratch:
        say(f"loading {source}")
        loaded = load_student(source)
        student = loaded.student.to("cpu", torch.float32)
        decoder = _decoder(source, decode)
        golden, facts = read_golden(source)
        cond = example_cond(loaded, golden)
        programs: list[dict[str, Any]] = []
        inputs: dict[int, tuple[Input, ...]] = {}
        for each in counts:
            program = Program(student, each, cond, decoder).eval().requires_grad_(False)
            inputs[each] = program.inputs
            name = f"model_{each}step.{kind}"
            say(f"tracing {name}")
            graph = traced(program, cond)
            if kind == "onnx":
                _write_onnx(graph, partial / name, program, _headers(contract, each))
            else:
                extra = {"fewstep.json": contract.model_dump_json()}
                torch.export.save(graph, str(partial / name), extra_files=extra)
            programs.append(_described(name, program))
            del graph
        text = {"format": 1, "kind": kind, "decoded": decode, "programs": programs}
        (partial / PROGRAMS).write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
        seed = int(facts["seed"])
        finish = loaded.decode if decode else _same
        _write_case(partial / GOLDEN, student, inputs, cond, finish, golden["noise"], seed)
        cases = [partial / GOLDEN]
        for size in batches:
            cases.append(File(scratch) / f"cases_{size}.safetensors")
            noise = torch.randn((size, *student.shape), generator=torch.Generator().manual_seed(SEED + size))
            _write_case(cases[-1], student, inputs, cond, finish, noise, SEED + size)
        say(f"comparing {len(programs)} program(s) at {', '.join(map(str, batches))} rows")
        errors = _fresh_process(partial, cases, timeout)
        _agree(errors)
        notes = _write_papers(source, partial, contract, counts, programs, decode)
    files = tuple(str(p["file"]) for p in programs)
    return Exported(File(out), files, errors, notes)


def _agree(errors: dict[str, dict[int, float]]) -> None:
    for name, found in errors.items():
        for size, error in found.items():
            if not error <= TOLERANCE:
                raise Failed(
                    f"{name} differs from the student by {error:.2e} at {size} row(s), allowed {TOLERANCE:g}: "
                    "nothing was written"
                )


def _student_contract(folder: File) -> Contract:
    if not folder.is_dir():
        raise Refused(f"no student folder {str(folder)!r}")
    contract = Contract.load(folder)
    if contract.role != "student":
        raise Refused(f"{folder} is a teacher, which answers in many steps: distil it first, then export the student")
    return contract


def example_cond(loaded: LoadedStudent, golden: dict[str, Tensor]) -> Cond:
    """A few rows of the student's condition: the golden ones, else the recorded "no condition"."""
    if "labels" in golden:
        return golden["labels"]
    named = {name.removeprefix("cond."): value for name, value in golden.items() if name.startswith("cond.")}
    if named:
        return named.get("", dict(named))
    net: Any = wrapped(loaded.student).net
    if not getattr(net, "conditions", ()):
        return None
    nothing: Cond = getattr(net, "negative", None)
    if nothing is None:
        raise Refused(f"{loaded.folder / GOLDEN} holds no condition to try a program with: save the student again")
    return nothing


def _decoder(folder: File, wanted: bool) -> Decoder | None:
    if not wanted:
        return None
    if not (folder / "vae").is_dir():
        raise Refused(f"{folder} has no autoencoder, its samples are finished: leave out --decode")
    pipe, _, _ = load_pipeline(folder)
    vae: Any = pipe.vae
    if not hasattr(vae, "decode"):
        raise Refused(f"{folder}: a {type(vae).__name__} decodes in a way that is not read: leave out --decode")
    return Decoder(vae.to(torch.float32)).eval().requires_grad_(False)


def _described(name: str, program: Program) -> dict[str, Any]:
    inputs = [
        {"name": one.name, "dtype": str(one.dtype).removeprefix("torch."), "shape": ["batch", *one.shape]}
        for one in program.inputs
    ]
    return {"file": name, "steps": program.steps, "inputs": inputs, "output": "sample"}


@torch.no_grad()
def _write_case(
    file: File,
    student: Student,
    inputs: Mapping[int, tuple[Input, ...]],
    cond: Cond,
    finish: Callable[[Tensor], Tensor],
    noise: Tensor,
    seed: int,
) -> None:
    """Inputs of one batch and, for every step count, what the student itself makes of them, by its own loop."""
    from safetensors.torch import save_file

    rng = torch.Generator().manual_seed(seed)
    draws = [torch.randn(noise.shape, generator=rng) for _ in range(max(inputs))][1:]
    some = _repeated(cond, len(noise))
    case = {"noise": noise}
    for steps, named in inputs.items():
        sample = student.generate(noise, some, Draws(draws), steps)
        case[f"output_{steps}"] = finish(sample).contiguous()
        for one in named[1:]:
            if one.key is None:
                case[one.name] = draws[int(one.name.removeprefix("noise_")) - 2]
            else:
                value = some[one.key] if isinstance(some, dict) else some
                assert value is not None
                case[one.name] = value.contiguous()
    save_file(case, str(file))


def _repeated(cond: Cond, size: int) -> Cond:
    """The rows of a condition, over and over, up to ``size`` of them."""
    return rows(cond, torch.arange(size) % (count(cond) or 1))


def _write_onnx(graph: torch.export.ExportedProgram, file: File, program: Program, headers: dict[str, str]) -> None:
    names = [one.name for one in program.inputs]
    chatty = logging.getLogger("torch.onnx")
    level = chatty.level
    chatty.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            made: Any = torch.onnx.export(graph, dynamo=True, input_names=names, output_names=["sample"], verbose=False)
            _name_batch(made.model)
            made.model.metadata_props.update(headers)
            made.save(str(file))
    except Exception as error:  # whatever an operator without a translation provokes
        line = next((text.strip() for text in str(error).splitlines() if text.strip()), "")[:200]
        raise Refused(
            f"{file.name}: the network has no ONNX form here ({type(error).__name__}: {line}): take --to pt2"
        ) from None
    finally:
        chatty.setLevel(level)


def _name_batch(model: Any) -> None:
    """Call the free dimension ``batch``: the trace numbers it."""
    import onnx_ir

    symbol = model.graph.inputs[0].shape[0]
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if size == symbol:
                value.shape[axis] = onnx_ir.SymbolicDim("batch")


def _headers(contract: Contract, steps: int) -> dict[str, str]:
    """What a sampler must know, in the file's own metadata."""
    return {
        "fewstep.steps": str(steps),
        "fewstep.method": contract.method,
        "fewstep.teacher": contract.teacher.name if contract.teacher else "",
        "fewstep.guidance": f"{contract.guidance.baked:g}",
        "fewstep.value_range": json.dumps(contract.value_range),
        "fewstep.classes": json.dumps(contract.classes),
        "fewstep.media": MARKER,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": contract.name or contract.method,
        "modelspec.license": contract.licence,
    }


def _fresh_process(folder: File, cases: Sequence[File], timeout: float) -> dict[str, dict[int, float]]:
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(SCRIPT), str(folder), *map(str, cases)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"comparing took more than {timeout:g} s: compare fewer rows, say --batch 1,2") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no message"]
        raise Failed(f"the program does not run in a fresh process: {lines[-1].strip()[:300]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])["errors"]
    return {name: {int(size): float(e) for size, e in errors.items()} for name, errors in found.items()}


# -- what stands beside a program -------------------------------------------------------------------


def _write_papers(
    source: File,
    partial: File,
    contract: Contract,
    counts: Sequence[int],
    programs: Sequence[dict[str, Any]],
    decode: bool,
) -> tuple[str, ...]:
    """The contract, the model card, the licence and the guards of the teacher."""
    kept = tuple(one.model_copy(update={"call": None}) for one in contract.steps if one.count in counts)
    changed = {"steps": kept, "pipeline": None, "network": None, "program": str(programs[0]["file"])}
    carried = contract.model_copy(update=changed)
    carried.save(partial)
    notes = []
    low, high = contract.value_range or (None, None)
    latents = (source / "vae").is_dir() and not decode
    if latents:
        notes.append("the samples are latents: decode them with the teacher's autoencoder, or export with --decode")
    elif low is not None:
        notes.append(f"samples lie in about [{low:g}, {high:g}]: clamp them, then scale to pixels")
    if any(one["name"].startswith("noise_") for p in programs for one in p["inputs"]):
        notes.append("noise_2, noise_3, ... are standard normal too: draw them anew for every batch")
    if contract.null_label is not None:
        notes.append(f"label {contract.null_label} stands for no label")
    guards = _carry(source, partial)
    if guards:
        notes.append(f"the teacher's {' and '.join(guards)}: pictures pass through before they are shown")
    text = card(carried, notes=notes, use=_use(programs[0]))
    (partial / "README.md").write_text(text, encoding="utf-8")
    return tuple(notes)


def _carry(source: File, partial: File) -> list[str]:
    """Copy the licence, and what keeps pictures safe and marked; the names of the latter."""
    found = [name for name in GUARDS if (source / name).is_dir()]
    for name in found:
        shutil.copytree(source / name, partial / name, dirs_exist_ok=True)
    for pattern in PAPERS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, partial / file.name)
    return found


def _use(program: dict[str, Any]) -> list[str]:
    """The lines that run a program."""
    name, inputs = program["file"], program["inputs"]
    onnx = name.endswith(".onnx")

    def made(one: dict[str, Any]) -> str:
        size = ", ".join(map(str, (4, *one["shape"][1:])))
        if one["name"].startswith("noise"):
            return f'draw(({size})).astype("float32")' if onnx else f"torch.randn({size})"
        library = "np" if onnx else "torch"
        return f"{library}.zeros(({size},), dtype={library}.{one['dtype']})"

    if onnx:
        given = ", ".join(f'"{one["name"]}": {made(one)}' for one in inputs)
        lines = [
            "import numpy as np",
            "import onnxruntime",
            "",
            "draw = np.random.default_rng(0).standard_normal",
            f'session = onnxruntime.InferenceSession("{name}")',
            f"(samples,) = session.run(None, {{{given}}})",
        ]
    else:
        given = ", ".join(made(one) if k == 0 else f"{one['name']}={made(one)}" for k, one in enumerate(inputs))
        lines = [
            "import torch",
            "",
            f'generate = torch.export.load("{name}").module()',
            f"samples = generate({given})",
        ]
    return ["```python", *lines, "```", "", "All inputs have one row a sample, and any number of rows."]


# -- pipelines and adapters -------------------------------------------------------------------------


def export_pipeline(
    folder: File | str,
    out: File | str,
    *,
    batches: Sequence[int] = BATCHES,
    overwrite: bool = False,
    say: Say = _quiet,
) -> Exported:
    """Write a student as a plain diffusers folder, and prove it: by its golden sample in a fresh process that never
    imports this package, and by the same samples as the student's, bit for bit, from other noise.

    Only what the pipeline names is copied, with contract, card, golden sample and licence. Refused for a student
    that no stock pipeline runs.
    """
    source = File(folder).expanduser()
    contract = _student_contract(source)
    if contract.pipeline is None:
        raise Refused(f"{source}: no stock pipeline of diffusers runs this student: take --to pt2 or --to onnx")
    _, parts = components(source)
    beside = ("model_index.json", "fewstep.json", GOLDEN, "README.md", "samples.png")
    with written_whole(File(out), overwrite) as partial:
        for name, (library, _) in parts.items():
            if library is not None or (source / name).is_dir():
                shutil.copytree(source / name, partial / name)
        for place in source.glob("scheduler_*step"):
            if place.is_dir():
                shutil.copytree(place, partial / place.name)
        for name in beside:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        _carry(source, partial)
        say("drawing the golden sample with plain diffusers")
        check = check_student(partial)
        if not check.ok:
            raise Failed(f"the pipeline does not give the student's samples: {'; '.join(check.messages)}")
        errors = _same_samples(source, partial, contract, batches)
        _agree({contract.pipeline: errors})
    return Exported(File(out), tuple(sorted(parts)), {contract.pipeline: errors}, tuple(check.messages))


@torch.no_grad()
def _same_samples(source: File, partial: File, contract: Contract, batches: Sequence[int]) -> dict[int, float]:
    one, other = load_student(source), load_student(partial)
    cond = example_cond(one, read_golden(source)[0])
    errors: dict[int, float] = {}
    for size in batches:
        noise = torch.randn((size, *contract.shape), generator=torch.Generator().manual_seed(SEED + size))
        some = _repeated(cond, size)
        for step in contract.steps:
            wanted = one.student.generate(noise, some, torch.Generator().manual_seed(size), step.count)
            got = other.student.generate(noise, some, torch.Generator().manual_seed(size), step.count)
            error = float((got - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
            errors[size] = max(errors.get(size, 0.0), error)
    return errors


def export_lora(
    folder: File | str, out: File | str, names: Literal["diffusers", "kohya"], *, overwrite: bool = False
) -> Exported:
    """Write a student's adapters alone, under the names of diffusers or of kohya, with contract and licence."""
    source = File(folder).expanduser()
    contract = _student_contract(source)
    try:
        from .lora import save_lora
    except ImportError:
        raise Refused("this version writes no LoRA files: take --to diffusers") from None
    with written_whole(File(out), overwrite) as partial:
        save_lora(source, partial, names)
        files = tuple(sorted(file.name for file in partial.glob("*.safetensors")))
        contract.save(partial)
        if (source / "README.md").is_file():
            shutil.copyfile(source / "README.md", partial / "README.md")
        _carry(source, partial)
    return Exported(File(out), files)
