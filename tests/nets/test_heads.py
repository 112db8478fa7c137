import pytest
import torch
from laws import seeded

from fewstep.denoiser import Counted, Guided, Wrapped, choose_taps, tapped
from fewstep.methods.families.score_gap import Adversary, GanOptions
from fewstep.nets import FeatureHead, build
from fewstep.path import Straight

SHAPES = {"vector": (6,), "tokens": (5, 6), "picture": (6, 4, 4), "video": (6, 2, 4, 4), "one pixel": (6, 1, 1)}
NETS = {
    "mlp": {"kind": "mlp", "shape": (3,), "width": 16, "depth": 3},
    "unet": {"kind": "unet", "shape": (1, 8, 8), "widths": (8, 16)},
    "unet of one level": {"kind": "unet", "shape": (1, 4, 4), "widths": (8,), "attention": (True,)},
    "dit": {"kind": "dit", "shape": (1, 8, 8), "width": 16, "depth": 4, "heads": 2},
}


class Foreign(torch.nn.Module):
    """A network of diffusers, called as ours are."""

    def __init__(self):
        super().__init__()
        from diffusers import UNet2DModel

        self.unet = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )  # fmt: skip

    def forward(self, x, time, cond=None):
        return self.unet(x, time).sample


def network(name):
    torch.manual_seed(0)
    if name == "diffusers":
        pytest.importorskip("diffusers")
        return Wrapped(Foreign(), Straight(), clock="1000t"), (1, 8, 8)
    return Wrapped(build(NETS[name]), Straight(), clock="1000t"), NETS[name]["shape"]


every_network = pytest.mark.parametrize("name", [*NETS, "diffusers"])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_head_reads_features_of_any_rank(shape):
    feature = torch.randn(3, *shape, generator=seeded(0), requires_grad=True)
    logit = FeatureHead([feature], 8)([feature])
    assert logit.shape == (3, 1)
    logit.sum().backward()
    assert feature.grad.abs().max() > 0


def test_a_head_reads_features_of_several_ranks_at_once():
    features = [torch.randn(3, *shape, generator=seeded(0)) for shape in SHAPES.values()]
    head = FeatureHead(features, 8)
    assert head(features).shape == (3, 1)
    with pytest.raises(ValueError, match="built for 5 features, got 1"):
        head(features[:1])


def test_a_head_reads_a_picture_of_another_size():
    head = FeatureHead([torch.randn(2, 6, 4, 4)], 8)
    assert head([torch.randn(2, 6, 9, 5)]).shape == (2, 1)


def test_blank_features_do_not_break_a_heads_gradient():
    feature = torch.zeros(2, 6, 4, 4, requires_grad=True)
    FeatureHead([feature], 8)([feature]).sum().backward()
    assert feature.grad.isfinite().all()


def test_a_fresh_projection_does_not_look_at_the_label():
    feature = torch.randn(4, 6)
    head = FeatureHead([feature], 8, classes=3)
    labels = torch.tensor([0, 1, 2, 3])
    assert torch.equal(head([feature], labels), head([feature]))
    torch.nn.init.normal_(head.project.weight)
    assert not torch.equal(head([feature], labels), head([feature]))


@pytest.mark.parametrize("count", [1, 2])
@every_network
def test_an_adversary_finds_features_in_any_network(name, count):
    denoiser, shape = network(name)
    adversary = Adversary(denoiser, shape, GanOptions(taps=count, width=8), None)
    assert len(denoiser.taps) == count
    x = torch.randn(3, *shape, requires_grad=True)
    features = denoiser(x, torch.full((3,), 0.4), None, "features")
    assert len(features) == count
    assert all(len(f) == 3 for f in features)
    logit = adversary(features)
    assert logit.shape == (3, 1)
    (slope,) = torch.autograd.grad(logit.sum(), x)
    assert slope.abs().max() > 0


@every_network
def test_features_are_the_same_alone_and_beside_the_guess(name):
    denoiser, shape = network(name)
    Adversary(denoiser, shape, GanOptions(taps=2), None)
    x, t = torch.randn(3, *shape), torch.full((3,), 0.4)
    with torch.no_grad():
        alone = denoiser(x, t, None, "features")
        guess, beside = denoiser(x, t, None, "both")
        assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))
        assert torch.equal(guess, denoiser(x, t))


@every_network
def test_the_network_stops_once_its_features_are_known(name):
    denoiser, shape = network(name)
    Adversary(denoiser, shape, GanOptions(), None)
    net = denoiser.net
    last = [m for m in net.modules() if not list(m.children()) and any(True for _ in m.parameters())][-1]
    reached = []
    handle = last.register_forward_hook(lambda *a: reached.append(1))
    denoiser(torch.randn(2, *shape), 0.4, None, "features")
    assert not reached
    denoiser(torch.randn(2, *shape), 0.4)
    assert reached
    handle.remove()
    assert all(not m._forward_hooks for m in net.modules())  # nothing is left behind


def test_the_deepest_level_of_a_unet_is_read():
    denoiser, shape = network("unet")
    (feature,) = Adversary.choose(denoiser, shape, 1)
    assert feature.shape == (2, 16, 4, 4)


def test_wrappers_around_a_network_are_looked_through():
    denoiser, shape = network("mlp")
    Adversary(Counted(Guided(denoiser, 1.0)), shape, GanOptions(), None)
    assert denoiser.taps


def test_taps_that_were_named_are_kept():
    denoiser, shape = network("mlp")
    denoiser.taps = ("blocks.0",)
    Adversary(denoiser, shape, GanOptions(taps=2), None)
    assert denoiser.taps == ("blocks.0",)


def test_more_taps_than_layers_are_as_many_as_there_are():
    denoiser, shape = network("mlp")
    net, x = denoiser.net, torch.zeros(2, *shape)
    assert len(choose_taps(net, lambda: net(x, torch.ones(2)), 50)) <= 4


def test_a_tap_that_is_not_there_is_refused():
    denoiser, _ = network("mlp")
    with pytest.raises(ValueError, match="no submodule 'blocks.9'"), tapped(denoiser.net, ["blocks.9"]):
        pass
    with pytest.raises(ValueError, match="no taps"), tapped(denoiser.net, []):
        pass


def test_a_network_without_modules_to_read_is_refused():
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, x, time, cond=None):
            return x * self.weight

    with pytest.raises(ValueError, match="found no module"):
        Adversary(Wrapped(Bare(), Straight()), (3,), GanOptions(), None)
