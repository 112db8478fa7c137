"""Prompts: conditions without data, for methods that learn from the teacher alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path as File
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..cond import Cond, rows
from ..errors import Refused
from ..part import Part
from ..registry import task
from .base import Split, Task

LIMIT = 64 * 2**20  # bytes of a prompt file
LONGEST = 10_000  # letters of a prompt
MEMORY = 16 * 2**30  # bytes that conditions may take


class PromptsOptions(Part):
    path: str = Field(description="a text file, one prompt a line")


@task("prompts")
class Prompts(Task):
    """The conditions of prompts, and no data: samples come from the student itself.

    Made from a file, it has prompts alone; ``asked`` gives it a teacher's conditions and shape.
    """

    Options = PromptsOptions
    has_data = False

    def __init__(self, options: PromptsOptions) -> None:
        self.options, self.prompts = options, read_prompts(File(options.path))
        self.shape: tuple[int, ...] = ()
        self.value_range = (-1.0, 1.0)
        self._cond: Cond = None
        self._decode: Callable[[Tensor], Tensor] | None = None

    def asked(
        self,
        embed: Callable[[Sequence[str]], Cond],
        shape: tuple[int, ...],
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> Prompts:
        """The same prompts with their conditions; Refused where those would not fit in memory."""
        few = embed(self.prompts[:1])
        size = sum(v.numel() * v.element_size() for v in _tensors(few)) * len(self.prompts)
        if size > MEMORY:
            raise Refused(
                f"the conditions of {len(self.prompts)} prompts take {size / 2**30:.0f} GB, more than the "
                f"{MEMORY // 2**30} allowed: give fewer prompts"
            )
        self._cond, self.shape, self._decode = embed(self.prompts), tuple(shape), decode
        return self

    @property
    def train(self) -> Split:
        nothing = torch.zeros(()).expand(len(self.prompts), *self.shape)  # takes no memory
        return Split(nothing, self._cond)

    @property
    def test(self) -> Split:
        return Split(torch.zeros(0, *self.shape), rows(self._cond, slice(0, 0)))

    def finish(self, x: Tensor) -> Tensor:
        """Decoded, and held to the value range; samples that are pictures already are only held."""
        if self._decode is not None and tuple(x.shape[1:]) == self.shape:
            x = torch.cat([self._decode(part) for part in x.split(4)])
        return x if self.value_range is None else x.clamp(*self.value_range)

    def pictures(self, x: Tensor) -> Tensor | None:
        """Samples as images; of a video its first frame."""
        done = self.finish(x.float())
        if done.ndim == 5:
            done = done[:, :, 0]
        if done.ndim != 4 or done.shape[1] not in (1, 3):
            return None
        return ((done + 1) / 2 * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def read_prompts(file: File) -> list[str]:
    """The prompts of a text file, one a line; blank lines are left out.

    Refused, in one line, for a file that is missing, empty, too large, binary or not UTF-8.
    """
    what = f"prompt file {file}"
    if file.is_dir() or not file.exists():
        raise Refused(f"there is no {what}: give a text file, one prompt a line")
    if not file.is_file():
        raise Refused(f"{what} is no plain file: give a text file, one prompt a line")
    if file.stat().st_size > LIMIT:
        raise Refused(f"{what} has {file.stat().st_size} bytes, more than the {LIMIT} allowed: split it")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise Refused(f"{what} cannot be read: {error.strerror or error}") from None
    if b"\x00" in content:
        raise Refused(f"{what} is binary: give a text file, one prompt a line")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"{what} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise Refused(f"{what} holds no prompt: give one a line")
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) > LONGEST:
            raise Refused(f"prompt {number} of {file} has {len(prompt)} letters, more than the {LONGEST} allowed")
        if any(ord(letter) < 32 and letter != "\t" or ord(letter) == 127 for letter in prompt):
            raise Refused(f"prompt {number} of {file} holds a control character: give plain text")
    return prompts


def _tensors(cond: Cond) -> list[Any]:
    return [] if cond is None else list(cond.values()) if isinstance(cond, dict) else [cond]
