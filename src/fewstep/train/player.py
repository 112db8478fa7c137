"""One network in the game: its parameters, its optimiser, its update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .recipe import Optim

OPTIMISERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "radam": torch.optim.RAdam,
}


class Player:
    """One network in the game: its parameters, optimiser and schedule."""

    def __init__(self, module: nn.Module, settings: Optim) -> None:
        self.module, self.settings = module, settings
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("a player without parameters cannot learn")
        fused = {} if settings.kind == "radam" else {"fused": True}
        kind: Any = OPTIMISERS[settings.kind]
        self.optimiser: torch.optim.Optimizer = kind(
            self.parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, **fused
        )
        self.can_skip = bool(fused)

    def learns(self, yes: bool) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(yes)

    def update(self, share: float) -> tuple[Tensor, Tensor]:
        """One optimiser step at ``share`` of the learning rate: (gradient norm, 1 where it was skipped).

        A gradient that is not finite changes nothing: the fused step is told so without a device sync.
        """
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        bad = (~norm.isfinite()).float()
        if self.settings.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip, norm, foreach=True)
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.lr * share
        if self.can_skip:
            self.optimiser.found_inf = bad  # type: ignore[attr-defined]
            self.optimiser.grad_scale = None  # type: ignore[attr-defined]
            self.optimiser.step()
        elif not bad:
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return norm.detach(), bad

    def forget(self, gone: set[int]) -> None:
        """Drop the optimiser's memory of re-initialised parameters."""
        for parameter in self.parameters:
            if parameter.data_ptr() in gone:
                self.optimiser.state.pop(parameter, None)

    def state(self) -> dict[str, Tensor]:
        out = {}
        for i, parameter in enumerate(self.parameters):
            for key, value in self.optimiser.state.get(parameter, {}).items():
                out[f"{i}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        return out

    def load(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            index, key = name.split("/")
            parameter = self.parameters[int(index)]
            home = "cpu" if key == "step" and not self.can_skip else parameter.device
            self.optimiser.state[parameter][key] = value.to(home)
