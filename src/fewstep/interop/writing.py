"""The files of a model folder: a stock pipeline, or a network of ours with an exported program."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import warnings
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor, nn

from ..cond import Cond, rows
from ..part import Part
from ..student import Student
from .contract import Contract, Steps
from .files import read_tensors, weight_files
from .plain import Plain
from .teacher import PART_WEIGHTS, Teacher, offline

PROGRAM = "model.pt2"
# what UNet2DModel assumes where it is told nothing: written out, so that a later release assumes the same
UNET_DEFAULTS: dict[str, Any] = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "class_embed_type": None,
}
# pipelines that a vLLM-Omni server runs as few-step students, told by a block in model_index.json
SERVED = (
    "FluxPipeline",
    "LTX2ImageToVideoPipeline",
    "LTX2Pipeline",
    "QwenImagePipeline",
    "WanImageToVideoPipeline",
    "WanPipeline",
)


def ours(net: nn.Module) -> bool:
    """Whether a network is one of ``fewstep.nets``."""
    config = getattr(net, "config", None)
    return isinstance(config, Part) and hasattr(config, "kind")


def stock_pipeline(net: nn.Module, plain: Plain, teacher: Teacher) -> Any:
    """The teacher's pipeline with the student's network and scheduler; every other part is the teacher's own."""
    offline()
    import diffusers

    assert teacher.recording is not None
    kind, scheduler = getattr(diffusers, plain.pipeline), getattr(diffusers, plain.scheduler)
    wanted = inspect.signature(scheduler.__init__).parameters
    accepted = inspect.signature(kind.__init__).parameters
    options = {
        k: v for k, v in dict(teacher.pipeline.config).items() if k in accepted and not isinstance(v, (list, tuple))
    }
    parts = {**options, **teacher.pipeline.components}
    parts[teacher.recording.part] = net
    parts["scheduler"] = scheduler(**{k: v for k, v in plain.config.items() if k in wanted})
    pipe = kind(**{k: v for k, v in parts.items() if k in accepted})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_stock(folder: File, pipe: Any, teacher: Teacher) -> None:
    """A stock pipeline, saved by diffusers itself."""
    pipe.save_pretrained(str(folder), safe_serialization=True)
    names = getattr(teacher.pipeline, "labels", None)
    if names and "id2label" in inspect.signature(type(pipe).__init__).parameters:
        # the stock class forgets the names of its labels when it is saved
        by_id: dict[str, list[str]] = {}
        for word, number in names.items():
            by_id.setdefault(str(number), []).append(word)
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index["id2label"] = {number: ", ".join(words) for number, words in by_id.items()}
        write_json(folder / "model_index.json", index)


def write_served(folder: File, pipeline: str, steps: tuple[Steps, ...]) -> None:
    """The block that tells a vLLM-Omni server how to run the student, for the pipelines that it serves.

    It holds one step count: the largest that stock diffusers takes too. diffusers itself warns of keys that it does
    not know, unless they are listed as left at their defaults.
    """
    takes = [one for one in steps if one.call is not None]
    if pipeline not in SERVED or not takes:
        return
    most = max(takes, key=lambda one: one.count)
    call = most.call or {}
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["dmd2_config"] = {
        "num_inference_steps": most.count,
        "denoising_timesteps": [round(1000 * t) for t in most.times],
        "solver": "sde" if most.policy == "renoise" else "ode",
        "guidance_scale": call.get("guidance_scale", 1.0),
    }
    index["_use_default_values"] = ["dmd2_config"]
    write_json(folder / "model_index.json", index)


def write_unet(folder: File, net: nn.Module, plain: Plain) -> None:
    """A U-Net of ours as a stock pipeline, file by file: diffusers itself is loaded by the fresh process alone."""
    from safetensors.torch import save_file

    config: Any = net.config
    stamp = {"_diffusers_version": importlib.metadata.version("diffusers")}
    for name in ("unet", "scheduler"):
        (folder / name).mkdir()
    index = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", plain.scheduler]}
    write_json(folder / "model_index.json", {"_class_name": plain.pipeline, **stamp, **index})
    unet = {**UNET_DEFAULTS, **config.to_diffusers()}
    write_json(folder / "unet" / "config.json", {"_class_name": "UNet2DModel", **stamp, **unet})
    write_json(
        folder / "scheduler" / "scheduler_config.json", {"_class_name": plain.scheduler, **stamp, **plain.config}
    )
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, str(folder / "unet" / PART_WEIGHTS))


def write_json(file: File, value: Any) -> None:
    """JSON as every other tool writes it."""
    file.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_own(folder: File, net: nn.Module) -> None:
    """A network of ours: its description and its weights."""
    from safetensors.torch import save_file

    config: Any = net.config
    (folder / "config.json").write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, str(folder / "model.safetensors"))


def stamp(folder: File, contract: Contract) -> None:
    """Mirror what other tools look for in the header of the network's weights, where they are one file."""
    from safetensors.torch import save_file

    files = weight_files(folder) or weight_files(folder / "unet") or weight_files(folder / "transformer")
    if len(files) != 1:
        return
    tensors, metadata = read_tensors(files[0])
    known = {
        "format": "pt",
        "fewstep.steps": ",".join(str(s.count) for s in contract.steps),
        "fewstep.guidance": f"{contract.guidance.baked:g}",
        "fewstep.sampler": contract.pipeline or "own",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": contract.name or contract.method,
        "modelspec.license": contract.licence,
    }
    save_file(tensors, str(files[0]), metadata={**metadata, **known})


class _OneStep(nn.Module):
    """Noise in, sample out: what the exported program is. The condition is labels, or a dictionary of its parts."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, noise: Tensor, cond: Cond = None) -> Tensor:
        return self.student.generate(noise, cond)


def write_program(folder: File, student: Student, cond: Cond) -> str:
    """Write the one-step program with a free batch; the name of the file, or why there is none."""
    from torch.export import Dim, export, save

    batch = Dim("batch")
    noise = torch.zeros((3, *student.shape))
    arguments = (noise,) if cond is None else (noise, rows(cond, slice(3)))
    free: Any = {name: {0: batch} for name in cond} if isinstance(cond, dict) else {0: batch}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = export(_OneStep(student), arguments, dynamic_shapes=({0: batch}, free)[: len(arguments)])
            save(program, str(folder / PROGRAM))
    except Exception as error:  # what cannot be traced is still a student
        (folder / PROGRAM).unlink(missing_ok=True)
        return f"not exported: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    return PROGRAM
