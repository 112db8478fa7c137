"""LoRA files in and out: diffusers' names, and kohya's, which ComfyUI and the web interfaces read.

What is written has ``alpha`` folded into its up matrices and set to the rank, so that every tool reads one strength.
What is read is a stranger's: only safetensors, every name must fit a layer, every shape its weight.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapters import adapters, own
from ..errors import Failed, Refused
from .contract import Contract
from .files import PICKLES, read_tensors, sha256

FOLDER = "lora"
Names = Literal["diffusers", "kohya"]
FILES: dict[Names, str] = {
    "diffusers": "pytorch_lora_weights.safetensors",
    "kohya": "pytorch_lora_weights_kohya.safetensors",
}
ENDS = {  # how the names of (down, up) end, tool by tool
    ".lora_A.weight": ".lora_B.weight",
    ".lora_A.default.weight": ".lora_B.default.weight",
    ".lora_down.weight": ".lora_up.weight",
    ".lora.down.weight": ".lora.up.weight",
    ".lora_linear_layer.down.weight": ".lora_linear_layer.up.weight",
    "_lora.down.weight": "_lora.up.weight",
}
ENCODERS = {"text_encoder": ("te", "te1"), "text_encoder_2": ("te2",), "text_encoder_3": ("te3",)}


@dataclass(frozen=True)
class Pair:
    """What is added to one weight: ``up down``, down [rank, in, *kernel] and up [out, rank, 1...]."""

    down: Tensor
    up: Tensor

    def product(self) -> Tensor:
        """[out, in * kernel], in float32 or better."""
        wide = torch.promote_types(self.down.dtype, torch.float32)
        return self.up.flatten(1).to(wide) @ self.down.flatten(1).to(wide)

    def then(self, other: Pair) -> Pair:
        """Both, as one pair of the summed rank."""
        return Pair(torch.cat([self.down, other.down]), torch.cat([self.up, other.up], 1))


Lora = dict[str, Pair]  # by part and dotted name: "unet.mid_block.attentions.0.to_q"


# -- out --------------------------------------------------------------------------------------------


@torch.no_grad()
def lora_of(net: nn.Module, part: str, base: Mapping[str, Pair] | None = None) -> Lora | None:
    """A network's adapters on top of a LoRA that its weights were given before.

    None where it has none, or where it has learned something that is no LoRA.
    """
    found = list(adapters(net))
    if not found or any(not name.endswith(("lora_down", "lora_up")) for name in own(net)):
        return None
    lora = dict(base or {})
    for path, layer in found:
        kernel = layer.weight.ndim - 2
        up = (layer.options.scale * layer.lora_up).view(*layer.lora_up.shape, *(1 for _ in range(kernel)))
        pair = Pair(layer.lora_down.detach().cpu().clone(), up.detach().cpu().clone())
        name = f"{part}.{path}"
        lora[name] = lora[name].then(pair) if name in lora else pair
    return lora


def named(lora: Mapping[str, Pair], names: Names) -> dict[str, Tensor]:
    """The tensors of a LoRA as a tool calls them; kohya's say ``alpha``, equal to the rank."""
    tensors: dict[str, Tensor] = {}
    two = any(name.startswith("text_encoder_2.") for name in lora)
    for name, pair in lora.items():
        if names == "diffusers":
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = pair.down, pair.up
            continue
        part, _, path = name.partition(".")
        short = ENCODERS.get(part, (part,))[-1 if two else 0]
        flat = f"lora_{short}_{path.replace('.', '_')}"
        tensors[f"{flat}.lora_down.weight"], tensors[f"{flat}.lora_up.weight"] = pair.down, pair.up
        tensors[f"{flat}.alpha"] = torch.tensor(float(pair.down.shape[0]))
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def write_lora(lora: Mapping[str, Pair], file: File, names: Names, contract: Contract) -> None:
    """Write a LoRA file under a temporary name, read it back, and only then give it its own.

    The header says what a sampler must know and weights do not: steps, their times, guidance.
    """
    from safetensors.torch import save_file

    rank = max(pair.down.shape[0] for pair in lora.values())
    facts = {
        "format": "pt",
        "fewstep.steps": ",".join(str(s.count) for s in contract.steps),
        "fewstep.times": json.dumps({str(s.count): s.times for s in contract.steps}),
        "fewstep.guidance": f"{contract.guidance.baked:g}",
        "fewstep.sampler": contract.pipeline or "own",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": contract.name or contract.method,
        "modelspec.license": contract.licence,
    }
    if names == "kohya":
        facts |= {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        save_file(named(lora, names), str(partial), metadata=facts)
        again = _pairs(*read_tensors(partial), str(file))
        for (name, pair), other in zip(lora.items(), (again[n] for n in _bases(lora, names)), strict=True):
            wanted = pair.product()
            error = float((other.product() - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
            if not error <= 1e-6:
                raise Failed(f"{file}: {name} reads back with an error of {error:.1e}; nothing was written")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _bases(lora: Mapping[str, Pair], names: Names) -> list[str]:
    """The layers' names in a file, in the order of the LoRA."""
    down = ".lora_A.weight" if names == "diffusers" else ".lora_down.weight"
    return [n.removesuffix(down) for n in named(lora, names) if n.endswith(down)]


def save_lora(student_folder: File | str, out: File | str, names: Names = "diffusers", overwrite: bool = False) -> File:
    """A student's LoRA as one file: at ``out`` where that ends in .safetensors, else inside that folder.

    Refused for a student whose weights were trained in full, and where the file is there already.
    """
    if names not in FILES:
        raise Refused(f"a LoRA has diffusers or kohya names, got {names!r}")
    folder, target = File(student_folder), File(out)
    contract = Contract.load(folder)
    source = folder / FOLDER / FILES["diffusers"]
    if not source.is_file():
        raise Refused(f"{folder} holds no LoRA: it was not trained with student.lora; export it to diffusers instead")
    file = target if target.suffix == ".safetensors" else target / FILES[names]
    if file.exists() and not overwrite:
        raise Refused(f"{file} is already there: choose another place")
    tensors, metadata = read_lora(source)
    write_lora(_pairs(tensors, metadata, str(source)), file, names, contract)
    return file


# -- in ---------------------------------------------------------------------------------------------


def read_lora(file: File | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a LoRA file, or of a student folder's; Refused for anything that could harm."""
    place = File(file).expanduser()
    if place.is_dir():
        inside = [place / FOLDER / FILES["diffusers"], place / FILES["diffusers"]]
        found = next((f for f in inside if f.is_file()), None)
        if found is None:
            raise Refused(f"{place} holds no LoRA: name the .safetensors file")
        place = found
    if place.suffix in PICKLES:
        raise Refused(f"{place} is a pickle, which can run code: convert it to safetensors")
    tensors, metadata = read_tensors(place)
    if not tensors:
        raise Refused(f"{place} holds no tensors")
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise Refused(f"{place}: {name:.100} holds {value.dtype}, a LoRA is of floating-point numbers")
        if not torch.isfinite(value).all():
            raise Refused(f"{place}: {name:.100} holds a NaN or an infinity")
    return tensors, metadata


@torch.no_grad()
def fold_into(parts: Mapping[str, nn.Module], file: File | str, strength: float = 1.0, converter: Any = None) -> Lora:
    """Add a LoRA file to the weights of the networks it is for: ``W + strength alpha / rank up down``.

    ``parts`` are networks by their names in the pipeline; names without a part mean the denoising network.
    ``converter``, a class of pipeline, translates names of other tools where it can. Returns what was added.
    Refused, with nothing changed, where a name fits no layer or a shape not its weight.
    """
    tensors, metadata = read_lora(file)
    lora = _fitted(parts, _pairs(tensors, metadata, str(file)), str(file))
    if isinstance(lora, str) and hasattr(converter, "lora_state_dict"):
        translated, alphas = _translated(converter, tensors, parts, str(file))
        lora = _fitted(parts, _pairs(translated, metadata, str(file), alphas), str(file))
    if isinstance(lora, str):
        raise Refused(lora)
    lora = {name: Pair(pair.down, strength * pair.up) for name, pair in lora.items()}
    for name, pair in lora.items():
        part, _, path = name.partition(".")
        weight: Any = parts[part].get_submodule(path).weight
        weight.data = (weight + pair.product().to(weight.device).view(weight.shape)).to(weight.dtype)
    return lora


@torch.no_grad()
def restore(net: nn.Module, file: File | str) -> None:
    """Give a network's fresh adapters what a student's LoRA file has learned; Refused where they differ in form."""
    tensors, metadata = read_lora(file)
    pairs = {name.partition(".")[2]: pair for name, pair in _pairs(tensors, metadata, str(file)).items()}
    mine = dict(adapters(net))
    if set(pairs) != set(mine):
        odd = sorted(set(pairs) ^ set(mine))[0]
        raise Refused(f"{file} adapts other layers than student.lora.targets ({odd:.100})")
    for path, layer in mine.items():
        pair = pairs[path]
        if pair.down.shape != layer.lora_down.shape:
            raise Refused(f"{file} has rank {len(pair.down)} at {path}, student.lora needs {len(layer.lora_down)}")
        layer.lora_down.copy_(pair.down)
        layer.lora_up.copy_(pair.up.flatten(1) / layer.options.scale)


def components_of(pipe: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline that a LoRA may be for, the denoising one first."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    main = [name for name in ("transformer", "unet") if name in modules]
    return {name: modules[name] for name in (*main, *(n for n in modules if n in ENCODERS))}


def with_lora(name: str, licence: str, digest: str | None, file: File | str, strength: float) -> tuple[str, str, str]:
    """Name, licence and hash of a teacher that was given a LoRA: nothing cached for the plain one is taken for it."""
    import hashlib

    place = File(file).expanduser()
    _, metadata = read_lora(place)
    theirs = re.sub(r"[\x00-\x1f\x7f]", "", metadata.get("modelspec.license", ""))[:100]
    if place.is_dir():
        place = next(f for f in (place / FOLDER / FILES["diffusers"], place / FILES["diffusers"]) if f.is_file())
    stem = re.sub(r"[^\w.-]", "_", place.stem)[:100]
    mixed = hashlib.sha256(f"{digest} {sha256([place])} {strength!r}".encode()).hexdigest()
    return f"{name}+{stem}", f"{licence}; LoRA: {theirs}" if theirs and theirs != licence else licence, mixed


def _pairs(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    where: str,
    alphas: Mapping[str, Any] | None = None,
) -> Lora:
    """Down and up of every layer by its name in the file, alpha / rank folded into up.

    Nothing in the file may be left over: an alpha that is not understood would be another strength.
    """
    said = {**(alphas or {}), **{name: value for name, value in tensors.items() if name.endswith(".alpha")}}
    scales = _scales(metadata, where)
    left = {*tensors, *said}
    found: Lora = {}
    for name in tensors:
        end = next((e for e in ENDS if name.endswith(e)), None)
        if end is None:
            continue
        base = name.removesuffix(end)
        other = base + ENDS[end]
        if other not in tensors:
            raise Refused(f"{where}: {name:.120} has no {ENDS[end]} beside it")
        down, up = tensors[name], tensors[other]
        # of a layer's name, or of its down matrix's where diffusers has translated
        alpha = next((n for n in (f"{base}.alpha", f"{name}.alpha") if n in said), None)
        left -= {name, other, alpha}
        rank = down.shape[0] if down.ndim >= 2 else 0
        if rank < 1 or up.ndim < 2 or up.shape[1] != rank or up[0, 0].numel() != 1:
            raise Refused(f"{where}: {base:.120} has shapes {list(down.shape)} and {list(up.shape)}: no LoRA pair")
        if alpha is not None:
            value = torch.as_tensor(said[alpha])
            if value.numel() != 1 or not torch.isfinite(value).all():
                raise Refused(f"{where}: {base:.120}.alpha is no number")
            scale = float(value) / rank
        else:
            scale = scales(base, rank)
        found[base] = Pair(down, up if scale == 1 else scale * up)
    if left and (found or not all(name.endswith(".alpha") for name in left)):
        raise Refused(f"{where}: {min(left):.120} is no part of a plain LoRA (down, up, alpha), which alone is read")
    if not found:
        raise Refused(f"{where} holds no LoRA")
    return found


def _scales(metadata: Mapping[str, str], where: str) -> Any:
    """alpha / rank by name, as the header of peft and diffusers says it; 1 where it says nothing."""
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return lambda base, rank: 1.0
    try:
        facts = json.loads(text)
        if not isinstance(facts, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise Refused(f"{where}: lora_adapter_metadata in its header is not valid JSON") from None

    def scale(base: str, rank: int) -> float:
        part, _, path = base.partition(".")
        say = {k.removeprefix(f"{part}."): v for k, v in facts.items() if k.startswith(f"{part}.")} or facts
        if say.get("use_dora"):
            raise Refused(f"{where} is a DoRA, which is not read: only plain LoRA is")
        pattern = say.get("alpha_pattern") or {}
        value = pattern.get(path, say.get("lora_alpha", rank)) if isinstance(pattern, dict) else None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
            raise Refused(f"{where}: lora_alpha in its header is no number: {value!r:.60}")
        return float(value) / (rank**0.5 if say.get("use_rslora") else rank)

    return scale


def _fitted(parts: Mapping[str, nn.Module], pairs: Lora, where: str) -> Lora | str:
    """The pairs by part and dotted name; the complaint where a name fits none."""
    index = _index(parts)
    lora: Lora = {}
    strange = []
    for name, pair in pairs.items():
        plain = name.removeprefix("base_model.model.").replace(".processor.", ".")
        place = next((index[n] for n in (name, plain, f"{plain}.0", f"{plain}_0") if index.get(n)), None)
        if place is None:
            strange.append(name)
            continue
        part, _, path = place.partition(".")
        weight: Any = parts[part].get_submodule(path).weight
        shape = (pair.up.shape[0], pair.down[0].numel())
        if shape != (weight.shape[0], weight[0].numel()):
            raise Refused(f"{where}: {name:.120} changes a weight {list(shape)}, the network's is {list(weight.shape)}")
        rank, ones = len(pair.down), (1 for _ in weight.shape[2:])
        fitting = Pair(pair.down.reshape(rank, *weight.shape[1:]), pair.up.reshape(len(weight), rank, *ones))
        lora[place] = lora[place].then(fitting) if place in lora else fitting
    if strange:
        share = "none" if len(strange) == len(pairs) else f"{len(strange)}"
        fits = "fits" if share == "none" else "do not fit"
        return f"{where}: {share} of its {len(pairs)} names {fits} a layer of the teacher ({strange[0]:.120})"
    return lora


def _index(parts: Mapping[str, nn.Module]) -> dict[str, str | None]:
    """Every name that a file may have for a layer, and the layer; None where it would mean two."""
    index: dict[str, str | None] = {}
    for number, (part, module) in enumerate(parts.items()):
        heads = [f"lora_{part}_", *(f"lora_{short}_" for short in ENCODERS.get(part, ()))]
        heads += ["lora_unet_", "lora_transformer_", "lycoris_"] if number == 0 else []
        for path, layer in module.named_modules():
            weight = getattr(layer, "weight", None)
            if not path or not isinstance(weight, Tensor) or weight.ndim < 2 or isinstance(layer, nn.Embedding):
                continue
            flat, here = path.replace(".", "_"), f"{part}.{path}"
            names = {here, *(head + flat for head in heads)}
            names |= {path, f"diffusion_model.{path}"} if number == 0 else set()
            for name in names:
                index[name] = here if index.get(name, here) == here else None
    return index


def _translated(
    converter: Any, tensors: dict[str, Tensor], parts: Mapping[str, nn.Module], where: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Names of other tools (blocks numbered as in the original code, fused projections) as diffusers knows them."""
    config = getattr(next(iter(parts.values())), "config", None)
    try:
        answer = converter.lora_state_dict(dict(tensors), unet_config=config, return_alphas=True)
    except Exception as error:  # whatever a strange file provokes in it
        reason = (str(error).strip().splitlines() or [""])[0][:120]
        raise Refused(
            f"{where}: its names fit no layer of the teacher, and {converter.__name__} cannot read them: "
            f"{type(error).__name__}: {reason}"
        ) from None
    state, alphas = (answer[0], answer[1] or {}) if isinstance(answer, tuple) else (answer, {})
    return state, alphas if isinstance(alphas, dict) else {}


__all__ = ["FILES", "FOLDER", "Lora", "Pair", "fold_into", "lora_of", "read_lora", "restore", "save_lora", "write_lora"]
