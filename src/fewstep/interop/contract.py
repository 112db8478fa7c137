"""The contract of a shipped model, ``fewstep.json``: everything that a sampler must know and weights do not say.

It is read as hostile input: whatever is wrong with a file becomes one line that names the place.
Nothing here needs more than the light core.
"""

from __future__ import annotations

import json
import math
from pathlib import Path as File
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from torch import Tensor, nn

from ..cond import Cond
from ..denoiser import PRECONDITIONED, Centred, Clock, Denoiser, Wrapped
from ..errors import Refused
from ..joint import Joint
from ..part import Part
from ..path import AnyPath
from ..registry import nearest
from ..student import Student

CONTRACT = "fewstep.json"
FORMAT = 1
LIMIT = 8 * 2**20

Line = Annotated[str, Field(max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Number = bool | int | float | str | None


class Origin(Part):
    """Where a student comes from."""

    name: Line
    sha256: Sha256 | None = None
    licence: Line = "unknown"


class Preconditioning(Part):
    """What stands around the network: see ``fewstep.denoiser.Wrapped``."""

    scale_input: bool = False
    data_std: float = Field(1.0, gt=0, allow_inf_nan=False)
    boundary: float = Field(0.002, ge=0, allow_inf_nan=False)


class Steps(Part):
    """One step count that the model serves.

    ``times`` and ``sigmas`` (the path's sigma at them) descend; the clean end is left out. ``call`` are the
    arguments of the stock pipeline that take exactly these steps, None where plain diffusers cannot.
    """

    count: int = Field(ge=1, le=1000)
    times: tuple[float, ...]
    sigmas: tuple[float, ...]
    policy: Literal["ode", "renoise"] = "ode"
    call: dict[str, Number | list[int] | list[float]] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Steps:
        for name, values in (("times", self.times), ("sigmas", self.sigmas)):
            if len(values) != self.count:
                raise ValueError(f"{self.count} steps need {self.count} {name}, got {len(values)}")
            if not all(math.isfinite(v) and v > 0 for v in values):
                raise ValueError(f"{name} must be positive and finite, got {list(values)}")
            if any(b >= a for a, b in zip(values[:-1], values[1:], strict=True)):
                raise ValueError(f"{name} must descend, got {list(values)}")
        return self


class Guidance(Part):
    """Guidance that was distilled into the weights: nothing is left to set."""

    baked: float = Field(1.0, allow_inf_nan=False, description="scale of the teacher's guidance; 1 is none")
    negative_prompt: bool = Field(False, description="whether the teacher's negative condition was a prompt")


class Contract(Part):
    """What a model folder promises. Unknown keys, other formats and impossible values are refused."""

    format: Literal[1] = 1
    fewstep: Line = Field(description="version of the package that wrote it")
    role: Literal["teacher", "student"] = "student"
    name: Line = ""
    method: Line = Field(description="how it was trained")
    teacher: Origin | None = None
    task: Line | None = None
    prediction: Literal["x0", "eps", "v", "velocity", "flow", "score", "edm", "edm_v", "cm"]
    path: AnyPath
    clock: Clock
    centred: Line | None = Field(None, description="the part of the condition that the noise lies around")
    preconditioning: Preconditioning = Preconditioning()
    steps: tuple[Steps, ...] = Field((), max_length=64)
    start: float = Field(gt=0, allow_inf_nan=False, description="time of the first step")
    start_scale: float = Field(gt=0, allow_inf_nan=False, description="the first step begins at start_scale * noise")
    guidance: Guidance = Guidance()
    shape: tuple[Annotated[int, Field(ge=1, le=2**16)], ...] = Field(min_length=1, max_length=6)
    value_range: tuple[float, float] | None = None
    classes: int | None = Field(None, ge=1, le=10**7)
    joint: Joint | None = Field(None, description="how samples hold their labels; None: they do not")
    null_label: int | None = Field(None, ge=0, le=10**7, description="the label that stands for no condition")
    pipeline: Line | None = Field(None, description="the stock diffusers class that runs it; None: no diffusers model")
    prompts: bool = Field(False, description="the condition comes from prompts, through the pipeline's own encoders")
    network: dict[str, Any] | None = Field(None, description="the network, where fewstep.nets can build it")
    program: Line | None = Field(None, description="the exported one-step program, or why there is none")
    licence: Line = "unknown"
    recipe_sha256: Sha256 | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    metrics: dict[str, Any] = Field(default_factory=dict)

    @field_validator("shape")
    @classmethod
    def _size(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        if math.prod(shape) > 2**31:
            raise ValueError(f"a sample of {math.prod(shape)} numbers is too large")
        return shape

    @model_validator(mode="after")
    def _fits(self) -> Contract:
        path = self.path
        table = getattr(path, "alphas_cumprod", ())
        if table and (not all(math.isfinite(a) and 0 <= a <= 1 for a in table) or _rises(table)):
            raise ValueError("path.alphas_cumprod must fall from 1 to 0")
        if self.prediction in PRECONDITIONED and path.kind != "exploding":
            raise ValueError(f"prediction {self.prediction!r} needs the exploding path, got {path.kind!r}")
        if not path.t_min < self.start <= path.t_max * (1 + 1e-6):
            raise ValueError(f"start must lie in ({path.t_min:g}, {path.t_max:g}], got {self.start:g}")
        if self.centred is not None and self.pipeline is not None:
            raise ValueError(f"{self.pipeline} draws noise around nothing, and centred says around {self.centred!r}")
        if self.role == "student" and not self.steps:
            raise ValueError("a student needs at least one step count in steps")
        counts = [s.count for s in self.steps]
        if len(set(counts)) != len(counts):
            raise ValueError(f"a step count stands twice in steps: {counts}")
        for one in self.steps:
            if abs(one.times[0] - self.start) > 1e-9 * max(1.0, self.start):
                raise ValueError(f"{one.count} steps begin at {one.times[0]:g}, the start is {self.start:g}")
            if one.times[-1] <= path.t_min:
                raise ValueError(f"{one.count} steps end at {one.times[-1]:g}, which is clean already")
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"value_range needs low < high, got {list(self.value_range)}")
        if self.joint is not None and self.joint.picture + self.joint.channels != self.shape[0]:
            raise ValueError(f"joint has {self.joint.picture + self.joint.channels} channels, shape {self.shape[0]}")
        return self

    # -- reading and writing ------------------------------------------------------------------------

    @classmethod
    def load(cls, folder: File | str) -> Contract:
        """The contract of a folder (or the file itself). Refused with one line where it is missing or wrong."""
        file = File(folder)
        file = file / CONTRACT if file.is_dir() else file
        return cls.parse(read_json(file), str(file))

    @classmethod
    def parse(cls, value: Any, where: str = CONTRACT) -> Contract:
        """A contract from parsed JSON."""
        if not isinstance(value, dict):
            raise Refused(f"{where} must hold a JSON object, got {type(value).__name__}")
        number = value.get("format")
        if isinstance(number, int) and not isinstance(number, bool) and number > FORMAT:
            raise Refused(f"{where} has format {number}, this version reads up to {FORMAT}: upgrade fewstep")
        if number != FORMAT or isinstance(number, bool):
            raise Refused(f"{where} has format {number!r}, expected {FORMAT}")
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise Refused(f"{where}: {_first_line(error)}") from None
        except (RecursionError, OverflowError) as error:
            raise Refused(f"{where}: {type(error).__name__} while reading it") from None

    def save(self, folder: File | str) -> None:
        """Write ``fewstep.json`` into a folder."""
        text = json.dumps(self.plain(), indent=2, allow_nan=False)
        (File(folder) / CONTRACT).write_text(text + "\n", encoding="utf-8")

    def plain(self) -> dict[str, Any]:
        """As JSON; ``joint`` is left out where there is none, so that older versions read the others."""
        return self.model_dump(mode="json", exclude={"joint"} if self.joint is None else None)

    # -- what it means ------------------------------------------------------------------------------

    def step(self, count: int) -> Steps:
        """The entry of a step count; Refused, with the ones there are, for any other.

        >>> from fewstep.path import Straight
        >>> one = Steps(count=1, times=(1.0,), sigmas=(1.0,))
        >>> kept = Contract(fewstep="0", method="m", prediction="velocity", path=Straight(), clock="t",
        ...                 steps=(one,), start=1.0, start_scale=1.0, shape=(2,))
        >>> kept.step(3)
        Traceback (most recent call last):
        fewstep.errors.Refused: this student was trained for 1 step(s), got 3: pass one of those
        """
        for one in self.steps:
            if one.count == count:
                return one
        known = ", ".join(str(s.count) for s in self.steps)
        raise Refused(f"this {self.role} was trained for {known or 'no few'} step(s), got {count}: pass one of those")

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """Parts of the condition beside a label, by name: the shape of one row."""
        return parts_of(self.network, self.shape, self.centred)

    def denoiser(self, net: nn.Module) -> Denoiser:
        """The network as the denoiser that the contract describes."""
        one = self.wrapped(net)
        return one if self.centred is None else Centred(one, self.centred)

    def wrapped(self, net: nn.Module) -> Wrapped:
        """The network with what stands directly around it."""
        around = self.preconditioning
        return Wrapped(
            net,
            self.path,
            self.prediction,
            self.clock,
            scale_input=around.scale_input,
            data_std=around.data_std,
            boundary=around.boundary,
        )

    def student(self, net: nn.Module) -> Student:
        """The network as the student that the contract describes."""
        policies = {s.policy for s in self.steps if s.count > 1}
        if len(policies) > 1:
            raise Refused("this contract mixes ode and renoise between its step counts")
        return Student(
            self.denoiser(net),
            self.shape,
            start=self.start,
            start_scale=self.start_scale,
            steps={s.count: s.times for s in self.steps},
            policy=policies.pop() if policies else self.steps[0].policy,
        )

    def null(self, cond: Cond) -> Cond:
        """ "No condition" for every row of a condition of labels."""
        return null_labels(self.null_label, cond)


def parts_of(
    network: dict[str, Any] | None, shape: tuple[int, ...], centred: str | None = None
) -> dict[str, tuple[int, ...]]:
    """What a network reads beside the sample, and what its noise lies around, by name: the shape of one row.

    >>> parts_of({"kind": "unet", "beside": {"low": 1}}, (3, 8, 8), "mean")
    {'low': (1, 8, 8), 'mean': (3, 8, 8)}
    """
    described = network or {}
    inner = described.get("net")  # of several networks, each reads the same
    beside = (inner if isinstance(inner, dict) else described).get("beside")
    found = {str(k): (int(v), *shape[1:]) for k, v in beside.items()} if isinstance(beside, dict) else {}
    return found if centred is None else {**found, centred: found.get(centred, tuple(shape))}


def null_labels(label: int | None, cond: Cond) -> Cond:
    """The null label in every row; Refused where the model has none. No condition stays none."""
    if cond is None:
        return None
    if label is None or not isinstance(cond, Tensor):
        raise Refused("this model knows no 'no condition', so it cannot be guided: use guidance 1")
    return cond.new_full(cond.shape, label)


def read_json(file: File, limit: int = LIMIT) -> Any:
    """Parsed JSON of a file of at most ``limit`` bytes; Refused, in one line, for anything else."""
    try:
        if not file.is_file():
            raise Refused(f"{file} is missing")
        if file.stat().st_size > limit:
            raise Refused(f"{file} has {file.stat().st_size} bytes, more than the {limit} allowed")
        return json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise Refused(f"{file} is not valid JSON: {str(error).splitlines()[0][:200]}") from None
    except Refused as error:
        raise Refused(str(error) if str(file) in str(error) else f"{file}: {error}") from None
    except ValueError as error:  # an integer of more digits than Python reads
        raise Refused(f"{file} is not valid JSON: {str(error)[:200]}") from None
    except OSError as error:
        raise Refused(f"{file} cannot be read: {error.strerror or error}") from None


def _no_constant(name: str) -> Any:
    raise Refused(f"{name} is not a JSON number")


def _rises(table: tuple[float, ...]) -> bool:
    return any(b > a for a, b in zip(table[:-1], table[1:], strict=True))


def _first_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = list(Contract.model_fields) + list(Steps.model_fields) + list(Preconditioning.model_fields)
        known += list(Guidance.model_fields) + list(Origin.model_fields)
        return f"unknown key {where[:100]!r}: {nearest(str(first['loc'][-1])[:100], known)}"
    given = repr(first.get("input"))
    shown = given if len(given) <= 60 else given[:57] + "..."
    message = str(first["msg"]).removeprefix("Value error, ").splitlines()[0]
    if first["type"] == "missing":
        return f"{where} is missing"
    return (f"{where}: " if where else "") + message + ("" if first["type"] == "value_error" else f", got {shown}")
