"""Data of a teacher with an autoencoder, or with a text encoder: read once, kept, and found by the next job."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fewstep import jobs
from fewstep.jobs.setting import _read_captions
from fewstep.tasks import task_named
from fewstep.train.recipe import recipe_from
from fewstep.train.trainer import Nobody

pytest.importorskip("PIL", reason="needs fewstep[evaluate]")


class Listener(Nobody):
    def __init__(self):
        self.seen = []

    def start(self, label, total):
        self.seen.append((label, total))


@pytest.mark.slow
def test_latents_of_a_pipeline_s_pictures_are_made_by_the_first_job_and_found_by_the_second(tmp_path, monkeypatch):
    pytest.importorskip("diffusers", reason="needs fewstep[diffusers]")
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=4, num_layers=1, sample_size=4
    )
    vae = AutoencoderKL(latent_channels=2, block_out_channels=(8,), norm_num_groups=4, sample_size=4)
    DiTPipeline(net, vae, DDIMScheduler(clip_sample=False)).save_pretrained(str(tmp_path / "pipe"))
    pixels = np.random.default_rng(0).integers(0, 256, (30, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.arange(30) % 5)
    recipe = recipe_from(
        {
            "steps": 1,
            "task": {"name": "images", "options": {"path": str(tmp_path / "a.npz"), "test_count": 10, "flip": True}},
            "teacher": {"source": str(tmp_path / "pipe")},
            "method": {"name": "dmd2"},
        }
    )
    watch = Listener()
    first = jobs.prepare(recipe, tmp_path / "run", "cpu", watch).task
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")}
    again = jobs.prepare(recipe, tmp_path / "other", "cpu", watch).task
    assert watch.seen == [("latents", 40)] * 2  # both views of twenty pictures
    assert len(made) == 1
    assert made == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")}
    assert again.latents.made == 0
    assert torch.equal(first.train.data, again.train.data)
    with torch.no_grad():
        mode = vae.eval().encode(first.pixels.train.rows(slice(20)).data).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(first.train.data[:20], mode, atol=1e-5, rtol=1e-4)
    assert first.data_std == pytest.approx(float(first.train.data.std()), rel=1e-5)


class Words(nn.Module):
    """A text encoder: a row for each of the first three letters."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(256, 4)


def test_captions_are_read_by_the_teachers_text_encoder_and_kept_by_its_hash(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    pixels = np.zeros((12, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, captions=np.array(["red", "green", "blue"] * 4))
    words = Words()
    calls = []

    def embed(texts):
        calls.append(texts)
        letters = torch.tensor([[ord(c) for c in f"{text:<3}"[:3]] for text in texts])
        return {"encoder_hidden_states": words.table(letters)}

    def read():
        task = task_named("images", {"path": str(tmp_path / "a.npz"), "test_count": 3})
        teacher = SimpleNamespace(
            embed=embed, kind="Kind", pipeline=SimpleNamespace(components={"text_encoder": words, "vae": None})
        )
        _read_captions(task, teacher, Nobody())
        return task

    task = read()
    calls.clear()
    again = read()
    assert calls == [[""]]  # "no condition" alone is not kept
    for key, value in task.train.cond.items():
        assert torch.equal(value, again.train.cond[key])
        assert torch.equal(value, embed(list(task.train.captions))[key])
    with torch.no_grad():
        words.table.weight.add_(1)
    calls.clear()
    read()
    assert len(calls) == 3
