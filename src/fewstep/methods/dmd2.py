"""DMD2: distribution matching with a critic that keeps up, an adversary, and several steps."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..adapters import LoraOptions, adapted, options_of
from ..cond import join
from ..denoiser import Denoiser, Guided
from ..losses import distance, generator_loss, squared_error, stopped_pull
from ..method import Batch, Loss, Method, PairOptions
from ..part import Part
from ..path import NoiseSampler, Path, karras_time, normal
from ..registry import Paper, method
from ..rng import Source
from ..student import Student, trainable_copy
from .denoising import Weight, level_weight
from .families.score_gap import (
    Adversary,
    Divergence,
    GanOptions,
    fisher,
    gap,
    one_in,
    ratio_weight,
    rollout,
    same_path,
    still,
)


class DMD2Options(Part):
    critic_turns: int = Field(5, ge=1, description="critic updates before each student update (TTUR)")
    levels: NoiseSampler = Field(NoiseSampler(kind="karras", low=0.02, high=0.98), description="where laws are matched")
    critic_levels: NoiseSampler = Field(NoiseSampler(kind="log_normal", std=1.2), description="where the critic learns")
    critic_weight: Weight = Field("edm", description="of the critic's squared error in the clean sample")
    data_std: float = Field(1.0, gt=0, description="spread of the data, for the critic's weight")
    gap: Literal["kl", "fisher"] = Field(
        "kl",
        description="descend the divergence itself, or the distance of the scores (SIM): keeps more modes, costs more",
    )
    fisher_c: float = Field(0.01, ge=0, description="pseudo-Huber constant of the scores' distance; 0: squares")
    normalise: bool = Field(True, description="divide the gap by the size of the teacher's error")
    divergence: Divergence = Field("reverse_kl", description="others weigh by the adversary's density ratio")
    guidance: float = Field(1.0, ge=0, description="scale on the teacher's guess alone")
    gan: GanOptions | None = Field(None, description="an adversary on noised samples; None: off")
    pairs: PairOptions | None = Field(None, description="noise-image pairs to regress on beside the match")
    pairs_weight: float = Field(0.25, ge=0, description="of the pairs' distance beside the match")
    pairs_distance: Literal["huber", "l2", "l1"] = Field(
        "l2", description="huber is of the whole sample, the others means"
    )
    huber_c: float = Field(0.24, ge=0, description="of the pairs' huber: below this length of the error, quadratic")
    critic_lora: LoraOptions | Literal["student", "off"] = Field(
        "student", description="the critic's adapters: a table, the student's own, or off for a full copy"
    )
    start: float | None = Field(None, gt=0, description="time of the first step; None: the path's end")
    steps: int = Field(1, ge=1, description="steps that the student takes")
    times: tuple[float, ...] | None = Field(None, description="their times; None: even on the rho = 7 grid from start")


class Critic(nn.Module):
    """The denoiser of the student's own samples, and the adversary's head: one player."""

    def __init__(self, denoiser: Denoiser, adversary: Adversary | None) -> None:
        super().__init__()
        self.denoiser, self.adversary = denoiser, adversary

    def forward(self, *args: Any) -> Any:
        return self.denoiser(*args)


@method(
    "dmd2",
    Paper("2311.18828", "One-step Diffusion with Distribution Matching Distillation", "DMD"),
    Paper("2405.14867", "Improved Distribution Matching Distillation for Fast Image Synthesis", "DMD2"),
    tier="stable",
    level="small",
)
class DMD2(Method):
    """Student and critic play in turns; the teacher never moves.

    Student: descend ``<(D_critic(x_t) - D_teacher(x_t)) / mean|x - D_teacher|, x>``, the gradient of
    KL(student, teacher) over noise levels, plus ``softplus(-logit(x_t))``. Critic: learn to denoise the
    student's samples, and to tell them from real ones on its features. One pass of the critic serves both
    of a player's terms.
    """

    Options = DMD2Options
    players = ("student", "critic")
    guides = True

    def __init__(
        self,
        teacher: Any,
        student: Student,
        options: Part | None = None,
        *,
        critic: Denoiser | None = None,
    ) -> None:
        super().__init__(teacher, student, options)
        same_path(teacher.path, student)
        gan = self.options.gan
        if self.options.divergence != "reverse_kl" and gan is None:
            raise ValueError(f"divergence {self.options.divergence!r} needs the density ratio of an adversary: set gan")
        denoiser = self._first_critic(teacher, student) if critic is None else critic
        reads = None if gan is None else denoiser if gan.on == "critic" else teacher
        adversary = None if gan is None or reads is None else Adversary(reads, student.shape, gan, student.classes)
        self.critic = Critic(denoiser, adversary)
        self.real = teacher if self.options.guidance == 1 else Guided(teacher, self.options.guidance)

    def _first_critic(self, teacher: Any, student: Student) -> Denoiser:
        """The teacher again, as a copy or as adapters on its weights."""
        learnt = any(True for _ in teacher.parameters())  # an exact law has nothing that could learn
        wanted = self.options.critic_lora
        lora = options_of(student) if wanted == "student" else None if wanted == "off" else wanted
        first: Denoiser
        if lora is None or not learnt:
            first = trainable_copy(teacher if learnt else student.denoiser)
        else:
            first = adapted(teacher, lora).train()
        return first

    def turns(self, step: int) -> tuple[str, ...]:
        return ("critic",) * self.options.critic_turns + ("student",)

    def pairs(self) -> PairOptions | None:
        pairs: PairOptions | None = self.options.pairs
        return pairs

    def loss(self, player: str, batch: Batch, rng: Source) -> Loss:
        x = rollout(self.student, batch.noise, batch.cond, rng, player == "student", self.options.steps)
        if player == "critic":
            return self._critic(x, batch, rng)
        with still(self.critic):
            return self._student(x, batch, rng)

    def _student(self, x: Tensor, batch: Batch, rng: Source) -> Loss:
        options, path, gan = self.options, self.student.path, self.options.gan
        t = options.levels.on(path)(x, rng)
        noise = normal(x, rng)
        x_t = path.corrupt(x, t, noise)
        parts: dict[str, Tensor] = {}
        weights = {"gan": gan.student, "pairs": options.pairs_weight} if gan else {"pairs": options.pairs_weight}
        weight: Tensor | float = 1.0
        adversary = self.critic.adversary
        shared = adversary is not None and gan.on == "critic" and gan.levels is None
        through = options.gap == "fisher"
        if shared:
            fake, features = self.critic(x_t, t, batch.cond, "both")
        else:
            with torch.set_grad_enabled(through):
                fake = self.critic(x_t, t, batch.cond)
        if adversary is not None:
            if not shared:
                features = self._seen(x, t, noise, batch, rng)
            logits = adversary(features, batch.cond)
            parts["gan"] = generator_loss(logits)
            if options.divergence != "reverse_kl":
                weight = ratio_weight(options.divergence, logits)
        with torch.set_grad_enabled(through):
            real = self.real(x_t, t, batch.cond)
        if through:
            parts["match"] = weight * fisher(x, fake, real, options.fisher_c)
        else:
            parts["match"] = weight * stopped_pull(x, gap(x, fake.detach(), real, options.normalise))
        if batch.target is not None and options.pairs is not None:
            first = (
                x
                if len(self.student.times(options.steps)) == 1
                else self.student(self.student.start_scale * batch.noise, self.student.start, path.t_min, batch.cond)
            )
            parts["pairs"] = distance(options.pairs_distance, first, batch.target, options.huber_c)
        return Loss.mean(parts, weights)

    def _seen(self, x: Tensor, t: Tensor, noise: Tensor, batch: Batch, rng: Source) -> Any:
        """Features of fake samples as the adversary sees them, with a gradient to x."""
        gan = self.options.gan
        if gan.levels is not None:
            t, noise = gan.levels.on(self.student.path)(x, rng), normal(x, rng)
        reads = self.critic if gan.on == "critic" else self.teacher
        return reads(self.student.path.corrupt(x, t, noise), t, batch.cond, "features")

    def _critic(self, x: Tensor, batch: Batch, rng: Source) -> Loss:
        options, path, gan = self.options, self.student.path, self.options.gan
        t = options.critic_levels.on(path)(x, rng)
        x_t = path.corrupt(x, t, normal(x, rng))
        error = level_weight(options.critic_weight, path, t, options.data_std)
        adversary = self.critic.adversary
        if adversary is None:
            return Loss.mean({"critic": error * squared_error(self.critic(x_t, t, batch.cond), x)})
        weights = {"tell": gan.critic, "r1": gan.critic}
        u = (gan.levels or options.levels).on(path)(x, rng)
        real_t = path.corrupt(batch.data, u, normal(x, rng))
        fake_t = path.corrupt(x, u, normal(x, rng))
        cond, times = join(batch.cond, batch.cond), torch.cat([u, u])
        reads = self.critic if gan.on == "critic" else self.teacher
        with torch.set_grad_enabled(gan.on == "critic"):
            features = reads(torch.cat([real_t, fake_t]), times, cond, "features")
        parts = {
            "critic": error * squared_error(self.critic(x_t, t, batch.cond), x),
            "tell": adversary.critic_loss(features, cond),
        }
        if gan.r1 > 0 and one_in(gan.r1_every, rng):
            parts["r1"] = adversary.penalty(reads, real_t, u, batch.cond, rng)
        return Loss.mean(parts, weights)

    @classmethod
    def reads_data(cls, options: Any) -> bool:
        """Only the adversary sees real samples."""
        return options.gan is not None

    @classmethod
    def student_options(cls, options: Any, path: Path) -> dict[str, Any]:
        start = path.t_max if options.start is None else options.start
        if options.steps == 1:
            return {"start": start}
        times = options.times
        if times is None:
            parts = torch.linspace(1, 0, options.steps + 1, dtype=torch.float64)[:-1]
            times = (start, *karras_time(path, parts, high=start)[1:].tolist())
        return {"start": start, "steps": {1: (start,), options.steps: tuple(times)}, "policy": "renoise"}
