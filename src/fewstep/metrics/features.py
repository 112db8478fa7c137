"""The networks that measure: features and, where there are labels, a classifier.

Nothing that learns or chooses may read the network that measures. Choices use a second one, of another
architecture and another seed (``purpose="select"``).

    python -m fewstep.metrics.features --digits OUT     trains the shipped digits classifier again
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import Failed, Refused
from ..part import Part
from ..rng import mix

if TYPE_CHECKING:
    from ..tasks import Task

Purpose = Literal["measure", "select"]
Design = Literal["plain", "wide"]
WIDTH = 64
CHUNK = 512
LARGEST = 64
"""Side in pixels above which pictures are averaged down before they are looked at."""
VIEWS = 60_000
"""Training pictures that a classifier sees where there are more than it needs 40 epochs for."""
SHIPPED = "digits_classifier.safetensors"


class Features(ABC):
    """Samples in the task's range in, features out.

    Attributes
    ----------
    name: of the kind, for people. ``hash``: SHA-256 of the weights and the architecture.
    notes: how it was made: data, seed, test accuracy.
    """

    name: str
    hash: str
    notes: dict[str, Any]

    @abstractmethod
    def both(self, samples: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features [n, width] in float64 and the labels [n] that a classifier sees, None without one."""

    def __call__(self, samples: Tensor) -> Tensor:
        return self.both(samples)[0]

    def predict(self, samples: Tensor) -> Tensor | None:
        return self.both(samples)[1]


# -- classifiers ------------------------------------------------------------------------------


class ClassifierConfig(Part):
    """What a measuring network looks like.

    ``plain``: convolutions 32, 32, pool, 64, pool, a layer of 64 with ReLU (the features), the classes.
    ``wide``: 24 (5x5), 48, pool, 48, a layer of 64, with GELU: unlike the first in every layer. ``reduce`` is the
    stride of the first convolution; pictures above ``side`` pixels are averaged down to it first; blocks of
    ``patch`` x ``patch`` pixels that were moved to channels are moved back.
    """

    design: Design = "plain"
    shape: tuple[int, int, int]
    classes: int
    side: int
    reduce: int
    patch: int = 1

    @classmethod
    def of(cls, shape: tuple[int, ...], classes: int, design: Design = "plain", patch: int = 1) -> ClassifierConfig:
        channels, height, width = shape[0] // patch**2, shape[1] * patch, shape[2] * patch
        side = min(max(height, width), LARGEST)
        reduce = 1
        while side > 16 * reduce:
            reduce *= 2
        return cls(
            design=design, shape=(channels, height, width), classes=classes, side=side, reduce=reduce, patch=patch
        )


class Classifier(nn.Module):
    """A small convolutional classifier: logits, or with ``features`` its last hidden layer [n, 64]."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        first, second, third = (32, 32, 64) if config.design == "plain" else (24, 48, 48)
        kernel = 2 * config.reduce + (1 if config.design == "plain" else 3)
        self.conv1 = nn.Conv2d(config.shape[0], first, kernel, stride=config.reduce, padding=kernel // 2)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1)
        grid = 2 if config.side <= 16 else 3
        self.cells = grid if config.design == "plain" else 2 * grid
        self.hidden = nn.Linear(third * self.cells**2, WIDTH)
        self.answer = nn.Linear(WIDTH, config.classes)

    def features(self, x: Tensor) -> Tensor:
        x = whole_picture(x, self.config.patch, self.config.side)
        if self.config.design == "plain":
            x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2, ceil_mode=True)
            x = F.adaptive_max_pool2d(F.relu(self.conv3(x)), self.cells)
        else:
            x = F.avg_pool2d(F.gelu(self.conv2(F.gelu(self.conv1(x)))), 2, ceil_mode=True)
            x = F.adaptive_avg_pool2d(F.gelu(self.conv3(x)), self.cells)
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.answer(self.features(x))
        return logits


def whole_picture(x: Tensor, patch: int, side: int) -> Tensor:
    """Pixels back from channels, and averaged down so that no side is above ``side``."""
    x = F.pixel_shuffle(x, patch) if patch > 1 else x
    height, width = x.shape[2:]
    largest = max(height, width)
    if largest > side:
        x = F.adaptive_avg_pool2d(x, (max(1, height * side // largest), max(1, width * side // largest)))
    return x


def train_classifier(
    data: Tensor,
    labels: Tensor,
    classes: int,
    *,
    epochs: int | None = None,
    seed: int = 0,
    design: Design = "plain",
    patch: int = 1,
    tell: Callable[[int, int], None] | None = None,
) -> Classifier:
    """A classifier of data [n, C, H, W] in the task's range: the same on every call with the same arguments.

    AdamW in one cycle up to 4e-3 and down to 0, label smoothing 0.1, shifts by up to a pixel, noise of 0.1. ``epochs``
    None: 40, or fewer where that is more than 60 000 pictures; above 60 000 pictures a fixed draw of them.
    ``tell(done, total)`` hears of every epoch.
    """
    if data.ndim != 4 or len(data) != len(labels):
        raise Refused(
            f"a classifier takes pictures [n, C, H, W] and n labels, got {list(data.shape)} and {len(labels)}"
        )
    rng = torch.Generator().manual_seed(mix(seed, "classifier", design))
    if len(data) > VIEWS:
        pick = torch.randperm(len(data), generator=rng)[:VIEWS]
        data, labels = data[pick], labels[pick]
    count = len(data)
    epochs = max(1, min(40, VIEWS // count)) if epochs is None else epochs
    batch = 64 if count < 5000 else 128
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(seed, "weights", design))
        net = Classifier(ClassifierConfig.of(tuple(data.shape[1:]), classes, design, patch))
    optimiser = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=1e-2)
    total = epochs * -(-count // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=total)
    blank = float(data.amin())
    for epoch in range(epochs):
        for pick in torch.randperm(count, generator=rng).split(batch):
            x = shifted(data[pick], patch, blank, rng)
            x = x + 0.1 * torch.randn(x.shape, generator=rng)
            loss = F.cross_entropy(net(x), labels[pick], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if schedule.last_epoch < total - 1:
                schedule.step()
        if tell is not None:
            tell(epoch + 1, epochs)
    return net.eval().requires_grad_(False)


def shifted(x: Tensor, patch: int, blank: float, rng: torch.Generator) -> Tensor:
    """Every picture moved by -1, 0 or 1 pixels along each axis; what enters is blank, or in colour its edge."""
    x = F.pixel_shuffle(x, patch) if patch > 1 else x
    n, channels, height, width = x.shape
    wide = F.pad(x, (1, 1, 1, 1), value=blank) if channels == 1 else F.pad(x, (1, 1, 1, 1), mode="replicate")
    down, right = (torch.randint(0, 3, (n, 1), generator=rng) for _ in range(2))
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    wide = wide.gather(2, rows[:, None, :, None].expand(-1, channels, -1, width + 2))
    moved = wide.gather(3, columns[:, None, None, :].expand(-1, channels, height, -1))
    return F.pixel_unshuffle(moved, patch) if patch > 1 else moved


class ClassifierFeatures(Features):
    """The last hidden layer of a classifier trained on the task's own training split."""

    def __init__(self, net: Classifier, name: str, notes: dict[str, Any]) -> None:
        self.net, self.name, self.notes = net.eval(), name, notes
        self.hash = weights_hash(net.state_dict(), net.config.model_dump_json())

    def both(self, samples: Tensor) -> tuple[Tensor, Tensor | None]:
        found = [self._part(part) for part in samples.float().cpu().split(CHUNK)]
        return torch.cat([f for f, _ in found]), torch.cat([p for _, p in found])

    def _part(self, part: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            hidden = self.net.features(part)
            return hidden.double(), self.net.answer(hidden).argmax(1)

    def save(self, file: Path) -> None:
        """As safetensors, with how it was made in the metadata; whole or not at all."""
        from safetensors.torch import save_file

        about = {"config": self.net.config.model_dump_json(), "name": self.name, "notes": json.dumps(self.notes)}
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        save_file({k: v.contiguous() for k, v in self.net.state_dict().items()}, part, metadata=about)
        part.replace(file)

    @classmethod
    def load(cls, file: Path) -> ClassifierFeatures:
        """Failed where the file is damaged or none of ours."""
        from safetensors import safe_open

        try:
            with safe_open(file, framework="pt") as archive:
                about = archive.metadata() or {}
                weights = {key: archive.get_tensor(key) for key in archive.keys()}
            net = Classifier(ClassifierConfig.model_validate_json(about["config"]))
            net.load_state_dict(weights)
            return cls(net.requires_grad_(False), about["name"], json.loads(about["notes"]))
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise Failed(f"{file} is not a measuring network ({reason}): delete it, it will be made again") from None


# -- without labels, and without pictures -----------------------------------------------------


class RandomConv(Features):
    """Fixed random convolutions: means and spreads of 32 channels at three scales, 192 features.

    For pictures without labels. Blind to meaning, but sensitive to texture, contrast and structure, the same
    everywhere, and nobody can have trained against it by accident.
    """

    def __init__(self, shape: tuple[int, ...], *, seed: int = 0, patch: int = 1) -> None:
        channels = shape[0] // patch**2
        rng = torch.Generator().manual_seed(mix(seed, "random-conv"))
        self.name, self.patch = "random-conv", patch
        self.side = 32
        widths = [channels, 32, 32, 32]
        self.weights = [
            torch.randn(b, a, 3, 3, generator=rng) * (2 / (9 * a)) ** 0.5
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        ]
        self.hash = weights_hash({str(i): w for i, w in enumerate(self.weights)}, f"random-conv/1 {patch}")
        self.notes = {"seed": seed, "resize": f"averaged down to {self.side} pixels"}

    def both(self, samples: Tensor) -> tuple[Tensor, Tensor | None]:
        return torch.cat([self._part(part) for part in samples.float().cpu().split(CHUNK)]), None

    @torch.no_grad()
    def _part(self, x: Tensor) -> Tensor:
        x = whole_picture(x, self.patch, self.side)
        found = []
        for weight in self.weights:
            x = F.relu(F.conv2d(x, weight, padding=1))
            found += [x.mean((2, 3)), x.std((2, 3), correction=0)]
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return torch.cat(found, 1).double()


class Coordinates(Features):
    """A vector is its own feature; a law with classes is its own classifier."""

    def __init__(self, law: Any = None) -> None:
        self.name, self.hash, self.notes = "coordinates", hashlib.sha256(b"coordinates").hexdigest(), {}
        labelled = law is not None and getattr(law, "labels", None) is not None and bool((law.variance > 0).all())
        self.law = law if labelled else None

    def both(self, samples: Tensor) -> tuple[Tensor, Tensor | None]:
        flat = samples.flatten(1).double().cpu()
        if self.law is None:
            return flat, None
        posterior = []
        for label in range(self.law.classes):
            share = self.law.weight[self.law.labels == label].sum().log()
            cond = torch.full((len(samples),), label)
            posterior.append(self.law.log_density(samples.double().cpu(), cond=cond) + share)
        return flat, torch.stack(posterior, 1).argmax(1)


# -- which one --------------------------------------------------------------------------------


def features_for(
    task: Task,
    cache: Path | None = None,
    purpose: Purpose = "measure",
    tell: Callable[[int, int], None] | None = None,
) -> Features:
    """The features that measure samples of a task.

    Vectors: their coordinates. Pictures with labels: a classifier, on digits the shipped one, else trained
    on ``task.train`` (once: ``cache`` is a folder that keeps it, by the hash of the data). Pictures without labels:
    random convolutions. ``purpose="select"`` gives another network, for choosing recipes and checkpoints.
    """
    if purpose not in get_args(Purpose):
        raise Refused(f"unknown purpose {purpose!r}: one of {', '.join(get_args(Purpose))}")
    task = getattr(task, "pixels", task)  # of latents or of pairs: the task whose samples people see
    if len(task.shape) != 3:
        return Coordinates(task.law)
    patch = getattr(getattr(task, "options", None), "patch", 1)
    if task.classes is None or not isinstance(task.train.cond, Tensor):
        return RandomConv(task.shape, seed=0 if purpose == "measure" else 1, patch=patch)
    if task.name == "digits" and purpose == "measure":
        return shipped_digits()
    design: Design = "plain" if purpose == "measure" else "wide"
    seed = 0 if purpose == "measure" else 1
    data = fingerprint(task.train.data, task.train.cond)
    kept = None if cache is None else Path(cache) / f"classifier-{purpose}-{data[:16]}.safetensors"
    if kept is not None and kept.is_file():
        return ClassifierFeatures.load(kept)
    found = classifier_features(task, design=design, seed=seed, patch=patch, tell=tell)
    if kept is not None:
        found.save(kept)
    return found


def classifier_features(
    task: Task,
    *,
    epochs: int | None = None,
    design: Design = "plain",
    seed: int = 0,
    patch: int = 1,
    tell: Callable[[int, int], None] | None = None,
) -> ClassifierFeatures:
    """Train a classifier on a task's training split, and say how often it is right on its test split."""
    labels, classes = task.train.cond, task.classes
    if not isinstance(labels, Tensor) or classes is None:
        raise Refused(f"task {task.name!r} has no labels to train a classifier on")
    net = train_classifier(
        task.train.data, labels, classes, epochs=epochs, seed=seed, design=design, patch=patch, tell=tell
    )
    notes: dict[str, Any] = {
        "seed": seed,
        "train_count": len(task.train),
        "train_hash": fingerprint(task.train.data, labels),
    }
    found = ClassifierFeatures(net, f"{task.name}-classifier-{design}", notes)
    seen = found.predict(task.test.data)
    if isinstance(task.test.cond, Tensor) and seen is not None:
        notes["test_accuracy"] = round(float((seen == task.test.cond).double().mean()), 4)
        notes["test_count"] = len(task.test)
    return found


def shipped_digits() -> ClassifierFeatures:
    """The digits classifier that ships with the package."""
    return ClassifierFeatures.load(Path(str(files("fewstep") / "assets" / SHIPPED)))


def weights_hash(weights: dict[str, Tensor], about: str = "") -> str:
    """SHA-256 of named weights and of a description."""
    digest = hashlib.sha256(about.encode())
    for name in sorted(weights):
        digest.update(f"{name}{weights[name].dtype}{tuple(weights[name].shape)}".encode())
        digest.update(_bytes(weights[name]))
    return digest.hexdigest()


def fingerprint(*parts: Any) -> str:
    """SHA-256 of tensors, dictionaries of tensors and None."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(_bytes(part))
        elif isinstance(part, dict):
            digest.update(weights_hash(part).encode())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


def _bytes(value: Tensor) -> bytes:
    value = value.detach().cpu().contiguous()
    return value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""


def main() -> None:
    import argparse

    from ..tasks import task_named

    parser = argparse.ArgumentParser(
        prog="python -m fewstep.metrics.features", description="Train a measuring network."
    )
    parser.add_argument("--digits", type=Path, required=True, metavar="OUT", help="write the digits classifier here")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found = classifier_features(task_named("digits"), epochs=40, seed=arguments.seed)
    found.save(arguments.digits)
    print(f"{arguments.digits}: test accuracy {found.notes['test_accuracy']:.4f}, hash {found.hash[:16]}")


if __name__ == "__main__":
    main()
