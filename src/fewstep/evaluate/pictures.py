"""Grids of samples from the same noise, as PNG."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import need
from .reading import shown_reading
from .rows import Row, Sheet, Tiles, best_teacher
from .sampling import Candidate

if TYPE_CHECKING:
    from .measure import Evaluation

TILE = 40
"""Least side of a picture in a grid, in pixels; smaller ones are enlarged by a whole factor."""
PLOT = 480
SHARP = 256
"""Side up to which pictures stay lossless on a page; larger ones become JPEG of high quality."""
LARGE = 768
"""Side in pixels to which a picture of its own is brought down."""


def sheets(
    stage: Evaluation,
    candidates: list[Candidate],
    rows: tuple[Row, ...],
    hashes: dict[str, str],
    told: Tensor | None = None,
) -> tuple[dict[str, bytes], tuple[Sheet, ...]]:
    """PNG files and what they show: students, the teacher at its best few steps, in full and in one call, real data,
    the nearest training samples, and the labels ``told`` where such were read."""
    need("PIL", "evaluate")
    wanted: list[tuple[str, str, Any, int, str]] = []  # file, kind, title, calls, model hash
    for candidate in candidates:
        if candidate.model.startswith("student"):
            name = candidate.model.partition(":")[2]
            file = f"student_{_plain(name) + '_' if name else ''}{candidate.nfe}"
            wanted.append((file, "student", candidate.title, candidate.nfe, hashes.get(candidate.model, "")))
    best = best_teacher(rows)
    ends = [("teacher_best", best), ("teacher_full", next((r for r in rows if r.model == "teacher"), None))]
    ends.append(("teacher_1", next((r for r in rows if r.teacher and r.nfe == 1), None)))
    for file, row in ends:
        if row is not None and row.title not in [w[2] for w in wanted]:
            wanted.append((file, "teacher", row.title, row.nfe, hashes.get("teacher", "")))
    wanted.append(("real", "real", "Real, unseen", 0, ""))
    pictures: dict[str, bytes] = {}
    listed: list[Sheet] = []
    columns = columns_of(stage)
    for file, kind, title, calls, model in wanted:
        samples = stage.pictures[title]
        drawn = draw(stage, samples, columns)
        if drawn is None:
            continue
        path = f"samples/{file}.png"
        if path in pictures:
            path = f"samples/{file}_{len(pictures)}.png"
        pictures[path] = png(
            drawn, {"model": model, "seed": str(stage.seed), "steps": str(calls), "made": kind != "real"}
        )
        listed.append(Sheet(file=path, title=title, kind=kind, alt=f"{len(samples)} samples", columns=columns))
    near = neighbours(stage, [w for w in wanted if w[1] == "student"])
    if near is not None:
        pictures["samples/nearest.png"] = png(near, {"seed": str(stage.seed), "made": True})
        listed.append(
            Sheet(
                file="samples/nearest.png",
                title="Each sample of the student above its nearest training sample",
                kind="nearest",
                alt="pairs of a generated and a training sample",
                columns=10,
            )
        )
    read = None if told is None else shown_reading(stage.task, stage.test, told)
    if read is not None:
        found, title, across = read
        pictures["samples/reading.png"] = png(tiled(found, across), {"made": False})
        about = f"{len(found)} pictures"
        listed.append(Sheet(file="samples/reading.png", title=title, kind="reading", alt=about, columns=across))
    return pictures, tuple(listed)


def tile_files(
    chosen: list[tuple[Any, Candidate]], tiles: dict[str, Tensor], words: list[str], hashes: dict[str, str], seed: int
) -> tuple[dict[str, bytes], Tiles]:
    """A PNG for every picture uint8 [n, 1 or 3, h, w] of every column, and what they show."""
    need("PIL", "evaluate")
    pictures: dict[str, bytes] = {}
    files: list[list[str]] = [[] for _ in words]
    for kind, candidate in chosen:
        model = hashes["student" if kind == "student" else "teacher"]
        for i, tile in enumerate(tiles[candidate.title]):
            name = f"samples/tiles/{i:03d}_{kind}.png"
            about = {"model": model, "seed": str(seed), "steps": str(candidate.nfe), "made": True}
            pictures[name] = png(smaller(tile.permute(1, 2, 0), LARGE), about)
            files[i].append(name)
    kinds, titles = tuple(kind for kind, _ in chosen), tuple(candidate.title for _, candidate in chosen)
    return pictures, Tiles(kinds=kinds, titles=titles, prompts=tuple(words), files=tuple(map(tuple, files)))


def smaller(picture: Tensor, side: int) -> Tensor:
    """uint8 [h, w, c] with no side above ``side``."""
    import numpy as np
    from PIL import Image

    height, width, channels = picture.shape
    if max(height, width) <= side:
        return picture
    pixels = picture.numpy()
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).reshape(image.height, image.width, channels)


def thumbnail(data: bytes, side: int) -> str | None:
    """A PNG as a data address of a picture with no side above ``side``; None for what is no picture of ours."""
    from PIL import Image

    small = opened(data)
    if small is None:
        return None
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return address([small])[0]


def address(images: list[Any]) -> list[str]:
    """Pictures as data addresses of equal length, without metadata: small ones lossless, larger ones JPEG.

    The shorter ones are filled up behind their end, so that a length tells nothing.
    """
    from PIL import Image

    side = max(max(image.size) for image in images)
    kind, options = ("png", {"optimize": True}) if side <= SHARP else ("jpeg", {"quality": 95, "subsampling": 0})
    encoded = []
    for image in images:
        out = io.BytesIO()
        Image.frombytes(image.mode, image.size, image.tobytes()).save(out, kind, **options)
        encoded.append(out.getvalue())
    size = max(map(len, encoded))
    return [f"data:image/{kind};base64,{base64.b64encode(d.ljust(size, bytes(1))).decode()}" for d in encoded]


def opened(data: bytes) -> Any:
    """A PNG of a size that we write; None for anything else."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            return None if max(image.size) > 4096 else image.convert("L" if image.mode == "L" else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def columns_of(stage: Evaluation) -> int:
    classes = stage.task.classes
    return classes if stage.labels is not None and classes and classes <= 10 else 10


def draw(stage: Evaluation, samples: Tensor, columns: int) -> Tensor | None:
    """A grid of pictures, or of vectors a scatter of their first two coordinates: uint8 [H, W, 1 or 3]."""
    shown = stage.task.pictures(samples)
    if shown is not None:
        return tiled(shown, columns)
    if len(stage.task.shape) == 1:
        return scatter(samples, stage.real.flat)
    return None


def tiled(shown: Tensor, columns: int) -> Tensor:
    """Pictures uint8 [n, h, w, c] side by side, enlarged without smoothing, with a line of white between."""
    factor = max(1, -(-TILE // shown.shape[1]))
    shown = shown.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    n, h, w, c = shown.shape
    lines, gap = -(-n // columns), 2
    sheet = torch.full((lines * (h + gap) - gap, columns * (w + gap) - gap, c), 255, dtype=torch.uint8)
    for i in range(n):
        top, left = (i // columns) * (h + gap), (i % columns) * (w + gap)
        sheet[top : top + h, left : left + w] = shown[i]
    return sheet


def scatter(samples: Tensor, reference: Tensor | None) -> Tensor:
    """Where samples lie, dark on white, in the frame of the reference; one coordinate is spread by its density."""
    frame = samples if reference is None else reference
    points, frame = _plane(samples), _plane(frame)
    low, high = frame.min(0).values, frame.max(0).values
    margin = 0.15 * (high - low).clamp(min=1e-6)
    scaled = (points - low + margin) / (high - low + 2 * margin)
    inside = ((scaled >= 0) & (scaled < 1)).all(1)
    cell = (scaled[inside] * PLOT).long()
    sheet = torch.zeros(PLOT, PLOT)
    flat = (PLOT - 1 - cell[:, 1]) * PLOT + cell[:, 0]
    sheet.view(-1).index_add_(0, flat, torch.ones(len(flat)))
    dots = torch.nn.functional.conv2d(sheet[None, None], torch.ones(1, 1, 3, 3), padding=1)[0, 0]
    ink = (1 - (-0.7 * dots).exp()).unsqueeze(2)
    colour = torch.tensor([24.0, 78.0, 158.0])
    return (255 * (1 - ink) + colour * ink).round().to(torch.uint8)


def _plane(points: Tensor) -> Tensor:
    points = points.flatten(1).float()
    if points.shape[1] >= 2:
        return points[:, :2]
    rank = torch.arange(len(points), dtype=torch.float32) / max(1, len(points) - 1)
    return torch.stack([points[:, 0], rank], 1)


def neighbours(stage: Evaluation, students: list[tuple[str, str, Any, int, str]]) -> Tensor | None:
    """Ten samples of the first student, and below each its nearest training sample."""
    from ..metrics.distances import nearest

    if not students or not len(stage.train):
        return None
    samples = stage.pictures[students[0][2]][:10]
    shown = stage.task.pictures(samples)
    if shown is None:
        return None
    _, where = nearest(samples.flatten(1).float(), stage.train.data.flatten(1).float())
    found = stage.task.pictures(stage.train.data[where])
    return None if found is None else tiled(torch.cat([shown, found]), len(samples))


def png(picture: Tensor, about: dict[str, Any]) -> bytes:
    """uint8 [H, W, 1 or 3] as PNG; generated ones say in their metadata what made them."""
    from PIL import Image, PngImagePlugin

    pixels = picture.numpy()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", "fewstep")
    if about.pop("made"):
        info.add_text("DigitalSourceType", "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia")
        for key, value in about.items():
            info.add_text(key, value)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True, pnginfo=info)
    return out.getvalue()


def _plain(name: str) -> str:
    """A name that is safe in a file name."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)[:40] or "model"
