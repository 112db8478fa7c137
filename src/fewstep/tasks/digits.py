"""Digits: the 1,797 handwritten digits that ship inside scikit-learn, 8x8, ten classes."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ..errors import Refused, need
from ..part import Part
from ..registry import task
from ..rng import Rng
from .base import Split, Task
from .split import data_hash


class DigitsOptions(Part):
    augment: bool = Field(False, description="shift training digits by up to a pixel where no ink is lost")
    hold_out: int = Field(
        0,
        ge=0,
        description="this many training digits, stratified, take the place of the test half: to choose recipes (198)",
    )


@task("digits")
class Digits(Task):
    """Handwritten digits 8x8 (scikit-learn's load_digits): 898 to learn from, 899 to measure against.

    Values 0..16 become [-1, 1]; the halves are stratified, seed 0. With ``hold_out = 198`` the other 700 of
    the training half are ``train`` and those 198 are ``test``, so that recipes can be chosen without ever
    seeing the test half.
    """

    Options = DigitsOptions
    shape = (1, 8, 8)
    classes = 10
    data_std = 0.75
    value_range = (-1.0, 1.0)

    def __init__(self, options: DigitsOptions | None = None) -> None:
        self.options = options or DigitsOptions()
        need("sklearn", "evaluate")
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        data = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
        label = torch.tensor(labels, dtype=torch.long)
        train, test = train_test_split(np.arange(len(labels)), test_size=0.5, stratify=labels, random_state=0)
        held = self.options.hold_out
        if held:
            if not self.classes <= held <= len(train) - self.classes:
                most = len(train) - self.classes
                raise Refused(f"hold_out = {held} of {len(train)} digits: pass 0, or {self.classes} to {most}")
            train, test = train_test_split(train, test_size=held, stratify=labels[train], random_state=0)
        self._train, self._test = (Split(data[i], label[i]) for i in map(torch.from_numpy, (train, test)))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the samples and labels of both splits."""
        return data_hash(self._train.data, self._train.cond, self._test.data, self._test.cond)

    def augment(self, data: Tensor, rng: Rng) -> Tensor:
        if not self.options.augment:
            return data
        for axis in (2, 3):
            move = rng.integers(3, len(data)).to(data.device) - 1
            blank_end = (data.select(axis, -1) == -1).flatten(1).all(1)
            blank_start = (data.select(axis, 0) == -1).flatten(1).all(1)
            on, back = (move == 1) & blank_end, (move == -1) & blank_start
            for chosen, by in ((on, 1), (back, -1)):  # the blank line that leaves comes back on the other side
                data = torch.where(chosen[:, None, None, None], data.roll(by, axis), data)
        return data

    def views(self, data: Tensor) -> tuple[Tensor, ...]:
        if self.options.augment:
            raise Refused("shifted digits cannot be encoded once for all: leave out augment with an autoencoder")
        return (data,)
