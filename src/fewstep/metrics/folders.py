"""Networks that the user has on disk: CLIP to score prompts, CLIP or DINO for features. Nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import Refused, need
from .features import Features, weights_hash

PART = 32
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, where a folder names none."""


class Scorer(Protocol):
    """How well pictures obey their prompts: ``scorer(images uint8 [n, 3, h, w], prompts) -> [n]``, higher is better."""

    name: str
    hash: str

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...


class Lens:
    """What turns pictures into a network's input, by the folder's ``preprocessor_config.json``.

    Shortest edge resized (bicubic, on 8-bit values), centre cropped, normalised.
    """

    def __init__(self, folder: Path, side: int) -> None:
        facts = _json(folder / "preprocessor_config.json")
        size, crop = facts.get("size", side), facts.get("crop_size", side)
        try:
            edges = size if isinstance(size, dict) else {"height": size}
            self.edge = int(edges.get("shortest_edge") or edges.get("height", side))
            self.crop = int(crop.get("height", side) if isinstance(crop, dict) else crop)
            self.mean = torch.tensor([float(v) for v in facts.get("image_mean", MEAN)]).view(1, 3, 1, 1)
            self.std = torch.tensor([float(v) for v in facts.get("image_std", STD)]).view(1, 3, 1, 1)
        except (AttributeError, TypeError, ValueError, RuntimeError):
            raise Refused(
                f"{folder / 'preprocessor_config.json'} is damaged: its sizes or means cannot be read"
            ) from None
        if not 1 <= self.crop <= self.edge <= 4096:
            raise Refused(f"{folder}: pictures of {self.edge} cropped to {self.crop} pixels make no sense")
        self.about = f"{self.edge} {self.crop} {self.mean.flatten().tolist()} {self.std.flatten().tolist()}"

    def __call__(self, pictures: Tensor) -> Tensor:
        """uint8 [n, 1 or 3, h, w] to float [n, 3, crop, crop]."""
        from PIL import Image

        out = []
        for picture in pictures.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy():
            image = Image.fromarray(picture)
            scale = self.edge / min(image.size)
            wide, high = (max(self.edge, int(side * scale)) for side in image.size)
            image = image.resize((wide, high), Image.Resampling.BICUBIC)
            left, top = (wide - self.crop) // 2, (high - self.crop) // 2
            image = image.crop((left, top, left + self.crop, top + self.crop))
            out.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(self.crop, self.crop, 3))
        x = torch.stack(out).permute(0, 3, 1, 2).float() / 255
        return (x - self.mean) / self.std


class ClipScorer:
    """CLIP score: 100 times the cosine between a picture and its prompt, 0 where that is negative.

    ``folder`` is a CLIPModel as transformers saves it, weights in safetensors, with its tokenizer.
    """

    def __init__(self, folder: str | Path, device: str = "cpu") -> None:
        self.folder = Path(folder)
        self.model = _model(self.folder, ("clip",), device)
        need("PIL", "evaluate")
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                str(self.folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise Refused(f"{self.folder} has no tokenizer that transformers can read ({_line(error)})") from None
        self.device = device
        self.lens = Lens(self.folder, self.model.config.vision_config.image_size)
        self.longest = int(self.model.config.text_config.max_position_embeddings)
        self.name = f"CLIP score ({self.folder.name})"
        self.hash = weights_hash(self.model.state_dict(), self.lens.about)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if len(images) != len(prompts):
            raise Refused(f"{len(images)} pictures but {len(prompts)} prompts: a score needs one each")
        scores = []
        for start in range(0, len(images), PART):
            seen = clip_images(self.model, self.lens(images[start : start + PART]).to(self.device))
            words = list(prompts[start : start + PART])
            tokens = self.tokenizer(
                words, padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
            ).to(self.device)
            hidden = self.model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            told = self.model.text_projection(hidden.pooler_output)
            scores.append(100 * F.cosine_similarity(seen.double(), told.double()).clamp(min=0).cpu())
        return torch.cat(scores)


class FolderFeatures(Features):
    """Features of a CLIP image encoder, or of a DINO or another vision transformer (its first token)."""

    def __init__(self, folder: str | Path, value_range: tuple[float, float] = (-1.0, 1.0), device: str = "cpu") -> None:
        self.folder, self.range, self.device = Path(folder), value_range, device
        need("PIL", "evaluate")
        self.model = _model(self.folder, ("clip", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit"), device)
        config = getattr(self.model.config, "vision_config", self.model.config)
        self.lens = Lens(self.folder, config.image_size)
        self.name = f"{self.model.config.model_type} ({self.folder.name})"
        self.hash = weights_hash(self.model.state_dict(), self.lens.about)
        self.notes = {"resize": f"shortest edge to {self.lens.edge}, centre {self.lens.crop}, bicubic"}

    @torch.no_grad()
    def both(self, samples: Tensor) -> tuple[Tensor, Tensor | None]:
        if samples.ndim != 4 or samples.shape[1] not in (1, 3):
            raise Refused(f"{self.name} sees pictures of 1 or 3 channels, got {list(samples.shape[1:])}")
        low, high = self.range
        found = []
        for part in samples.split(PART):
            shown = ((part.float().clamp(low, high) - low) / (high - low) * 255).nan_to_num().round().to(torch.uint8)
            x = self.lens(shown).to(self.device)
            if self.model.config.model_type == "clip":
                found.append(clip_images(self.model, x))
            else:
                found.append(self.model(pixel_values=x).last_hidden_state[:, 0])
        return torch.cat(found).double().cpu(), None


def clip_images(model: Any, x: Tensor) -> Tensor:
    """CLIP's projected picture embeddings, the same in every version of transformers."""
    found: Tensor = model.visual_projection(model.vision_model(pixel_values=x).pooler_output)
    return found


def _model(folder: Path, kinds: Sequence[str], device: str) -> Any:
    """A model from a local folder; Refused for a folder of another kind, or whose weights are a pickle."""
    if not folder.is_dir():
        raise Refused(f"there is no folder {folder}: measuring networks are never downloaded, pass one that you have")
    kind = _json(folder / "config.json").get("model_type")
    if kind not in kinds:
        raise Refused(f"{folder} holds a {kind or 'folder without config.json'}, this takes: {', '.join(kinds)}")
    if not list(folder.glob("*.safetensors")):
        pickled = next((f.name for f in folder.glob("*.bin")), None)
        what = f"only {pickled}, a pickle" if pickled else "none"
        raise Refused(f"{folder} should have its weights in safetensors, it has {what}")
    need("transformers", "text")
    from transformers import AutoModel

    try:
        model = AutoModel.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:
        raise Refused(f"{folder} cannot be loaded by transformers ({_line(error)})") from None
    return model.eval().requires_grad_(False).to(device)


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        raise Refused(f"{file} is no JSON") from None
    return found if isinstance(found, dict) else {}


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
