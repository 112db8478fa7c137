"""Which divergences find modes that the student starts without: a picture and a table, from exact scores and ratios.

    python benchmarks/modes.py [--seeds 3] [--picture docs/methods/modes.png]

The teacher is a mixture of four Gaussians with weights 0.4, 0.3, 0.2, 0.1; the student is a cloud of particles, all in
one of the modes. No network is trained: the critic is the exact posterior mean of the particles' own law, the ratio the
exact one of the two noised laws, so that what is seen is the divergence and nothing else. The loss is the engine's.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.denoiser import Denoiser
from fewstep.method import Batch
from fewstep.methods.families.matching import Critic, Matching, MatchingOptions
from fewstep.methods.families.score_gap import GanOptions
from fewstep.path import Exploding, NoiseSampler
from fewstep.rng import Rng
from fewstep.student import Student
from fewstep.teachers import FiniteSet, Mixture

STEPS = 250
WEIGHTS = (0.4, 0.3, 0.2, 0.1)
ROWS: dict[str, dict[str, Any]] = {
    "reverse KL": {"divergence": "reverse_kl"},
    "Jensen-Shannon": {"divergence": "jensen_shannon"},
    "Jeffreys": {"divergence": "jeffreys"},
    "forward KL": {"divergence": "forward_kl"},
    "Fisher, reverse KL": {"gap": "fisher", "fisher_a": 0.5, "fisher_c": 0.0},
    "Fisher, forward KL": {
        "gap": "fisher", "fisher_a": 0.5, "fisher_c": 0.0, "divergence": "forward_kl", "ratio_gradient": "exact",
    },
}  # fmt: skip


class Particles(Denoiser):
    """Row k of every batch is a point that learns, whatever the noise: a student of one step."""

    def __init__(self, points: Tensor, path: Exploding) -> None:
        super().__init__()
        self.points, self.path = nn.Parameter(points.clone()), path

    def forward(self, x: Tensor, t: Any, cond: Any = None, want: str = "x0", s: Any = None) -> Tensor:
        return self.path.convert(self.points, x, t, "x0", want)


class Watching(Denoiser):
    """The exact critic of particles, as they are now; its one feature is the logarithm of the exact density ratio."""

    taps = ("log ratio",)

    def __init__(self, watched: Particles, teacher: Mixture) -> None:
        super().__init__()
        self.watched, self.path, self.teacher = [watched], watched.path, [teacher]
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Any, cond: Any = None, want: str = "x0", s: Any = None) -> Any:
        law = FiniteSet(self.watched[0].points.detach().clone(), path=self.path)
        if want not in ("both", "features"):
            return law(x, t, want=want)
        features = [(self.teacher[0].log_density(x, t) - law.log_density(x, t))[:, None]]
        return features if want == "features" else (law(x, t), features)


class Ratio(nn.Module):
    """An adversary that knows: its logit is the logarithm of the ratio."""

    def forward(self, features: list[Tensor], cond: Any = None) -> Tensor:
        return features[0]


def fixture(low: float, high: float) -> Mixture:
    """The mixture, looked at on noise levels from ``low`` to ``high``."""
    angle = torch.arange(4, dtype=torch.float64) * math.pi / 2
    centres = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    return Mixture(WEIGHTS, centres, 0.25, path=Exploding(sigma_min=low, sigma_max=high))


def moved(
    options: dict[str, Any],
    *,
    seed: int = 0,
    count: int = 150,
    steps: int = STEPS,
    rate: float = 0.1,
    low: float = 0.05,
    high: float = 2.0,
    teacher: Mixture | None = None,
) -> Tensor:
    """Where the particles end, [count, 2], that started in the heaviest mode; noise levels are log-uniform."""
    law = fixture(low, high) if teacher is None else teacher
    rng = torch.Generator().manual_seed(seed)
    start = law.mean[0] + 0.25 * torch.randn(count, 2, generator=rng, dtype=torch.float64)
    net = Particles(start, law.path)  # type: ignore[arg-type]
    given = {"gan": GanOptions(student=0.0), "ratio_range": (1e-4, 1e4), **options}
    levels = NoiseSampler(kind="karras", rho=1000.0)  # as good as even in log sigma
    game = Matching(law, Student(net, (2,)), MatchingOptions(levels=levels, **given), critic=Watching(net, law))
    game.critic = Critic(game.critic.denoiser, Ratio())  # type: ignore[arg-type]
    optimiser = torch.optim.Adam(net.parameters(), rate, (0.5, 0.99))
    noise = torch.zeros(count, 2, dtype=torch.float64)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, 2 * (1 - step / steps))
        optimiser.zero_grad()
        game.loss("student", Batch(noise, None, noise), Rng(seed, step)).total.backward()
        optimiser.step()
    return net.points.detach()


def shares(points: Tensor) -> Tensor:
    """The share of points nearest to each mode: [4]."""
    nearest = torch.cdist(points, fixture(0.05, 2.0).mean).argmin(1)
    return torch.bincount(nearest, minlength=4) / len(points)


def apart(points: Tensor) -> float:
    """Total variation between the shares and the weights of the modes."""
    return (shares(points) - torch.tensor(WEIGHTS)).abs().sum().item() / 2


def picture(found: dict[str, list[Tensor]], file: str) -> None:
    """The particles of the first seed, a square for each divergence, with the modes as circles."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(2.1 * len(found), 2.4), sharex=True, sharey=True)
    for axis, (name, clouds) in zip(axes, found.items(), strict=True):
        for centre, weight in zip(fixture(0.05, 2.0).mean, WEIGHTS, strict=True):
            axis.add_patch(plt.Circle(centre.tolist(), 0.5, color="tab:orange", alpha=0.2 + weight, linewidth=0))
        axis.scatter(*clouds[0].T.numpy(), s=2, color="tab:blue")
        axis.set(title=name, aspect="equal", xticks=[], yticks=[], xlim=(-3, 3), ylim=(-3, 3))
        axis.title.set_fontsize(8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--picture", help="write it here (needs matplotlib)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[Tensor]] = {}
    print("| divergence | share of the modes (0.4, 0.3, 0.2, 0.1) | total variation | emptiest mode |")
    print("|---|---|---|---|")
    for name, row in ROWS.items():
        found[name] = clouds = [moved(row, seed=seed, steps=options.steps) for seed in range(options.seeds)]
        mean = torch.stack([shares(points) for points in clouds]).mean(0)
        off = torch.tensor([apart(points) for points in clouds])
        spread = f" ({off.min():.2f}-{off.max():.2f})" if len(off) > 1 else ""
        least = min((shares(points) / torch.tensor(WEIGHTS)).min().item() for points in clouds)
        print(f"| {name} | {', '.join(f'{v:.2f}' for v in mean.tolist())} | {off.median():.2f}{spread} | {least:.2f} |")
    if options.picture:
        picture(found, options.picture)


if __name__ == "__main__":
    main()
