"""The derivative of a guess along the flow: exact in forward mode, or a central difference in one batched call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook

from .cond import Cond, rows
from .path import column

Derivative = Literal["exact", "difference"]


@torch.no_grad()
def along_flow(
    model: Callable[[Tensor, Tensor, Tensor, Cond], Tensor],
    x: Tensor,
    t: Tensor,
    s: Tensor,
    velocity: Tensor,
    cond: Cond = None,
    *,
    kind: Derivative = "exact",
    step: Tensor | float = 5e-3,
    low: Tensor | float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """``d model(x_t, t, s) / dt`` along the flow, tangents (velocity, 1, 0): like x, without a graph.

    ``exact`` is one forward-mode pass through plain attention (fused attention has none). ``difference`` is
    ``(model(x + h v, t + h) - model(x - h v, t - h)) / 2 h``, both in one call of twice the rows, its times held in
    [low, high]; its error is of order h^2 and, in float32, of order 1e-7 / h. t, s and ``step`` are [batch].
    """
    if kind == "exact":
        # dual numbers cost less than torch.func.jvp's layers
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), _norms_by_channel():
            moving = forward_ad.make_dual(x, velocity), forward_ad.make_dual(t, torch.ones_like(t))
            rate: Tensor | None = forward_ad.unpack_dual(model(*moving, s, cond)).tangent
        return torch.zeros_like(x) if rate is None else rate
    later, earlier = torch.clamp(t + step, max=high), torch.maximum(t - step, torch.as_tensor(low).to(t))
    both = model(
        torch.cat([x + column(later - t, x) * velocity, x + column(earlier - t, x) * velocity]),
        torch.cat([later, earlier]),
        torch.cat([s, s]),
        rows(cond, torch.arange(len(x), device=x.device).repeat(2)),
    )
    ahead, behind = both.chunk(2)
    return (ahead - behind) / column((later - earlier).clamp(min=1e-6), x)


@contextmanager
def _norms_by_channel() -> Iterator[None]:
    """Inside, group norms read contiguous pictures: their forward mode fails on those laid out channels last."""

    def contiguous(module: nn.Module, args: tuple[Any, ...]) -> Any:
        return (args[0].contiguous(), *args[1:]) if isinstance(module, nn.GroupNorm) else None

    handle = register_module_forward_pre_hook(contiguous)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def still_fast_waves(module: nn.Module, count: int) -> None:
    """Silence the ``count`` fastest sine and cosine waves that every time embedding of a network reads.

    A network that learned at many levels hardly uses them (its guesses move by a thousandth), but they carry most of
    its derivative in time where the clock runs fast (``250 log_sigma``, ``1000t``): methods that learn from that
    derivative then learn from noise. Embeddings are the modules named ``time_embedding`` with a ``linear_1`` over
    cosines and sines, fastest first in each half, as in diffusers. ValueError where there is none.
    """
    found = False
    for name, part in module.named_modules():
        first = getattr(part, "linear_1", None)
        if name.split(".")[-1] == "time_embedding" and isinstance(first, nn.Linear):
            half, found = first.in_features // 2, True
            if count >= half:
                raise ValueError(f"still = {count} would leave no wave of {half}: pass fewer")
            first.weight[:, :count] = 0
            first.weight[:, half : half + count] = 0
    if not found:
        raise ValueError("this network has no time embedding of waves to still: pass still = 0")
