"""Every option of [precision] trains to the weights of the plain run, and leaves the networks as it found them."""

from __future__ import annotations

import copy
import os
import shutil
import signal

import pytest
import torch

from fewstep.denoiser import Wrapped
from fewstep.errors import Interrupted, Refused
from fewstep.method import Batch
from fewstep.methods.consistency import Consistency, ConsistencyOptions
from fewstep.methods.dmd2 import DMD2, DMD2Options
from fewstep.methods.meanflow import MeanFlow
from fewstep.nets import build
from fewstep.path import Exploding, Straight
from fewstep.student import Student
from fewstep.tasks.base import Split, Task
from fewstep.train.average import Average
from fewstep.train.precision import Prepared, blocks, networks
from fewstep.train.recipe import PrecisionSection, Recipe, recipe_from
from fewstep.train.trainer import Nobody, Trainer

PATH = Exploding(sigma_min=0.02, sigma_max=20.0)
UNET = {"kind": "unet", "shape": (1, 4, 4), "widths": (8, 8), "groups": 4, "head_width": 4, "classes": 2}
DROPPING = {**UNET, "dropout": 0.2}
DIT = {"kind": "dit", "shape": (1, 4, 4), "width": 8, "depth": 2, "heads": 2, "classes": 2}
MLP = {"kind": "mlp", "shape": (1, 4, 4), "width": 8, "depth": 2, "classes": 2}


class Noise(Task):
    """Random pictures of two classes."""

    name = "noise"
    shape, classes, data_std, value_range = (1, 4, 4), 2, 1.0, (-1.0, 1.0)

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(0)
        self._split = Split(torch.randn(32, 1, 4, 4, generator=rng), torch.arange(32) % 2)

    @property
    def train(self) -> Split:
        return self._split

    @property
    def test(self) -> Split:
        return self._split


def denoiser(net: dict[str, object], seed: int = 0) -> Wrapped:
    torch.manual_seed(seed)
    network = build(net)
    for p in network.parameters():  # blocks that start at zero would hide what is wrong in them
        torch.nn.init.normal_(p, std=0.2)
    return Wrapped(network, PATH, "cm", "250 log_sigma", scale_input=True, data_std=1.0)


def game(kind: str, net: dict[str, object]):
    teacher = denoiser(net, 1)
    torch.manual_seed(2)
    if kind == "meanflow":
        wrapped = Wrapped(denoiser({**net, "reads_s": True}).net, Straight(), "velocity", "t")
        return MeanFlow(None, Student(wrapped, (1, 4, 4), classes=2))
    student = Student.like(denoiser(net), (1, 4, 4), classes=2)
    if kind == "consistency":
        return Consistency(teacher, student, ConsistencyOptions(mode="distillation", horizon=4))
    gan = {"on": "critic", "student": 0.1} if kind == "gan" else None
    gap = "fisher" if kind == "fisher" else "kl"
    return DMD2(teacher, student, DMD2Options.model_validate({"critic_turns": 1, "gap": gap, "gan": gan}))


def recipe(kind: str, **precision: object) -> Recipe:
    name = kind if kind in ("meanflow", "consistency") else "dmd2"
    return recipe_from({
        "steps": 4, "batch": 8, "task": {"name": "digits"}, "method": {"name": name}, "precision": precision,
        "optim": {"lr": 1e-2}, "ema": {"decay": 0.5}, "checkpoint": {"every": 100}, "log": {"every": 1},
    })  # fmt: skip


def trained(kind: str, net: dict[str, object], folder, **precision: object) -> dict[str, torch.Tensor]:
    method = game(kind, net)
    Trainer(recipe(kind, **precision), folder).fit(method, Noise())
    for module in networks(method):
        assert "forward" not in vars(module) and not any("forward" in vars(m) for m in module.modules())
        assert not module._forward_pre_hooks and not module._forward_hooks and module._compiled_call_impl is None
        assert all(p.dtype == torch.float32 and p.is_contiguous() for p in module.parameters())
    return dict(method.student.state_dict())


GAMES = [("dmd2", UNET), ("gan", UNET), ("fisher", DIT), ("consistency", MLP), ("meanflow", DIT)]


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "net"), GAMES, ids=[f"{kind}-{net['kind']}" for kind, net in GAMES])
def test_checkpointing_layout_and_offload_change_nothing_but_rounding(kind, net, tmp_path):
    plain = trained(kind, net, tmp_path / "plain")
    start = dict(game(kind, net).student.state_dict())
    assert any(not torch.equal(plain[k], start[k]) for k in plain), "nothing was learned"
    assert_equal(plain, trained(kind, net, tmp_path / "other", checkpointing=True))
    assert_equal(plain, trained(kind, net, tmp_path / "other", channels_last=True))
    if kind != "meanflow":  # which has no teacher here
        assert_equal(plain, trained(kind, net, tmp_path / "other", offload_teacher=True, checkpointing=True))


@pytest.mark.parametrize("kind", ["dmd2", "consistency"])
def test_a_block_that_is_computed_again_drops_what_it_dropped(kind, tmp_path):
    plain = trained(kind, DROPPING, tmp_path / "plain")
    assert_equal(plain, trained(kind, DROPPING, tmp_path / "other", checkpointing=True))


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="compiling needs a C++ compiler")
def test_compiling_changes_nothing_but_rounding(tmp_path):
    plain = trained("consistency", MLP, tmp_path / "plain")
    assert_equal(plain, trained("consistency", MLP, tmp_path / "other", compile=True))


@pytest.mark.parametrize(("net", "count"), [(UNET, 14), (DIT, 2), (MLP, 2)])
def test_what_is_recomputed_as_one_are_the_innermost_blocks(net, count):
    network = build(net)
    found = list(blocks(network))
    assert len(found) == count
    inside = [id(m) for block in found for m in block.modules()]
    assert len(inside) == len(set(inside)), "a block inside a block"


@pytest.mark.parametrize("net", [UNET, DIT])
def test_checkpointing_keeps_less_for_the_way_back(net):
    def kept(**precision: bool) -> int:
        method = game("dmd2", net)
        prepared = Prepared(method, PrecisionSection(**precision), "cpu")
        sizes: dict[int, int] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        weights = {p.untyped_storage().data_ptr() for p in method.parameters()}
        batch = Noise().batch(16, 0, 0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = method.loss("student", batch, torch.Generator().manual_seed(0))
        del loss
        prepared.finish()
        return sum(size for place, size in sizes.items() if place not in weights)

    assert kept(checkpointing=True) < 0.6 * kept()


def test_a_diffusers_network_is_recomputed_by_its_own_blocks():
    pytest.importorskip("diffusers")
    from diffusers import UNet2DModel

    from fewstep.interop.recorded import Layouts, Recorded

    net = UNet2DModel(
        sample_size=4, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    teacher = Wrapped(Recorded(net, "sample", "timestep", Layouts(), {}), PATH, "eps", "250 log_sigma")
    results = []
    for checkpointing in (False, True):
        method = DMD2(teacher, Student.like(teacher, (1, 4, 4)), DMD2Options())
        prepared = Prepared(method, PrecisionSection(checkpointing=checkpointing), "cpu")
        assert any(getattr(m, "gradient_checkpointing", False) for m in method.modules()) is checkpointing
        data = torch.zeros(4, 1, 4, 4)
        batch = Batch(data, None, torch.randn(data.shape, generator=torch.Generator().manual_seed(0)))
        method.loss("critic", batch, torch.Generator().manual_seed(0)).total.backward()
        results.append([p.grad.clone() for p in method.critic.parameters() if p.grad is not None])
        prepared.finish()
        assert not any(getattr(m, "gradient_checkpointing", False) for m in method.modules())
    assert results[0] and max(float(g.abs().max()) for g in results[0]) > 0
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


# -- 16 bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "net"), [("dmd2", UNET), ("gan", UNET), ("consistency", DIT), ("consistency", MLP)])
def test_weights_of_sixteen_bits_learn_nearly_what_wide_ones_learn(kind, net, tmp_path):
    wide = trained(kind, net, tmp_path / "wide", dtype="bfloat16")
    narrow = trained(kind, net, tmp_path / "narrow", dtype="bfloat16", weights="bfloat16")
    start = dict(game(kind, net).student.state_dict())
    flat = [torch.cat([v.flatten() for v in state.values()]) for state in (wide, narrow, start)]
    assert 0 < (flat[0] - flat[1]).norm() < 0.5 * (flat[0] - flat[2]).norm()


class Stopper(Nobody):
    def advance(self, label, done, note=""):
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_of_sixteen_bits_that_was_stopped_ends_bit_equal_to_one_that_was_not(tmp_path):
    precision = {"dtype": "bfloat16", "weights": "bfloat16"}
    whole = trained("dmd2", UNET, tmp_path / "whole", **precision)
    with pytest.raises(Interrupted):
        Trainer(recipe("dmd2", **precision), tmp_path / "parts", watch=Stopper()).fit(game("dmd2", UNET), Noise())
    again = Trainer(recipe("dmd2", **precision), tmp_path / "parts")
    parts = again.fit(game("dmd2", UNET), Noise(), resume=True).state_dict()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_weights_of_sixteen_bits_without_passes_of_sixteen_bits_are_refused():
    with pytest.raises(Refused, match='needs dtype = "bfloat16"'):
        recipe("dmd2", weights="bfloat16")


# -- offload --------------------------------------------------------------------------------------


def test_a_teacher_is_on_the_device_while_it_is_asked_and_stays_for_a_gradient():
    method = game("fisher", DIT)
    before = copy.deepcopy(method.teacher.state_dict())
    prepared = Prepared(method, PrecisionSection(offload_teacher=True), "cpu")
    away = prepared._offload
    assert away is not None and not away.here
    batch = Noise().batch(4, 0, 0)
    with torch.no_grad():
        method.teacher(batch.data, 1.0, batch.cond)
    assert (away.moves, away.here) == (1, False)
    loss = method.loss("student", batch, torch.Generator().manual_seed(0))
    assert (away.moves, away.here) == (2, True)  # the way back reads its weights
    loss.total.backward()
    prepared.rest()
    assert not away.here
    prepared.finish()
    assert all(torch.equal(v, before[k]) for k, v in method.teacher.state_dict().items())
    assert not method.teacher._forward_pre_hooks


def test_offload_without_a_teacher_of_its_own_is_refused():
    with pytest.raises(Refused, match="no teacher"):
        Prepared(game("meanflow", DIT), PrecisionSection(offload_teacher=True), "cpu")
    teacher = denoiser(MLP)
    method = Consistency(teacher, Student(teacher, (1, 4, 4)), ConsistencyOptions(mode="distillation"))
    teacher.requires_grad_(True)
    for option in ({"offload_teacher": True}, {"dtype": "bfloat16", "weights": "bfloat16"}):
        with pytest.raises(Refused, match="leave it out"):
            Prepared(method, PrecisionSection.model_validate(option), "cpu")


def test_the_average_of_weights_of_sixteen_bits_does_not_stand_still():
    """A thousand updates of share 1e-3 towards 1 from 0 leave 0.999^1000; in bfloat16 they would stop near 0.25."""
    layer = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    torch.nn.init.zeros_(layer.weight)
    average = Average(layer, decay=0.999, warmup=1.0)
    torch.nn.init.ones_(layer.weight)
    for _ in range(1000):
        average.update()
    assert float(average.values[0]) == pytest.approx(1 - 0.999**1000, abs=1e-3)
