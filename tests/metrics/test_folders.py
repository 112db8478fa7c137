import json

import pytest
import torch

from fewstep.errors import Refused
from fewstep.metrics.folders import ClipScorer, FolderFeatures, Lens

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP of the real class with random weights, and a tokenizer of letters."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(97, 123)]
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(vocab), "max_position_embeddings": 12, "eos_token_id": len(vocab) - 1,
                     "bos_token_id": len(vocab) - 2},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    return folder


def pictures(count=3, side=20, seed=0):
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_the_score_is_a_hundred_times_the_models_own_cosine_and_never_negative(clip):
    scorer, images, prompts = ClipScorer(clip), pictures(), ["a cat", "two dogs", "the end of a long sentence"]
    found = scorer(images, prompts)
    tokens = scorer.tokenizer(prompts, padding=True, truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        own = scorer.model(pixel_values=scorer.lens(images), **tokens).logits_per_image
    known = (100 * own / scorer.model.logit_scale.exp()).diagonal().clamp(min=0)
    assert torch.allclose(found.float(), known, atol=1e-4)
    assert (scorer(images, prompts[::-1]) != found).any()
    assert len(scorer.hash) == 64


def test_pictures_are_prepared_as_transformers_prepares_them(clip):
    from transformers.models.clip import image_processing_pil_clip as own

    images = pictures(2, side=37)[:, :, :29]
    made = own.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    known = made(images=[i.permute(1, 2, 0).numpy() for i in images], return_tensors="pt")["pixel_values"]
    assert torch.allclose(Lens(clip, 16)(images), known, atol=1e-5)


def test_features_come_from_the_folder_and_see_no_labels(clip):
    features = FolderFeatures(clip)
    samples = pictures().float() / 127.5 - 1
    found, seen = features.both(samples)
    assert found.shape == (3, 8) and found.dtype == torch.float64 and seen is None
    assert torch.equal(features(samples[1:2]), found[1:2]) or torch.allclose(features(samples[1:2]), found[1:2])
    with pytest.raises(Refused, match="1 or 3 channels"):
        features(torch.zeros(2, 4, 8, 8))


def test_folders_that_cannot_be_used_are_refused_in_one_line(clip, tmp_path):
    with pytest.raises(Refused, match="never downloaded"):
        ClipScorer("openai/clip-vit-base-patch32")
    with pytest.raises(Refused, match="folder without config.json"):
        ClipScorer(tmp_path)
    (tmp_path / "config.json").write_text((clip / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(Refused, match="only pytorch_model.bin, a pickle"):
        ClipScorer(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(Refused, match="cannot be loaded") as caught:
        FolderFeatures(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Refused, match="is no JSON"):
        ClipScorer(tmp_path)
    with pytest.raises(Refused, match="2 pictures but 1 prompts"):
        ClipScorer(clip)(pictures(2), ["a"])
