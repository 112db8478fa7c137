"""Captions as conditions: a text encoder reads each different one once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path as File

import torch
from torch import Tensor

from ..errors import Refused
from .base import Picked, Split
from .shards import Shards
from .split import data_hash

Embed = Callable[[list[str]], dict[str, Tensor]]
SHARD = 64
"""Captions in a shard: rows of large text encoders have megabytes."""


def captioned(
    split: Split,
    embed: Embed,
    encoder: str,
    cache: File | None = None,
    where: str = "the data",
) -> Split:
    """The same samples with their captions, read by ``embed``, as conditions.

    Each different caption is read once, in batches, when one of its shard is first asked for. Shards in ``cache`` are
    named by ``encoder``, the hash of what stands behind ``embed``, and by the texts.
    """
    if split.captions is None:
        raise Refused(f"{where} has no captions: put a .txt beside each picture, or text in metadata.jsonl")
    number = {text: i for i, text in enumerate(dict.fromkeys(split.captions))}
    texts = list(number)
    facts = {"what": "captions", "encoder": encoder, "texts": data_hash("\0".join(texts))}
    shards = Shards(
        "captions", facts, len(texts), lambda rows: embed([texts[i] for i in rows]), folder=cache, size=SHARD, batch=16
    )
    index = torch.tensor([number[text] for text in split.captions])
    return Split(split.held, Picked(shards, index), split.captions)
