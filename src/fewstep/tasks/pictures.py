"""One picture, as it comes: turned upright, flattened, 8 bits, resized; or the reason why it cannot be read."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path as File
from typing import Any, Literal

import numpy as np

from ..errors import Refused

MAX_PIXELS = 100_000_000
"""Of one picture; a larger one is taken for a decompression bomb."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Whatever a file is called, it is opened as one of these: others bring decoders that start programs."""
AHEAD = 4
"""Pictures that are read or wait, for each thread."""

Background = Literal["white", "black"]


@dataclass(frozen=True)
class Shape:
    """What pictures become: ``size`` pixels a side (None: as found), 1 or 3 channels (None: as found)."""

    size: int | None = None
    channels: int | None = None
    background: Background = "white"


@dataclass(frozen=True)
class Read:
    """A picture as uint8 [height, width, 1 or 3]; None, with the reason, where it cannot be read."""

    pixels: np.ndarray | None
    reason: str = ""
    animated: bool = False


def read_picture(source: File | bytes | np.ndarray, shape: Shape, name: str) -> Read:
    """Decode a file, its bytes, or raw uint8 pixels [height, width] or [height, width, 1 or 3].

    Turned as its EXIF says; transparent parts are shown on the background; 16-bit values are scaled to 8; of an
    animation it is the first frame. Refused for a picture so large that it must be a decompression bomb, before
    any of it is decoded.
    """
    from PIL import Image

    try:
        if isinstance(source, np.ndarray):
            if source.size > 3 * MAX_PIXELS:
                raise Image.DecompressionBombError
            return Read(_shaped(_from_array(source), shape))
        if (source.stat().st_size if isinstance(source, File) else len(source)) == 0:
            return Read(None, "empty")
        with Image.open(source if isinstance(source, File) else io.BytesIO(source), formats=_known()) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            animated = bool(getattr(picture, "is_animated", False)) and picture.format != "MPO"
            return Read(_shaped(_upright(picture), shape), animated=animated)
    except Image.DecompressionBombError:
        raise Refused(f"{name} unpacks to more than {MAX_PIXELS // 10**6} million pixels: remove it") from None
    except Image.UnidentifiedImageError:
        return Read(None, "no picture")
    except PermissionError:
        return Read(None, "not ours to read")
    except Exception as error:  # a damaged file can fail anywhere in a decoder; it is counted and skipped
        return Read(None, "truncated" if "truncated" in str(error) else "damaged")


def read_pictures(sources: Iterable[tuple[str, Any]], shape: Shape, threads: int | None = None) -> Iterator[Read]:
    """Decode (name, picture) pairs in their order, in threads; a picture may be a function that fetches it.

    No more than ``AHEAD`` pictures a thread are in memory besides what the caller keeps. Pillow's warnings are for
    the caller to silence: filters are the process's, not a thread's.
    """
    count = threads or min(8, os.cpu_count() or 1)

    def work(name: str, source: Any) -> Read:
        try:
            found = source() if callable(source) else source
        except (OSError, ValueError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error):
            return Read(None, "damaged")
        return read_picture(found, shape, name)

    waiting: deque[Future[Read]] = deque()
    with ThreadPoolExecutor(count, thread_name_prefix="pictures") as pool:
        try:
            for name, source in sources:
                waiting.append(pool.submit(work, name, source))
                if len(waiting) >= AHEAD * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for late in waiting:
                late.cancel()


@cache
def _known() -> tuple[str, ...]:
    """The formats that this build of Pillow has."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _from_array(pixels: np.ndarray) -> Any:
    from PIL import Image

    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (1,), (3,), (4,)):
        raise ValueError(f"pixels are {pixels.dtype} {list(pixels.shape)}")
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels))


def _upright(picture: Any) -> Any:
    from PIL import ImageOps

    picture.load()
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # damaged EXIF says nothing about the pixels
        return picture


def _shaped(picture: Any, shape: Shape) -> np.ndarray:
    """8-bit grey or colour, resized and cropped: [height, width, channels]."""
    from PIL import Image, ImageOps

    picture = _eight_bit(picture)
    if picture.mode in ("LA", "La", "PA", "RGBa", "RGBA") or "transparency" in picture.info:
        seen = picture.convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", seen.size, shape.background), seen)
        picture = flat.convert("L" if picture.mode in ("LA", "La", "L") else "RGB")
    grey = picture.mode in ("1", "L")
    mode = "L" if shape.channels == 1 or (shape.channels is None and grey) else "RGB"
    picture = picture.convert(mode)
    size = shape.size
    if size is not None and picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _eight_bit(picture: Any) -> Any:
    """Grey of more than 8 bits, scaled: whole numbers from 0..65535, fractions from 0..1."""
    from PIL import Image

    if not (picture.mode.startswith("I") or picture.mode == "F"):
        return picture
    values = np.asarray(picture).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("not finite")
    if picture.mode == "F":
        top = 1.0 if values.max() <= 1 else 255.0
    else:
        top = 255.0 if picture.mode == "I" and values.max() <= 255 else 65535.0
    return Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8))
