import pytest
import torch

from fewstep.errors import Refused
from fewstep.tasks.prompts import LIMIT, LONGEST, Prompts, PromptsOptions, read_prompts


def write(tmp_path, content):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "holds no prompt"),
        (b"\n  \n\t\n", "holds no prompt"),
        (b"a photo\x00of a dog\n", "is binary"),
        (b"\x89PNG\r\n\x1a\n\xff\xd8", "is not UTF-8"),
        ("ein h\xe4uschen".encode("latin-1"), "is not UTF-8"),
        (b"a\x1b[31mred\n", "control character"),
        (b"a" * (LONGEST + 1), "more than the 10000 allowed"),
    ],
)
def test_a_prompt_file_that_cannot_be_read_is_refused_in_one_line(tmp_path, content, reason):
    with pytest.raises(Refused, match=reason) as refused:
        read_prompts(write(tmp_path, content))
    assert "\n" not in str(refused.value)


def test_a_missing_file_a_folder_and_a_huge_file_are_refused(tmp_path):
    for place in (tmp_path / "nothing.txt", tmp_path):
        with pytest.raises(Refused, match="there is no prompt file"):
            read_prompts(place)
    huge = tmp_path / "huge.txt"
    with huge.open("wb") as stream:
        stream.truncate(LIMIT + 1)
    with pytest.raises(Refused, match="split it"):
        read_prompts(huge)


def test_prompts_are_the_lines_without_blank_ones_and_marks(tmp_path):
    file = write(tmp_path, "\ufeffa photo\r\n\r\n  zwei H\u00e4user \n".encode())
    assert read_prompts(file) == ["a photo", "zwei H\u00e4user"]


def test_a_task_of_prompts_has_conditions_and_no_data(tmp_path):
    file = write(tmp_path, b"one\ntwo\nthree\n")
    task = Prompts(PromptsOptions(path=str(file)))

    def embed(prompts):
        return {"text": torch.tensor([[float(len(p))] for p in prompts]), "mask": torch.ones(len(prompts), 1)}

    task.asked(embed, (4, 2, 2))
    assert not task.has_data
    assert (len(task.train), len(task.test)) == (3, 0)
    batch = task.batch(2, seed=0, step=0)
    assert batch.noise.shape == (2, 4, 2, 2)
    assert set(batch.cond["text"].flatten().tolist()) <= {3.0, 5.0}
    assert not batch.data.any()


def test_conditions_that_do_not_fit_in_memory_are_refused_before_they_are_made(tmp_path):
    task = Prompts(PromptsOptions(path=str(write(tmp_path, b"a\n" * 1000))))
    asked = []

    def embed(prompts):
        asked.append(len(prompts))
        return torch.zeros(()).expand(len(prompts), 2**23)

    with pytest.raises(Refused, match="give fewer prompts"):
        task.asked(embed, (4, 2, 2))
    assert asked == [1]
