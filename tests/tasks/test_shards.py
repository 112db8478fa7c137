"""What is kept: latents and conditions are the same with and without a cache, and never those of another encoder."""

import numpy as np
import pytest
import torch
from torch import nn

from fewstep.errors import Failed, Refused
from fewstep.rng import Rng
from fewstep.tasks import task_named
from fewstep.tasks.captions import captioned
from fewstep.tasks.encoded import Encoded
from fewstep.tasks.shards import Shards, cache_folder, encoder_hash

pytest.importorskip("PIL", reason="needs fewstep[evaluate]")


class Encoder(nn.Module):
    """A small autoencoder's first half, which counts what it reads."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Conv2d(1, 2, 2, stride=2)
        self.config = {"scaling_factor": 0.5}
        self.read, self.most = 0, 10**9

    def forward(self, x):
        if self.read >= self.most:
            raise KeyboardInterrupt
        self.read += len(x)
        with torch.no_grad():
            return self.net(x) * self.config["scaling_factor"]


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "a.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (620, 8, 8), dtype=np.uint8)
    np.savez(file, images=pixels, labels=np.arange(620) % 4)
    return file


def encoded(npz, encoder, cache, **options):
    pixels = task_named("images", {"path": str(npz), "test_count": 20, **options})
    return Encoded(pixels, (2, 4, 4), encoder, lambda z: z, encoder=encoder_hash(encoder), cache=cache)


def test_latents_are_bit_equal_with_and_without_a_cache_and_are_made_once(npz, tmp_path):
    plain, first, again = Encoder(), Encoder(), Encoder()
    bare = encoded(npz, plain, None).train
    kept = encoded(npz, first, tmp_path).train
    found = encoded(npz, again, tmp_path).train
    assert (first.read, again.read) == (600, 0)
    for split in (kept, found):
        assert torch.equal(split.data, bare.data)
        assert torch.equal(split.cond, bare.cond)
        rows = torch.tensor([599, 0, 300, 255, 256, 0])
        assert torch.equal(split.rows(rows).data, bare.data[rows])
    pixels = task_named("images", {"path": str(npz), "test_count": 20}).train.data
    assert torch.equal(bare.data[:32], Encoder()(pixels[:32]))


def test_latents_of_another_encoder_or_of_other_data_are_never_met(npz, tmp_path):
    def read(encoder, **options):
        encoded(npz, encoder, tmp_path, **options).train
        return encoder.read

    assert read(Encoder()) == 600
    changed = Encoder()
    with torch.no_grad():
        changed.net.weight[0, 0, 0, 0] += 1e-6
    assert read(changed) == 600
    scaled = Encoder()
    scaled.config["scaling_factor"] = 0.25
    assert read(scaled) == 600
    assert read(Encoder(), train_count=300) == 300
    assert read(Encoder(), seed=1) == 600
    assert read(Encoder()) == 0


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "empty", "another's"])
def test_a_damaged_shard_is_made_again_and_the_others_are_kept(npz, tmp_path, damage):
    whole = encoded(npz, Encoder(), tmp_path).train.data
    shards = sorted(tmp_path.rglob("*.safetensors"))
    assert len(shards) == 3
    content = shards[1].read_bytes()
    if damage == "gone":
        shards[1].unlink()
    else:
        flipped = content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]
        bad = {"cut": content[:-8], "flipped": flipped, "empty": b"", "another's": shards[0].read_bytes()[:-1]}
        shards[1].write_bytes(bad[damage])
    encoder = Encoder()
    mended = encoded(npz, encoder, tmp_path)
    assert torch.equal(mended.train.data, whole)
    assert encoder.read == 256
    late = Encoder()
    assert torch.equal(encoded(npz, late, tmp_path).train.data, whole) and late.read == 0


def test_a_run_that_was_stopped_goes_on_at_the_first_missing_shard(npz, tmp_path):
    stops = Encoder()
    stops.most = 300
    with pytest.raises(KeyboardInterrupt):
        encoded(npz, stops, tmp_path).train
    assert len(list(tmp_path.rglob("*"))) == 2  # one folder, one shard, nothing half-written
    encoder = Encoder()
    assert torch.equal(encoded(npz, encoder, tmp_path).train.data, encoded(npz, Encoder(), None).train.data)
    assert encoder.read == 600 - 256


def test_mirrored_pictures_have_latents_of_their_own(npz, tmp_path):
    task = encoded(npz, Encoder(), tmp_path, flip=True)
    plain = task_named("images", {"path": str(npz), "test_count": 20}).train
    assert len(task.train) == 1200
    torch.testing.assert_close(task.train.data[:600], Encoder()(plain.data))
    torch.testing.assert_close(task.train.data[600:], Encoder()(plain.data.flip(3)))
    assert torch.equal(task.train.cond[600:], task.train.cond[:600])
    data = task.train.rows(slice(8)).data
    assert torch.equal(task.augment(data, Rng(0)), data)  # latents themselves are never mirrored


def test_the_spread_of_latents_is_that_of_all_of_them(npz):
    task = encoded(npz, Encoder(), None)
    assert task.data_std == pytest.approx(float(task.train.data.double().std()), rel=1e-9)


def test_an_autoencoder_of_another_shape_is_refused(npz):
    pixels = task_named("images", {"path": str(npz), "test_count": 20})
    with pytest.raises(ValueError, match=r"gives \(2, 4, 4\), the network takes \(2, 8, 8\)"):
        Encoded(pixels, (2, 8, 8), Encoder(), lambda z: z).train


def test_rows_are_mapped_and_told_as_they_are_made(tmp_path):
    def make(rows):
        return {"a": torch.arange(rows.start, rows.stop), "b": torch.zeros(len(rows), 2, dtype=torch.bfloat16)}

    seen = []
    shards = Shards("x", {"k": 1}, 10, make, folder=tmp_path, size=4, batch=3)
    shards.fill(seen.append)
    assert seen == [4, 8, 10]
    assert shards[torch.tensor([9, 2])]["a"].tolist() == [9, 2]
    assert shards[3:6]["a"].tolist() == [3, 4, 5]
    assert shards[:]["b"].dtype == torch.bfloat16
    assert shards[torch.tensor([], dtype=torch.long)]["a"].shape == (0,)


def test_a_place_that_cannot_be_written_is_named_with_the_mend(tmp_path):
    (tmp_path / "file").write_text("")
    shards = Shards("x", {}, 4, lambda rows: torch.zeros(len(rows)), folder=tmp_path / "file")
    with pytest.raises(Failed, match="set FEWSTEP_CACHE to a folder with room"):
        shards.fill()


def test_the_cache_is_where_it_is_said_to_be(monkeypatch, tmp_path):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("FEWSTEP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fewstep"


# -- captions ------------------------------------------------------------------------------------


class Reader:
    """A text encoder that counts: a row for each caption, from its letters."""

    def __init__(self):
        self.read = []

    def __call__(self, texts):
        self.read += texts
        rows = [torch.tensor([len(text), sum(map(ord, text))], dtype=torch.float32) for text in texts]
        return {"text": torch.stack(rows), "mask": torch.ones(len(texts), 1, dtype=torch.long)}


@pytest.fixture
def captions(tmp_path):
    texts = [f"a picture of {k % 7}" for k in range(40)]
    pixels = np.random.default_rng(0).integers(0, 256, (40, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "c.npz", images=pixels, captions=np.array(texts), labels=np.arange(40) % 2)
    return tmp_path / "c.npz"


def test_each_caption_is_read_once_when_it_is_asked_for(captions, tmp_path):
    task = task_named("images", {"path": str(captions), "test_count": 10})
    reader = Reader()
    split = captioned(task.train, reader, "hash", tmp_path / "cache")
    assert reader.read == []
    part = split.rows(torch.tensor([3, 0, 29]))
    assert sorted(reader.read) == sorted(set(task.train.captions))
    wanted = Reader()([task.train.captions[k] for k in (3, 0, 29)])
    assert torch.equal(part.cond["text"], wanted["text"])
    assert torch.equal(part.data, task.train.data[[3, 0, 29]])
    late, other = Reader(), Reader()
    assert torch.equal(captioned(task.train, late, "hash", tmp_path / "cache").cond["text"], split.cond["text"])
    captioned(task.train, other, "another", tmp_path / "cache").cond
    assert late.read == [] and len(other.read) == 7
    assert torch.equal(captioned(task.train, Reader(), "hash").cond["text"], split.cond["text"])


def test_captions_become_the_condition_of_a_task_and_nothing_is_the_empty_one(captions, tmp_path):
    task = task_named("images", {"path": str(captions), "test_count": 10})
    task.use_captions(Reader(), "hash", tmp_path / "cache")
    assert task.classes is None
    batch = task.batch(8, seed=0, step=0)
    assert batch.cond["text"].shape == (8, 2)
    null = task.null(batch.cond)
    assert null["text"].tolist() == [[0.0, 0.0]] * 8
    assert null["mask"].shape == (8, 1)


def test_data_without_captions_cannot_be_read_by_a_text_encoder(npz, tmp_path):
    with pytest.raises(Refused, match=r"has no captions: put a \.txt beside each picture"):
        task_named("images", {"path": str(npz)}).use_captions(Reader(), "hash")


def test_embeddings_of_several_lengths_are_refused():
    shards = Shards("x", {}, 4, lambda rows: torch.zeros(len(rows), rows.stop), batch=2)
    with pytest.raises(ValueError, match="differ in shape"):
        shards.fill()


def test_the_hash_of_an_encoder_is_of_its_weights_and_its_configuration():
    same = encoder_hash("kind", Encoder())
    assert same == encoder_hash("kind", Encoder())
    assert same != encoder_hash("other", Encoder())
    assert same != encoder_hash("kind", Encoder(seed=1))
    assert len(same) == 64
