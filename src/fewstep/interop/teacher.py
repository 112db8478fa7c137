"""Teachers from folders: a pipeline of diffusers, or a network of our own, as a denoiser with its facts."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path as File
from typing import Any

from torch import Tensor, nn

from ..cond import Cond
from ..denoiser import Denoiser, Wrapped
from ..errors import Refused, need
from .contract import CONTRACT, Contract, null_labels, read_json
from .files import check_finite, components, licence_of, load_weights, scan, sha256, weight_files
from .latents import back, through
from .lora import Lora, components_of, fold_into, with_lora
from .recorder import Recording, embed, record
from .schedules import Schedule

ASSETS = File(__file__).resolve().parent.parent / "assets"
PART_WEIGHTS = "diffusion_pytorch_model.safetensors"


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Teacher:
    """A denoiser and what is known about it.

    Attributes
    ----------
    shape: of one sample as the denoiser sees it (of latents, where there is an autoencoder).
    classes: number of labels of its condition; None where labels are not its condition.
    null_label: the label that stands for "no condition". ``negative``: the recorded one, for other conditions.
    value_range: of finished samples, after ``decode``. ``kind``: the pipeline's class, or "own".
    encode, decode: between data and what the denoiser sees; the identity without an autoencoder.
    guidance: the scale that the pipeline applies by default; None where it applies none.
    clip: the range that its own scheduler holds guesses to. ``lora``: what was folded into its
    weights. ``pipeline``, ``recording``: for saving alike.
    """

    denoiser: Denoiser
    shape: tuple[int, ...]
    name: str
    kind: str
    classes: int | None = None
    null_label: int | None = None
    value_range: tuple[float, float] | None = (-1.0, 1.0)
    licence: str = "unknown"
    sha256: str | None = None
    data_std: float | None = None
    guidance: float | None = None
    clip: tuple[float, float] | None = None
    encode: Callable[[Tensor], Tensor] = _same
    decode: Callable[[Tensor], Tensor] = _same
    negative: Cond = None
    contract: Contract | None = None
    schedule: Schedule | None = None
    lora: Lora = field(default_factory=dict, repr=False)
    pipeline: Any = field(default=None, repr=False)
    recording: Recording | None = field(default=None, repr=False)

    def null(self, cond: Cond) -> Cond:
        """ "No condition" for every row of a condition. Refused where the teacher knows none."""
        if cond is None or isinstance(cond, Tensor) and not cond.is_floating_point():
            return null_labels(self.null_label, cond)
        if self.negative is None:
            raise Refused(f"teacher {self.name} knows no 'no condition', so it cannot be guided: use guidance 1")
        if isinstance(cond, dict) and isinstance(self.negative, dict):
            wide = self.negative if self.recording is None else self.recording.layouts.widen(self.negative, cond)
            if isinstance(wide, dict):
                return {k: _rows(wide[k], v) for k, v in cond.items()}
        if isinstance(cond, Tensor) and isinstance(self.negative, Tensor):
            return _rows(self.negative, cond)
        raise Refused(f"teacher {self.name}: the condition is of another kind than the recorded one")

    def embed(self, prompts: Sequence[str], negative: str | None = None, width: int | None = None) -> Cond:
        """The network's conditions for prompts, one row each, as the pipeline itself makes them.

        With ``negative`` those of that negative prompt, which stand beside these prompts in guidance. Rows of texts
        that differ in length are padded to the longest here, or to ``width`` tokens. Refused where the teacher
        takes no prompts.
        """
        if self.recording is None:
            raise Refused(f"teacher {self.name} is no pipeline, so it takes no prompts")
        return embed(self.pipeline, self.recording, prompts, negative, width)


def _rows(negative: Tensor, like: Tensor) -> Tensor:
    return negative[:1].to(like).expand_as(like)


def packaged() -> dict[str, File]:
    """The teachers that ship with the package, by name."""
    if not ASSETS.is_dir():
        return {}
    return {f.name.removesuffix("_teacher"): f for f in sorted(ASSETS.glob("*_teacher")) if f.is_dir()}


def resolve(source: File | str) -> tuple[str, File]:
    """(name, folder) of a packaged teacher or a folder. Refused where it is neither."""
    shipped = packaged()
    if str(source) in shipped:
        return str(source), shipped[str(source)]
    folder = File(source).expanduser()
    if not folder.is_dir():
        known = ", ".join(shipped) or "none"
        raise Refused(f"no teacher {str(source)!r}: give a folder, or one that ships with the package ({known})")
    return folder.resolve().name, folder


def load_teacher(
    source: File | str,
    *,
    call: Mapping[str, Any] | None = None,
    lora: File | str | None = None,
    strength: float = 1.0,
) -> Teacher:
    """A teacher from a folder or by the name of a packaged one.

    ``call`` are the arguments of the one recorded run of a pipeline; None chooses a small one. ``lora`` is a file
    that is folded into the weights at ``strength``: a teacher with a style of its own. Only safetensors are read
    and no code of the folder is run; Refused, in one line, for a folder that needs anything else.
    """
    name, folder = resolve(source)
    contract = Contract.load(folder) if (folder / CONTRACT).is_file() else None
    if contract is not None and contract.role == "student":
        raise Refused(f"{folder} is a student, not a teacher: load it with load_student")
    if contract is not None and contract.network is not None:
        return _styled(_own(name, folder, contract), lora, strength)
    added: Lora = {}

    def dress(pipe: Any) -> None:
        if lora is not None:
            added.update(fold_into(components_of(pipe), lora, strength, type(pipe)))

    pipe, recording, part = load_pipeline(folder, call, dress)
    denoiser, classes, null_label = described(recording, contract)
    encode, decode = autoencoder(pipe, recording)
    schedule = recording.schedule
    teacher = Teacher(
        denoiser,
        recording.shape,
        name=(contract.name if contract else "") or name,
        kind=recording.kind,
        classes=classes,
        null_label=null_label,
        value_range=contract.value_range if contract else (-1.0, 1.0),
        licence=_licence(folder, contract),
        sha256=sha256(weight_files(folder / part)),
        data_std=denoiser.data_std if denoiser.scale_input else None,
        guidance=recording.guidance,
        clip=schedule.clip,
        encode=encode,
        decode=decode,
        negative=None if recording.labels else recording.negative,
        contract=contract,
        schedule=schedule,
        pipeline=pipe,
        recording=recording,
        lora=added,
    )
    return teacher if lora is None else _renamed(teacher, lora, strength)


def _styled(teacher: Teacher, lora: File | str | None, strength: float) -> Teacher:
    """A network of ours with a LoRA folded in."""
    if lora is None:
        return teacher
    inside: Any = teacher.denoiser
    added = fold_into({"unet": inside.net}, lora, strength)
    return _renamed(replace(teacher, lora=added), lora, strength)


def _renamed(teacher: Teacher, lora: File | str, strength: float) -> Teacher:
    name, licence, digest = with_lora(teacher.name, teacher.licence, teacher.sha256, lora, strength)
    return replace(teacher, name=name, licence=licence, sha256=digest)


def _own(name: str, folder: File, contract: Contract) -> Teacher:
    net, files = own_network(folder, contract)
    return Teacher(
        contract.denoiser(net),
        contract.shape,
        name=contract.name or name,
        kind=contract.pipeline or "own",
        classes=contract.classes,
        null_label=contract.null_label,
        value_range=contract.value_range,
        licence=_licence(folder, contract),
        sha256=sha256(files),
        data_std=contract.preconditioning.data_std if contract.preconditioning.scale_input else None,
        contract=contract,
    )


def own_network(folder: File, contract: Contract) -> tuple[nn.Module, list[File]]:
    """The network of ``fewstep.nets`` that a folder describes, with its weights, and their files."""
    from ..nets import build

    if contract.network is None:
        raise Refused(f"{folder / CONTRACT} describes no network of the package")
    scan(folder)
    if contract.pipeline is not None:
        components(folder)
    try:
        net = build(contract.network)
    except (ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        raise Refused(f"{folder / CONTRACT}: network: {str(error).splitlines()[0][:200]}") from None
    shape = tuple(getattr(net.config, "shape", contract.shape))
    if shape != contract.shape:
        raise Refused(f"{folder / CONTRACT}: the network has shape {list(shape)}, the contract {list(contract.shape)}")
    file = folder / "model.safetensors" if contract.pipeline is None else folder / "unet" / PART_WEIGHTS
    load_weights(net, file)
    return net.eval().requires_grad_(False), [file]


def _licence(folder: File, contract: Contract | None) -> str:
    found = licence_of(folder)
    return contract.licence if found == "unknown" and contract is not None else found


def offline() -> None:
    """A local folder is given: nothing may be fetched or reported. Before diffusers is first imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")


def load_pipeline(
    folder: File, call: Mapping[str, Any] | None = None, dress: Callable[[Any], None] | None = None
) -> tuple[Any, Recording, str]:
    """A checked pipeline of stock classes, what a run of it taught, and the name of its network's part.

    ``dress`` changes the pipeline before it is run.
    """
    kind, parts = components(folder)
    offline()
    need("diffusers", "diffusers")
    import diffusers
    from diffusers import DiffusionPipeline, ModelMixin

    wanted: Any = getattr(diffusers, kind, None)
    if not (isinstance(wanted, type) and issubclass(wanted, DiffusionPipeline)):
        raise Refused(f"{folder}: {kind!r} is no pipeline of diffusers {diffusers.__version__}")
    loaded: dict[str, Any] = {}
    with _quiet():
        for name, (library, one) in parts.items():
            if library != "diffusers" or one is None:
                continue
            found = getattr(diffusers, one, None)
            if found is None:
                version = diffusers.__version__
                raise Refused(f"{folder}: part {name!r} is a {one}, which diffusers {version} does not have")
            if isinstance(found, type) and issubclass(found, ModelMixin):
                loaded[name] = _load_part(found, folder / name)
        try:
            stock: Any = wanted
            pipe = stock.from_pretrained(str(folder), local_files_only=True, use_safetensors=True, **loaded)
        except Exception as error:  # whatever a strange folder provokes
            raise Refused(f"{folder} does not load as {kind}: {_line(error)}") from None
    pipe.set_progress_bar_config(disable=True)
    if dress is not None:
        dress(pipe)
    try:
        recording = record(pipe, call)
    except (RuntimeError, TypeError, ArithmeticError, LookupError) as error:  # what a strange configuration provokes
        raise Refused(f"{folder} loads as {kind}, but does not run: {_line(error)}") from None
    return pipe, recording, recording.part


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of other libraries while a folder is read."""
    from diffusers.utils import logging as diffusers_logging

    tools = [diffusers_logging]
    if importlib.util.find_spec("transformers") is not None:
        from transformers.utils import logging as transformers_logging

        tools.append(transformers_logging)
    were = [tool.is_progress_bar_enabled() if hasattr(tool, "is_progress_bar_enabled") else True for tool in tools]
    for tool in tools:
        tool.disable_progress_bar()
    try:
        yield
    finally:
        for tool, was in zip(tools, were, strict=True):
            if was:
                tool.enable_progress_bar()


def _load_part(kind: Any, folder: File) -> nn.Module:
    """One network, strictly: a missing, extra or misshapen tensor is refused instead of drawn at random."""
    if not isinstance(read_json(folder / "config.json"), dict):
        raise Refused(f"{folder / 'config.json'} must hold a JSON object")
    if not weight_files(folder):
        raise Refused(f"{folder} holds no safetensors weights")
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        net, info = kind.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:
        raise Refused(f"{folder} does not load as {kind.__name__}: {_line(error)}") from None
    finally:
        logging.set_verbosity(level)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(what):
            first = next(iter(info[what]))
            raise Refused(f"{folder}: {what.replace('_', ' ')} in the weights: {first!s:.120}")
    check_finite(net, str(folder))
    module: nn.Module = net.eval().requires_grad_(False)
    return module


def _line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {text}"


def described(recording: Recording, contract: Contract | None) -> tuple[Wrapped, int | None, int | None]:
    """(denoiser, classes, null label) from a recording, and from a contract where there is one."""
    net = recording.replay()
    net.requires_grad_(False)
    if contract is not None:
        if contract.shape != recording.shape:
            raise Refused(f"fewstep.json says shape {list(contract.shape)}, the pipeline has {list(recording.shape)}")
        return contract.wrapped(net), contract.classes, contract.null_label
    classes = null_label = None
    if recording.labels:
        config = getattr(recording.network, "config", {})
        classes = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
        if isinstance(recording.negative, Tensor):
            null_label = int(recording.negative[0])
    return recording.schedule.wrap(net), classes, null_label


def autoencoder(pipe: Any, recording: Recording) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """(encode, decode) between data and what the network sees: the identity without an autoencoder."""
    if getattr(pipe, "vae", None) is None and recording.decoder is None:
        return _same, _same
    codec = recording.codec
    vae = getattr(pipe, recording.decoder or "vae")
    if codec is None:
        reason = next(iter(recording.notes), "its run never reached the autoencoder")

        def refuse(x: Tensor) -> Tensor:
            raise Refused(f"{recording.kind}: {reason}: samples stay latents")

        return refuse, refuse

    def encode(data: Tensor) -> Tensor:
        return through(vae, codec, data)

    def decode(latents: Tensor) -> Tensor:
        return back(vae, codec, latents)

    return encode, decode
