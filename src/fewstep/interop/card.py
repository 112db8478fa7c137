"""The model card: what the model is, how to use it in five lines, what it was measured at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .contract import Contract


def card(
    contract: Contract,
    *,
    table: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    pictures: bool = False,
    use: Sequence[str] | None = None,
) -> str:
    """README.md of a model folder, with front matter; ``use`` are the lines that show how, where they are special."""
    few = contract.role == "student"
    counts = ", ".join(str(s.count) for s in contract.steps)
    name = contract.name or ("few-step student" if few else "teacher")
    origin = contract.teacher
    lines = ["---"]
    if contract.licence != "unknown":
        lines.append(f"license: {json.dumps(contract.licence)}")
    if contract.pipeline:
        lines.append("library_name: diffusers")
    if origin and "/" in origin.name:
        lines.append(f"base_model: {json.dumps(origin.name)}")
    lines += ["tags:", "- fewstep", *(["- distillation"] if few else []), "---", "", f"# {name}", ""]
    if few:
        said = f"A generator that answers in {counts} step(s), trained by `{contract.method}`"
        lines.append(said + (f" from the teacher `{origin.name}`." if origin else "."))
    else:
        lines.append(f"A multi-step generator, trained by `{contract.method}`.")
    if pictures:
        lines += ["", "![samples](samples.png)"]
    lines += ["", "## Use", "", *(_use(contract) if use is None else use)]
    rows = [["steps", "times", "sigma", "between steps", "plain diffusers"]]
    for one in contract.steps:
        arguments = ", ".join(f"{key}={value}" for key, value in (one.call or {}).items())
        call = "not possible" if one.call is None else f"`pipe({arguments})`"
        if contract.pipeline is None:
            call = "`model.pt2`" if contract.program == "model.pt2" and one.count == 1 else "not possible"
        rows.append([str(one.count), _numbers(one.times), _numbers(one.sigmas), one.policy, call])
    if few:
        lines += ["", "## Steps", "", *_table(rows)]
        lines += ["", "Other step counts were not trained and give poor samples."]
        if contract.guidance.baked != 1:
            lines.append(f"Guidance {contract.guidance.baked:g} of the teacher is in the weights: do not guide again.")
    if table:
        heads = [h for h in table[0] if any(r.get(h) not in (None, {}) for r in table)]
        lines += ["", "## Measured", "", *_table([heads, *[[_cell(r.get(h)) for h in heads] for r in table]])]
    if notes:
        lines += ["", "## Notes", "", *[f"- {note}" for note in notes]]
    lines += [
        "",
        "## Generated media",
        "",
        "What this model makes is synthetic. Say so where it is shown; pictures written by `fewstep` carry the model,",
        "the seed, the steps and a marker of generated media in their metadata.",
        "",
        "## Licence",
        "",
    ]
    if contract.licence != "unknown":
        lines.append(
            contract.licence + (f", inherited from the teacher (`{origin.licence}`)." if origin and few else ".")
        )
    else:
        why = "the teacher's folder names none" if few else "none was given"
        lines.append(f"Unknown: {why}. Ask its author before you use or share this model.")
    lines += ["", "All facts are in `fewstep.json`; `fewstep check` runs the golden sample again."]
    if use is not None:
        lines[-1] = "All facts are in `fewstep.json`; inputs, with their shapes, in `program.json`."
    return "\n".join(lines) + "\n"


def _use(contract: Contract) -> list[str]:
    if contract.joint is not None:
        return _both_ways(contract)
    if contract.pipeline is None:
        if contract.program != "model.pt2":
            load = ["from fewstep.interop import load_student", "", 'student = load_student(".").student']
            return ["```python", *load, "```"]
        condition = "" if contract.classes is None else "torch.zeros(4, dtype=torch.long)"
        if contract.parts:
            named = {k: f"torch.zeros(4, {', '.join(map(str, v))})" for k, v in contract.parts.items()}
            named |= {"label": condition} if condition else {}
            condition = "{" + ", ".join(f'"{name}": {value}' for name, value in sorted(named.items())) + "}"
        condition = condition and f", {condition}"
        shape = ", ".join(map(str, contract.shape))
        return [
            "```python",
            "import torch",
            "",
            'generate = torch.export.load("model.pt2").module()',
            f"samples = generate(torch.randn(4, {shape}){condition})",
            "```",
        ]
    if contract.role == "teacher" and contract.pipeline == "ConsistencyModelPipeline":
        # the stock scheduler renoises between steps, which suits consistency models and not a plain denoiser
        return ["```", "fewstep sample . --steps 8", "```"]
    calls = [s.call for s in contract.steps if s.call is not None]
    call = dict(calls[0]) if calls else {"num_inference_steps": 50 if contract.role == "teacher" else 1}
    if contract.pipeline != "DiTPipeline" and not contract.prompts:
        call = {"batch_size": 4, **call}
    if contract.classes is not None:
        call["class_labels"] = [i % contract.classes for i in range(4)]  # type: ignore[assignment]
    arguments = ", ".join(f"{key}={value!r}" for key, value in call.items())
    if contract.prompts:
        arguments = f'prompt="a photo", {arguments}'
    return [
        "```python",
        f"import torch\nfrom diffusers import {contract.pipeline}",
        "",
        f'pipe = {contract.pipeline}.from_pretrained(".")',
        f"images = pipe({arguments}, generator=torch.manual_seed(0)){'[0]' if contract.prompts else '.images'}",
        "```",
    ]


def _both_ways(contract: Contract) -> list[str]:
    """How a network that holds its labels makes pictures, and reads them."""
    joint = contract.joint
    assert joint is not None
    places = ", places=True" if joint.places else ""
    return [
        "```python",
        "import torch",
        "",
        "from fewstep.interop import load_teacher",
        "from fewstep.joint import nearest",
        "from fewstep.methods.symmflow import generate, read",
        "from fewstep.student import Student",
        "",
        'teacher = load_teacher(".")',
        "both, joint = Student(teacher.denoiser, teacher.shape), teacher.contract.joint",
        f"noise = torch.randn(4, {', '.join(map(str, (joint.picture, *contract.shape[1:])))})",
        f"labels = torch.zeros(4, {', '.join(map(str, contract.shape[1:]))}, dtype=torch.long)"
        if joint.places
        else "labels = torch.arange(4) % joint.classes",
        "rng = torch.Generator().manual_seed(0)",
        "pictures = generate(both, noise, labels, joint.book, 8, rng, joint.width)",
        "chart = read(both, pictures, joint.channels, rng, draws=4)",
        f"labels = nearest(chart, joint.book{places})",
        "```",
    ]


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{v:.6g}" for v in values)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *rest = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *rest]
