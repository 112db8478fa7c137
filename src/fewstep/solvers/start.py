"""Where sampling starts, on paths that end with some signal left."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..cond import Cond
from ..denoiser import Denoiser, Guided
from ..path import Path
from ..rng import Source, normal
from .base import start_noise

SILENT = 1e-8
"""alpha below which a path's end holds no signal: less than single precision can tell beside noise of 1."""


class OneMoreStep:
    """The true law at a path's noisiest time, by one small module (Hu et al. 2023, https://arxiv.org/abs/2311.15744).

        x0_hat = module(eps, t_max, cond)       its guess of x0 at pure noise, at its best ``E[x0 | cond]``
        x_t    = alpha_t x0_hat + sigma_t z

    A model trained on a path that keeps alpha > 0 at its end (0.068 in Stable Diffusion) never saw pure noise there:
    started from it, samples are pulled to the average. This takes the place of ``start_noise``, at one call of the
    module; the model itself is not touched. On a path that ends in pure noise nothing is missing: there it gives the
    noise, and the module is not asked.

    Parameters
    ----------
    module: a denoiser on a path that ends in pure noise (method ``one_more_step``); its path and the model's need
        have nothing in common but the space of samples.
    guidance: of the module alone, on ``module.null`` or ``negative``; it moves brightness and colour and leaves the
        model's own guidance as it is.
    """

    def __init__(self, module: Denoiser, guidance: float = 1.0, negative: Callable[[Cond], Cond] | None = None) -> None:
        alpha = float(module.path.coefs(module.path.t_max).alpha)
        if alpha > SILENT:
            raise ValueError(
                f"the module is asked at pure noise, but its path keeps alpha = {alpha:.3g} there: train it by "
                "one_more_step on the straight path"
            )
        self.module = module if guidance == 1 else Guided(module, guidance, negative)

    @torch.no_grad()
    def __call__(self, path: Path, t: float, noise: Tensor, cond: Cond = None, *, rng: Source) -> Tensor:
        """The sample at time t of the model's path, from standard normal noise z [batch, ...]; ``rng`` gives eps."""
        if float(path.coefs(t).alpha) <= SILENT:
            return start_noise(path, t, noise)
        guess = self.module(normal(noise, rng), self.module.path.t_max, cond, "x0")
        return path.corrupt(guess.to(noise.dtype), t, noise)
