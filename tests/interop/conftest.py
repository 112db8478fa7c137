"""Tiny pipelines of the real classes, with random weights."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))  # so that tests find zoo.py


class Pipes:
    """Builders of pipelines; every weight is random and none is zero, so that an error shows."""

    kinds = ("ddpm", "ddim", "dit", "cm")

    def unet(self, classes: int | None = None, seed: int = 0):
        from diffusers import UNet2DModel

        return self._shaken(
            UNet2DModel(
                sample_size=8,
                in_channels=1,
                out_channels=1,
                block_out_channels=(8, 16),
                layers_per_block=1,
                norm_num_groups=4,
                add_attention=False,
                down_block_types=("DownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "UpBlock2D"),
                num_class_embeds=classes,
            ),
            seed,
        )

    def ddpm(self, **options):
        from diffusers import DDPMPipeline, DDPMScheduler

        return self._quiet(DDPMPipeline(self.unet(), DDPMScheduler(clip_sample=False, **options)))

    def ddim(self, **options):
        from diffusers import DDIMPipeline, DDIMScheduler

        return self._quiet(DDIMPipeline(self.unet(), DDIMScheduler(clip_sample=False, **options)))

    def flow(self, **options):
        from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler

        return self._quiet(DDPMPipeline(self.unet(), FlowMatchEulerDiscreteScheduler(**options)))

    def cm(self, **options):
        from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

        scheduler = CMStochasticIterativeScheduler(clip_denoised=False, sigma_max=20.0, **options)
        return self._quiet(ConsistencyModelPipeline(self.unet(classes=5), scheduler))

    def dit(self, **options):
        from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

        transformer = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=4, num_layers=1, sample_size=4
        )
        vae = AutoencoderKL(latent_channels=2, block_out_channels=(8,), norm_num_groups=4, sample_size=4)
        scheduler = DDIMScheduler(clip_sample=False, **options)
        return self._quiet(DiTPipeline(self._shaken(transformer, 1), self._shaken(vae, 2), scheduler))

    @staticmethod
    def _shaken(net, seed: int):
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in net.parameters():
                value.add_(0.1 * torch.randn(value.shape, generator=rng))
        return net.eval()

    @staticmethod
    def _quiet(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe


@pytest.fixture(scope="session")
def pipes() -> Pipes:
    pytest.importorskip("diffusers")
    return Pipes()


@pytest.fixture(scope="session")
def teachers(pipes, tmp_path_factory):
    """Folders of the four pipelines, as a user has them, loaded as teachers."""
    from fewstep.interop import load_teacher

    root = tmp_path_factory.mktemp("teachers")
    loaded = {}
    for kind in pipes.kinds:
        getattr(pipes, kind)().save_pretrained(str(root / kind))
        loaded[kind] = load_teacher(root / kind)
    return loaded


@pytest.fixture
def here(monkeypatch):
    """Run the golden script's comparison in this process: the same stock pipelines without the start-up time."""
    from fewstep.interop import checking

    spec = importlib.util.spec_from_file_location("golden_script", checking.SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def compare(folder: Path, timeout: float):
        try:
            return {int(n): e for n, e in script.compare(str(folder)).items()}, ""
        except SystemExit as error:
            return {}, str(error)

    monkeypatch.setattr(checking, "_fresh_process", compare)
