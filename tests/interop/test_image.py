import numpy as np
import pytest
import torch

from fewstep.errors import Refused
from fewstep.interop import write_image
from fewstep.interop.image import MARKER, tile


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
def test_a_picture_comes_back_with_its_pixels_and_where_it_came_from(tmp_path, shape):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    file = write_image(pixels, tmp_path / "deep" / "a.png", model="größe-1", seed=7, steps=2)
    opened = image.open(file)
    assert np.array_equal(np.asarray(opened), pixels.squeeze(-1) if shape[2:] == (1,) else pixels)
    assert (opened.text["model"], opened.text["seed"], opened.text["steps"]) == ("größe-1", "7", "2")
    assert opened.text["DigitalSourceType"] == MARKER
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["a.png"]


@pytest.mark.parametrize("array", [np.zeros((2, 2)), np.zeros((2, 2, 2), np.uint8), torch.zeros(2, 2)])
def test_what_is_no_picture_is_refused(tmp_path, array):
    with pytest.raises(Refused, match="a picture is uint8"):
        write_image(array, tmp_path / "a.png", model="m", seed=0, steps=1)
    assert not list(tmp_path.iterdir())


def test_a_sheet_shows_every_picture_in_order():
    cells = np.stack([np.full((2, 2, 1), i, np.uint8) for i in range(5)])
    sheet = tile(cells, columns=3, least=8)
    assert sheet.shape == (5, 8, 1)
    assert [int(sheet[0, c, 0]) for c in (0, 3, 6)] == [0, 1, 2]
    assert [int(sheet[3, c, 0]) for c in (0, 3)] == [3, 4]
