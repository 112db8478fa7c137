"""Multistep solvers: rows of one engine."""

from __future__ import annotations

from typing import ClassVar

from ..path import Path
from ..registry import Paper, solver
from .base import Stage
from .engine import Corrector, Decision, Engine
from .weights import Form, Variable

DPM = Paper("2211.01095", "DPM-Solver++: Fast Solver for Guided Sampling", "DPM-Solver++")
DEIS = Paper("2204.13902", "Fast Sampling of Diffusion Models with Exponential Integrator", "DEIS")
UNIPC = Paper("2302.04867", "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling", "UniPC")
SA = Paper("2309.05019", "SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models", "SA-Solver")
PNDM = Paper("2202.09778", "Pseudo Numerical Methods for Diffusion Models on Manifolds", "PNDM")


class Multistep(Engine):
    """The same decision at every step; the order rises with the history and stays to the end."""

    form: ClassVar[Form] = "data"
    variable: ClassVar[Variable] = "lam"
    depth: ClassVar[int]
    """guesses in the polynomial"""
    corrector: ClassVar[Corrector] = "none"
    churn: ClassVar[float] = 0.0

    def decide(self, path: Path, stages: tuple[Stage, ...]) -> tuple[Decision, ...]:
        return tuple(self.decision(stage, i) for i, stage in enumerate(stages))

    def decision(self, stage: Stage, i: int) -> Decision:
        return Decision(self.form, self.variable, self.depth, corrector=self.corrector, churn=self.churn)


@solver("dpm3m", DPM)
class DPM3M(Multistep):
    """DPM-Solver++ 3M with the whole second difference: third order from three guesses, one call a step."""

    order: ClassVar[int] = 3
    depth: ClassVar[int] = 3


@solver("dpm2m_sde", DPM)
class DPM2MSDE(Multistep):
    """SDE-DPM-Solver++ 2M: the stochastic flow, guesses interpolated by a line in log-SNR."""

    order: ClassVar[int] = 1
    depth: ClassVar[int] = 2
    churn: ClassVar[float] = 1.0
    stochastic: ClassVar[bool] = True


@solver("dpm3m_sde", DPM)
class DPM3MSDE(DPM2MSDE):
    """SDE-DPM-Solver++ 3M: the stochastic flow, guesses interpolated by a parabola in log-SNR."""

    depth: ClassVar[int] = 3


@solver("deis", DEIS)
class Deis(Multistep):
    """DEIS tAB: the noise guess is a cubic in time through four guesses, one call a step."""

    order: ClassVar[int] = 4
    depth: ClassVar[int] = 4
    form: ClassVar[Form] = "noise"
    variable: ClassVar[Variable] = "time"


@solver("deis_log", DEIS)
class DeisLog(Deis):
    """DEIS log-rho: the noise guess is a cubic in log-SNR."""

    variable: ClassVar[Variable] = "lam"


@solver("deis_rho", DEIS)
class DeisRho(Deis):
    """DEIS rhoAB: the noise guess is a cubic in sigma / alpha, which is variable-step Adams-Bashforth of order four."""

    variable: ClassVar[Variable] = "rho"


@solver("adams2", DEIS)
class Adams2(DeisRho):
    """Variable-step Adams-Bashforth of order two in sigma / alpha (iPNDM_v)."""

    order: ClassVar[int] = 2
    depth: ClassVar[int] = 2


@solver("adams3", DEIS)
class Adams3(DeisRho):
    """Variable-step Adams-Bashforth of order three in sigma / alpha (iPNDM_v)."""

    order: ClassVar[int] = 3
    depth: ClassVar[int] = 3


@solver("ipndm", PNDM, DEIS)
class Ipndm(DeisRho):
    """iPNDM: Adams-Bashforth's weights of even steps: fourth order where sigma / alpha is even, else second."""

    SHARES: ClassVar[tuple[tuple[float, ...], ...]] = (
        (1.0,),
        (3 / 2, -1 / 2),
        (23 / 12, -16 / 12, 5 / 12),
        (55 / 24, -59 / 24, 37 / 24, -9 / 24),
    )

    def decision(self, stage: Stage, i: int) -> Decision:
        shares = self.SHARES[min(i, self.depth - 1)]
        return Decision(self.form, self.variable, len(shares), shares=shares)


@solver("unipc2", UNIPC)
class UniPC2(Multistep):
    """UniPC-2: a second-order step, corrected by the next guess at no further call; B(h) = e^h - 1."""

    order: ClassVar[int] = 2
    depth: ClassVar[int] = 2
    corrector: ClassVar[Corrector] = "bh2"


@solver("unipc3", UNIPC)
class UniPC3(UniPC2):
    """UniPC-3: a third-order step, corrected by the next guess at no further call; B(h) = e^h - 1."""

    order: ClassVar[int] = 3
    depth: ClassVar[int] = 3


@solver("unipc2_bh1", UNIPC)
class UniPC2H(UniPC2):
    """UniPC-2 with B(h) = h."""

    corrector: ClassVar[Corrector] = "bh1"


@solver("unipc3_bh1", UNIPC)
class UniPC3H(UniPC3):
    """UniPC-3 with B(h) = h, which differs from ``unipc3`` in its first steps alone."""

    corrector: ClassVar[Corrector] = "bh1"


@solver("sa", SA)
class SASolver(Multistep):
    """SA-Solver: Adams steps of the stochastic flow, corrected, with noise where sigma / alpha is in (0.05, 1]."""

    order: ClassVar[int] = 1
    depth: ClassVar[int] = 3
    corrector: ClassVar[Corrector] = "exact"
    churn: ClassVar[float] = 1.0
    stochastic: ClassVar[bool] = True

    def decision(self, stage: Stage, i: int) -> Decision:
        on = 0.05 * stage.alpha_t < stage.sigma_t <= stage.alpha_t
        return Decision(self.form, self.variable, self.depth, corrector="exact", churn=self.churn if on else 0.0)


@solver("adams_moulton", SA)
class AdamsMoulton(Multistep):
    """SA-Solver without noise: third-order Adams steps in log-SNR, each corrected by the next guess."""

    order: ClassVar[int] = 3
    depth: ClassVar[int] = 3
    corrector: ClassVar[Corrector] = "exact"


@solver("ancestral", Paper("2006.11239", "Denoising Diffusion Probabilistic Models", "DDPM"))
class Ancestral(DPM2MSDE):
    """DDPM's ancestral step between any two levels: the first-order step of the stochastic flow."""

    depth: ClassVar[int] = 1
