"""The game of distribution matching: a student follows the gap between teacher and critic; papers are its options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ...adapters import LoraOptions, adapted, learn, options_of
from ...cond import Cond, join
from ...denoiser import Denoiser, clock_of, guided, inner_of
from ...losses import distance, generator_loss, squared_error, stopped_pull
from ...method import Batch, Loss, Method, PairOptions
from ...part import Part
from ...path import NoiseSampler, Path, column, karras_time, normal
from ...rng import Source, uniform
from ...student import Student, frozen, trainable_copy
from ..denoising import Weight, level_weight
from .blocks import by_block, rng_of_blocks
from .diagnosis import diagnose
from .score_gap import (
    Adversary,
    Anchor,
    Divergence,
    GanOptions,
    RatioBins,
    RatioGradient,
    Stop,
    error_size,
    fisher,
    gap,
    one_in,
    phase_of,
    ratio_of,
    ratio_weight,
    rollout,
    same_path,
    still,
    weighted_fisher,
)


class BacktrackOptions(Part):
    """First the critic goes to the untrained student's law and is kept on the way; then those kept teach, in turn."""

    states: int = Field(5, ge=1, description="networks between the teacher and the law of the untrained student")
    every: int = Field(100, ge=1, description="critic updates from one to the next; the student stands still")
    interval: int = Field(200, ge=1, description="student updates under each of them, the nearest first")


class MatchingOptions(Part):
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
    fisher_a: float = Field(
        1.0, ge=0, le=2, description="of squared distances: 0.5 all of the gradient, 1 with the density held, 1.2 SiD"
    )
    match_weight: Literal["error", "none", "noise", "score"] = Field(
        "error",
        description='of a row: "error" over the teacher\'s error (DMD), "noise" alpha sigma (SwiftBrush), '
        '"score" what makes it the gap of the scores themselves',
    )
    divergence: Divergence = Field("reverse_kl", description="others weigh by the adversary's density ratio")
    ratio_gradient: RatioGradient = Field(
        "weight", description='with "fisher" and another divergence: the ratio as a weight, or its exact gradient'
    )
    ratio_range: tuple[float, float] = Field((0.1, 20.0), description="the density ratio is held in it")
    ratio_bins: int = Field(
        0, ge=0, description="noise levels in so many bins, a ratio over its bin's mean (f-distill: 10); 0: off"
    )
    ratio_decay: float = Field(0.5, ge=0, lt=1, description="of the bins' running means; 0: of each batch alone")
    guidance: float = Field(1.0, ge=0, description="scale on the teacher's guess")
    guidance_to: float | None = Field(
        None, ge=0, description="a scale for each row, drawn evenly from guidance up to this (PG-SB); None: guidance"
    )
    guide_critic: bool = Field(False, description="guide the critic's guess too, in the student's turn")
    gan: GanOptions | None = Field(None, description="an adversary on noised samples; None: off")
    backtrack: BacktrackOptions | None = Field(
        None, description="teachers on the way back from the student's law (DisBack); None: the teacher alone"
    )
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
    stop: Stop = Field(
        "clean",
        description="laws are matched from a step's clean guess, or from the next time on the flow (TDM)",
    )
    phases: int = Field(
        0, ge=0, description="networks that share the steps, each learning in a stage of its own; 0: one for all"
    )
    phase: int = Field(1, ge=1, description="the one that learns, counted from the noisiest; earlier ones are still")
    blocks: int = Field(
        0,
        ge=0,
        description="a sample is so many blocks along its first axis, each matched on its own, given the clean ones "
        "before it (ARDiT); 0: whole",
    )

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        if self.phases and not self.phase <= self.phases <= self.steps:
            raise ValueError(f"phase {self.phase} of {self.phases} in {self.steps} steps: phase <= phases <= steps")
        return self


class Critic(nn.Module):
    """The denoiser of the student's own samples, and the adversary's head: one player."""

    def __init__(self, denoiser: Denoiser, adversary: Adversary | None) -> None:
        super().__init__()
        self.denoiser, self.adversary = denoiser, adversary

    def forward(self, *args: Any) -> Any:
        return self.denoiser(*args)

    @property
    def path(self) -> Path:
        return self.denoiser.path

    def null(self, cond: Cond) -> Cond:
        return self.denoiser.null(cond)


class Matching(Method):
    """Student and critic play in turns; the teacher never moves.

    Student: descend ``<(D_critic(x_t) - D_teacher(x_t)) / mean|x - D_teacher|, x>``, the gradient of
    KL(student, teacher) over noise levels, plus ``softplus(-logit(x_t))``. Critic: learn to denoise the
    student's samples, and to tell them from real ones on its features. One pass of the critic serves both
    of a player's terms.
    """

    Options = MatchingOptions
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
        self._check(student)
        self._wake(student)
        denoiser = self._first_critic(teacher, student) if critic is None else critic
        reads = None if gan is None else denoiser if gan.on == "critic" else teacher
        adversary = None if gan is None or reads is None else Adversary(reads, student.shape, gan, student.classes)
        self.critic = Critic(denoiser, adversary)
        self.bins = RatioBins(self.options.ratio_bins, self.options.ratio_decay) if self.options.ratio_bins else None
        between = self.options.backtrack.states - 1 if self.options.backtrack else 0
        self.way = nn.ModuleList(frozen(trainable_copy(denoiser)) for _ in range(between))

    def _check(self, student: Student) -> None:
        """ValueError where options contradict each other."""
        options = self.options
        if options.divergence != "reverse_kl" and options.gan is None:
            raise ValueError(f"divergence {options.divergence!r} needs the density ratio of an adversary: set gan")
        if options.ratio_bins and options.divergence == "reverse_kl":
            raise ValueError("ratio_bins divide the density ratio, and reverse_kl reads none: name another divergence")
        if options.guidance_to is not None and not options.guidance_to > options.guidance:
            raise ValueError(f"guidance_to must lie above guidance {options.guidance:g}, got {options.guidance_to:g}")
        if options.ratio_gradient != "weight" and options.gap != "fisher":
            raise ValueError(f"ratio_gradient {options.ratio_gradient!r} is of gap 'fisher', got {options.gap!r}")
        if options.gap == "fisher" and options.fisher_a != 1 and options.fisher_c > 0:
            raise ValueError(f"fisher_a {options.fisher_a:g} is of squared distances: set fisher_c = 0")
        if options.stop == "next" and options.steps > 1 and student.policy != "ode":
            raise ValueError("stop 'next' is of a student that follows the flow between its steps, this one renoises")
        if options.stop == "next" and options.gan is not None:
            raise ValueError("stop 'next' has no clean samples for an adversary to see: leave gan off")
        if options.blocks and options.pairs is not None:
            raise ValueError("pairs are of whole samples, and blocks are made one by one: leave pairs out")
        if options.phases and student.policy != "ode":
            raise ValueError("phases are of a student that follows the flow between its steps, this one renoises")
        if 0 < options.phase < options.phases and options.gan is not None:
            raise ValueError(f"phase {options.phase} of {options.phases} has no clean samples: leave gan to the last")
        if options.phases and options.phase > 1 and options.pairs is not None:
            raise ValueError("pairs are of the first step, whose network stands still in later phases")

    def _wake(self, student: Student) -> None:
        """Let the network of this phase learn alone; ValueError where the student's do not share its steps so."""
        options = self.options
        if not options.phases:
            return
        experts = experts_of(student.denoiser)
        if options.phases == 1 and not experts:
            return
        asked = [experts.index(_asked(student, t)) for t in student.times(options.steps)] if experts else []
        wanted = [k for k in range(options.phases) for _ in phase_of(options.steps, options.phases, k + 1)]
        if asked != wanted:
            raise ValueError(
                f"{options.phases} phases in {options.steps} steps need a student of so many networks, one for the "
                f"steps of each; its steps ask {asked or 'one network'}: make it with handovers()"
            )
        for k, expert in enumerate(experts):
            if k == options.phase - 1:
                learn(expert)
            else:
                expert.requires_grad_(False)

    def _scale(self, x: Tensor, rng: Source) -> float | Tensor:
        """The scale of guidance: one for all, or one for each row."""
        low, high = self.options.guidance, self.options.guidance_to
        return low if high is None else low + (high - low) * uniform(x, rng).to(x)

    def _first_critic(self, teacher: Any, student: Student) -> Denoiser:
        """The teacher again, as a copy or as adapters on its weights."""
        learnt = any(True for _ in teacher.parameters())  # an exact law has nothing that could learn
        wanted = self.options.critic_lora
        lora = options_of(student) if wanted == "student" else None if wanted == "off" else wanted
        first: Denoiser
        if lora is None or not learnt:
            first = trainable_copy(teacher if learnt else student.denoiser)
            if experts := experts_of(first):  # a law's critic is a network of the student's, and one is enough
                inner_of(first).net = experts[self.options.phase - 1]
        else:
            first = adapted(teacher, lora).train()
        return first

    def diagnose(self, batch: Batch, rng: Source) -> dict[str, Any]:
        return diagnose(self, batch, rng)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.way.eval()
        return self

    def turns(self, step: int) -> tuple[str, ...]:
        return ("critic",) * self.options.critic_turns + ("student",)

    def _still_steps(self) -> int:
        """Steps in which the critic goes to the untrained student's law and the student stands still."""
        back = self.options.backtrack
        return 0 if back is None else math.ceil(back.states * back.every / self.options.critic_turns)

    def _target(self, scale: float | Tensor = 1.0) -> Any:
        """Whom the student follows in this step; a network on the way is not guided: it has no use for conditions."""
        back = self.options.backtrack
        since = self.step - self._still_steps()
        left = 0 if back is None or since < 0 else back.states - 1 - since // back.interval
        return self.way[left - 1] if left > 0 else guided(self.teacher, scale)

    @torch.no_grad()
    def settle(self, step: int) -> tuple[nn.Parameter, ...]:
        if self.bins is not None:
            self.bins.settle()
        back = self.options.backtrack
        if back is not None and step < self._still_steps():
            before, after = (k * self.options.critic_turns // back.every for k in (step, step + 1))
            for k in range(before, min(after, len(self.way))):
                kept, now = self.way[k].state_dict(keep_vars=True), self.critic.denoiser.state_dict(keep_vars=True)
                for name, value in kept.items():
                    if value is not now[name]:  # weights under adapters are everybody's
                        value.copy_(now[name])
        return ()

    def loss(self, player: str, batch: Batch, rng: Source) -> Loss:
        options = self.options
        if player == "student" and self.step < self._still_steps():
            return Loss.mean({"still": batch.noise.new_zeros(1, requires_grad=True)})
        if options.blocks:
            batch, rng = by_block(batch, options.blocks), rng_of_blocks(rng, options.blocks)
        anchor = rollout(
            self.student, batch.noise, batch.cond, rng, player == "student", options.steps, options.stop, self._steps()
        )
        if player == "critic":
            return self._critic(anchor, batch, rng)
        with still(self.critic):
            return self._student(anchor, batch, rng)

    def _steps(self) -> range | None:
        """The steps of this phase."""
        options = self.options
        return phase_of(options.steps, options.phases, options.phase) if options.phases else None

    def _student(self, anchor: Anchor, batch: Batch, rng: Source) -> Loss:
        options, path, gan = self.options, self.student.path, self.options.gan
        x = anchor.x
        t = anchor.above(path, options.levels.on(path)(x, rng))
        noise = normal(x, rng)
        x_t, clean = anchor.noised(path, t, noise)
        scale = self._scale(x, rng)
        parts: dict[str, Tensor] = {}
        weights = {"gan": gan.student, "pairs": options.pairs_weight} if gan else {"pairs": options.pairs_weight}
        adversary, ratio, features = self.critic.adversary, None, None
        target = self._target(scale)
        alike = adversary is not None and gan.levels is None  # sees what is matched: one pass serves both terms
        through = options.gap == "fisher"
        if alike and gan.on == "critic" and not options.guide_critic:
            fake, features = self.critic(x_t, t, batch.cond, "both")
        else:
            with torch.set_grad_enabled(through):
                fake = guided(self.critic, scale if options.guide_critic else 1.0)(x_t, t, batch.cond)
        if alike and gan.on == "teacher" and target is self.teacher:
            real, features = target(x_t, t, batch.cond, "both")
        else:
            with torch.set_grad_enabled(through):
                real = target(x_t, t, batch.cond)
        if adversary is not None:
            if features is None:
                features = self._seen(x, t, noise, batch, rng)
            logits = adversary(features, batch.cond)
            parts["gan"] = generator_loss(logits)
            if options.divergence != "reverse_kl":
                ratio = ratio_of(logits, *options.ratio_range)
                if self.bins is not None:
                    ratio = self.bins(ratio, path.straight(t))
        parts["match"] = self._match(anchor, x_t, clean, t, fake, real, ratio)
        if batch.target is not None and options.pairs is not None:
            first = (
                x
                if len(self.student.times(options.steps)) == 1
                else self.student(self.student.start_scale * batch.noise, self.student.start, path.t_min, batch.cond)
            )
            parts["pairs"] = distance(options.pairs_distance, first, batch.target, options.huber_c)
        return Loss.mean(parts, weights)

    def _match(
        self, anchor: Anchor, x_t: Tensor, clean: Tensor, t: Tensor, fake: Tensor, real: Tensor, ratio: Tensor | None
    ) -> Tensor:
        """The matching loss of each row."""
        options = self.options
        factor = self._factor(anchor, t)
        if options.gap == "kl":
            direction = gap(anchor.guess, fake.detach(), real, options.match_weight == "error")
            if factor is not None:
                direction = column(factor, direction) * direction
            pull = stopped_pull(anchor.x, direction)
            return pull if ratio is None else ratio_weight(options.divergence, ratio) * pull
        if ratio is not None and options.ratio_gradient != "weight":
            loss = weighted_fisher(x_t, clean, fake, real, ratio, options.divergence, options.ratio_gradient)
        else:
            loss = fisher(clean, fake, real, options.fisher_c, options.fisher_a)
            if ratio is not None:
                loss = ratio_weight(options.divergence, ratio) * loss
            if options.fisher_c > 0:  # over its own length already
                return loss
        if factor is not None:
            return factor * loss
        if options.match_weight == "error":
            return loss / error_size(anchor.guess, real).detach() / real[0].numel()
        return loss

    def _factor(self, anchor: Anchor, t: Tensor) -> Tensor | None:
        """The weight of each row that its level alone says: [batch]; None where there is none.

        ``score``: ``alpha / sigma^2`` makes a gap of guesses one of scores; ``keep`` takes it back to the anchor.
        """
        kind, path = self.options.match_weight, self.student.path
        if kind not in ("noise", "score"):
            return None
        coefs = path.coefs(t)
        if kind == "noise":
            return (coefs.alpha * coefs.sigma).to(anchor.x)
        return (coefs.alpha / coefs.sigma**2).to(anchor.x) * anchor.keep(path, t).to(anchor.x)

    def _seen(self, x: Tensor, t: Tensor, noise: Tensor, batch: Batch, rng: Source) -> Any:
        """Features of fake samples as the adversary sees them, with a gradient to x."""
        gan = self.options.gan
        if gan.levels is not None:
            t, noise = gan.levels.on(self.student.path)(x, rng), normal(x, rng)
        reads = self.critic if gan.on == "critic" else self.teacher
        return reads(self.student.path.corrupt(x, t, noise), t, batch.cond, "features")

    def _critic(self, anchor: Anchor, batch: Batch, rng: Source) -> Loss:
        options, path, gan = self.options, self.student.path, self.options.gan
        x = anchor.x
        t = anchor.above(path, options.critic_levels.on(path)(x, rng))
        x_t, clean = anchor.noised(path, t, normal(x, rng))
        error = level_weight(options.critic_weight, path, t, options.data_std) * anchor.share(path, t)
        adversary = self.critic.adversary
        if adversary is None:
            return Loss.mean({"critic": error * squared_error(self.critic(x_t, t, batch.cond), clean)})
        weights = {"tell": gan.critic, "r1": gan.critic}
        u = (gan.levels or options.levels).on(path)(x, rng)
        real_t = path.corrupt(batch.data, u, normal(x, rng))
        fake_t = path.corrupt(x, u, normal(x, rng))
        cond, times = join(batch.cond, batch.cond), torch.cat([u, u])
        reads = self.critic if gan.on == "critic" else self.teacher
        with torch.set_grad_enabled(gan.on == "critic"):
            features = reads(torch.cat([real_t, fake_t]), times, cond, "features")
        parts = {
            "critic": error * squared_error(self.critic(x_t, t, batch.cond), clean),
            "tell": adversary.critic_loss(features, cond),
        }
        if gan.r1 > 0 and one_in(gan.r1_every, rng):
            parts["r1"] = adversary.penalty(reads, real_t, u, batch.cond, rng)
        return Loss.mean(parts, weights)

    @classmethod
    def reads_data(cls, options: Any) -> bool:
        """The adversary sees real samples, and a block the real ones before it."""
        return options.gan is not None or options.blocks > 0

    @classmethod
    def handovers(cls, options: Any, path: Path) -> tuple[float, ...]:
        if options.phases < 2:
            return ()
        times = cls.student_options(options, path)["steps"][options.steps]
        firsts = [phase_of(options.steps, options.phases, k).start for k in range(2, options.phases + 1)]
        return tuple((times[i - 1] + times[i]) / 2 for i in firsts)

    @classmethod
    def student_options(cls, options: Any, path: Path) -> dict[str, Any]:
        start = path.t_max if options.start is None else options.start
        if options.steps == 1:
            return {"start": start}
        times = options.times
        if times is None:
            parts = torch.linspace(1, 0, options.steps + 1, dtype=torch.float64)[:-1]
            times = (start, *karras_time(path, parts, high=start)[1:].tolist())
        if options.stop == "next" or options.phases:  # its first guess alone is no sample
            return {"start": start, "steps": {options.steps: tuple(times)}, "policy": "ode"}
        return {"start": start, "steps": {1: (start,), options.steps: tuple(times)}, "policy": "renoise"}


def experts_of(denoiser: Any) -> Sequence[nn.Module]:
    """The networks of a student that has several (``nets.Experts``); none for another."""
    return list(getattr(getattr(inner_of(denoiser), "net", None), "experts", ()))


def _asked(student: Student, t: float) -> nn.Module:
    """The network of a student of several that answers at t."""
    inner = inner_of(student.denoiser)
    time = clock_of(inner.clock, inner.path, torch.tensor([t], dtype=torch.float64))
    return cast(nn.Module, inner.net.asked(time))
