"""One network in the game: its parameters, its optimiser, its update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Refused
from .processes import local
from .recipe import Optim

OPTIMISERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "radam": torch.optim.RAdam,
}


class Player:
    """One network in the game: its parameters, optimiser and schedule.

    Parameters of fewer than 32 bits are updated in float32: for the length of an update each has a wide copy,
    which the optimiser moves and which is rounded back at random, so that the mean of what is kept is what the
    optimiser meant (``stochastic_round``). The optimiser's moments are of the wide copies, so float32.
    """

    def __init__(self, module: nn.Module, settings: Optim) -> None:
        self.module, self.settings = module, settings
        self.leaves = [p for p in module.parameters() if p.requires_grad]
        self.parameters = [local(p) for p in self.leaves]  # of a sharded network, the part of this process
        if not self.parameters:
            raise ValueError("a player without parameters cannot learn")
        self.learning = [
            nn.Parameter(p.detach().float()) if narrow(leaf) else p
            for leaf, p in zip(self.leaves, self.parameters, strict=True)
        ]
        self.pairs = [(w, p) for w, p in zip(self.learning, self.parameters, strict=True) if w is not p]
        fused = {} if settings.kind == "radam" else {"fused": True}
        kind: Any = OPTIMISERS[settings.kind]
        self.optimiser: torch.optim.Optimizer = kind(
            self.learning, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, **fused
        )
        self.can_skip = bool(fused)
        self._rest()

    def learns(self, yes: bool) -> None:
        for parameter in self.leaves:
            parameter.requires_grad_(yes)

    def update(self, share: float, norm: Tensor | None = None, *, key: int = 0) -> tuple[Tensor, Tensor]:
        """One optimiser step at ``share`` of the learning rate: (gradient norm, 1 where it was skipped).

        A gradient that is not finite changes nothing: the fused step is told so without a device sync. ``norm``
        is given where this process has a part of the gradient alone. ``key`` is the seed of the random rounding:
        equal on all processes that hold the same weights.
        """
        self._widen()
        if norm is None:
            grads = [p.grad for p in self.learning if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        bad = (~norm.isfinite()).float()
        if self.settings.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.learning, self.settings.clip, norm, foreach=True)
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.lr * share
        if self.can_skip:
            self.optimiser.found_inf = bad  # type: ignore[attr-defined]
            self.optimiser.grad_scale = None  # type: ignore[attr-defined]
            self.optimiser.step()
        elif not bad:
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self._round(key)
        return norm.detach(), bad

    def _widen(self) -> None:
        """Fill the wide copies of narrow parameters and of their gradients."""
        for wide, parameter in self.pairs:
            wide.data = parameter.detach().float()
            wide.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

    def _round(self, key: int) -> None:
        generators: dict[torch.device, torch.Generator] = {}
        with torch.no_grad():
            for wide, parameter in self.pairs:
                device = parameter.device
                rng = generators.setdefault(device, torch.Generator(device).manual_seed(key))
                parameter.copy_(stochastic_round(wide.detach(), rng))
        self._rest()

    def _rest(self) -> None:
        """Free the wide copies until the next update."""
        for wide, _ in self.pairs:
            wide.data = wide.data.new_empty(0)

    def forget(self, gone: set[int]) -> None:
        """Drop the optimiser's memory of re-initialised parameters."""
        for learning, parameter in zip(self.learning, self.parameters, strict=True):
            if parameter.data_ptr() in gone:
                self.optimiser.state.pop(learning, None)

    def state(self) -> dict[str, Tensor]:
        out = {}
        for i, parameter in enumerate(self.learning):
            for key, value in self.optimiser.state.get(parameter, {}).items():
                out[f"{i}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        return out

    def load(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            index, key = name.split("/")
            parameter = self.learning[int(index)]
            home = "cpu" if key == "step" and not self.can_skip else parameter.device
            self.optimiser.state[parameter][key] = value.to(home)


def narrow(parameter: Tensor) -> bool:
    """Whether a parameter has fewer than 32 bits; Refused where it cannot be rounded at random."""
    if parameter.dtype == torch.bfloat16:
        if hasattr(parameter, "full_tensor"):  # a part of a weight that is spread over processes
            raise Refused("precision.weights = 'bfloat16' does not go with sharded weights: take float32")
        return True
    if parameter.dtype == torch.float16:
        raise Refused("weights of float16 cannot learn: load the network in float32, or take bfloat16")
    return False


def stochastic_round(x: Tensor, rng: torch.Generator) -> Tensor:
    """float32 to bfloat16, up or down at random, so that ``E[round(x)] = x``.

    A bfloat16 is the upper half of a float32. A uniform draw of 16 bits is added to the lower half before it is
    cut off: the carry comes with the probability of the share that is cut off. Ties, signs and steps to the next
    exponent need no case; what is not finite stays as it is.

    >>> x = torch.full((100_000,), 1 + 2**-10)  # an eighth of the way from 1 to the next bfloat16, 1 + 2^-7
    >>> rounded = stochastic_round(x, torch.Generator().manual_seed(0)).double()
    >>> sorted(set(rounded.tolist())), abs(rounded.mean().item() - (1 + 2**-10)) < 5e-5
    ([1.0, 1.0078125], True)
    """
    bits = x.contiguous().view(torch.int32)
    noise = torch.randint(0, 2**16, x.shape, generator=rng, device=x.device, dtype=torch.int32)
    cut = (bits + noise).bitwise_and_(-(2**16)).view(torch.float32)
    return torch.where(x.isfinite(), cut, x).to(torch.bfloat16)
