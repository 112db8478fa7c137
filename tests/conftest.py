"""What every test starts from: one thread, fixed seeds, and real data where it is at hand."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # so that every test finds laws.py
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeds():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """Latents and embeddings that tests make are kept among their other files."""
    os.environ["FEWSTEP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with larger data sets beside this checkout; a test that asks for it is skipped without it."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no data sets in a folder {folder.parent.name!r} beside the checkout")
    return folder
