"""Blocks left out: found by what they do, the identity while they are out, and free."""

import copy
import threading

import pytest
import torch
from torch import nn

from fewstep.denoiser import Counted, Guided, Wrapped
from fewstep.nets import build
from fewstep.nets.skipping import flops, leaving_out, network_of, skippable
from fewstep.path import Exploding, Straight
from fewstep.solvers import SolverPlan, StepPlan, sample
from fewstep.student import Student

NETS = {
    "mlp": {"kind": "mlp", "shape": (3,), "width": 16, "depth": 3, "classes": 4},
    "dit": {"kind": "dit", "shape": (1, 8, 8), "width": 16, "depth": 2},
    "unet": {"kind": "unet", "shape": (1, 8, 8), "widths": (8, 16), "groups": 4, "depth": 2, "classes": 4},
}


def small(kind, seed=0):
    """A network with no weight at zero, so that every block matters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = build(NETS[kind]).double().eval()
        for p in net.parameters():
            nn.init.normal_(p, std=0.3)
    return net


def asked(net, seed=0):
    x = torch.randn(2, *net.config.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda: net(x, torch.tensor([0.3, 2.0], dtype=torch.float64))


def test_the_blocks_of_each_of_our_networks_are_found_by_what_they_do():
    mlp, dit, unet = (set(skippable(net, asked(net))) for net in map(small, ("mlp", "dit", "unet")))
    assert mlp == {"blocks.0", "blocks.1", "blocks.2"}
    assert dit == {"blocks.0", "blocks.1"}
    # a block that changes the width has a convolution in its place of x: it is no identity plus something
    assert unet == {
        "down_blocks.0.resnets.0", "down_blocks.0.resnets.1", "down_blocks.1.resnets.1", "down_blocks.1.attentions.0",
        "down_blocks.1.attentions.1", "mid_block.resnets.0", "mid_block.resnets.1", "mid_block.attentions.0",
        "up_blocks.0.attentions.0", "up_blocks.0.attentions.1", "up_blocks.0.attentions.2",
    }  # fmt: skip


@pytest.mark.parametrize(
    "kind, name, branch",
    [
        ("mlp", "blocks.1", "blocks.1.out"),
        ("dit", "blocks.0", "blocks.0.modulate"),  # its gates
        ("unet", "mid_block.resnets.0", "mid_block.resnets.0.conv2"),
        ("unet", "up_blocks.0.attentions.1", "up_blocks.0.attentions.1.to_out.0"),
    ],
)
def test_to_leave_a_block_out_is_to_add_nothing_to_what_enters_it(kind, name, branch):
    net, other = small(kind), small(kind)
    last = other.get_submodule(branch)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    before = asked(net)()
    with leaving_out(net, [name]):
        assert torch.allclose(asked(net)(), asked(other)(), atol=1e-12)
    assert torch.equal(asked(net)(), before)
    assert not torch.allclose(before, asked(other)())


@pytest.mark.parametrize("kind", NETS)
def test_what_is_left_costs_the_whole_less_the_blocks(kind):
    net = small(kind)
    blocks, whole = skippable(net, asked(net)), flops(asked(net))
    for names in ([*blocks][:1], [*blocks][1:3], [*blocks]):
        with leaving_out(net, names):
            assert flops(asked(net)) == whole - sum(blocks[name] for name in names)


def test_a_blocks_cost_is_that_of_its_products():
    net = small("mlp")
    assert set(skippable(net, asked(net)).values()) == {2 * 2 * 3 * 16 * 16}  # 2 rows, 3 layers of 16x16, 2 a product
    dit = small("dit")
    tokens, rows = 16, 2
    products = rows * tokens * (3 + 1 + 4 + 4) * 16 * 16 + rows * 6 * 16 * 16 + rows * 2 * tokens * tokens * 16
    assert set(skippable(dit, asked(dit)).values()) == {2 * products}


def test_the_network_is_found_inside_its_wrappers_and_keeps_its_weights():
    net = small("mlp")
    denoiser = Wrapped(net, Straight())
    for model in (net, denoiser, Counted(Guided(denoiser, 2.0)), Student(denoiser, (3,))):
        assert network_of(model) is net
    with pytest.raises(ValueError, match="holds no network"):
        network_of(lambda x: x)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with leaving_out(denoiser, ["blocks.0"]):
        asked(net)()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_copy_leaves_out_its_own_blocks_and_another_thread_none():
    net = small("mlp")
    with leaving_out(net, ["blocks.0"]):
        without = asked(net)()
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.blocks[0].out.weight.mul_(3.0)
    assert not torch.allclose(asked(twin)(), asked(net)())  # the copy's block is its own
    with leaving_out(twin, ["blocks.0"]):
        assert torch.equal(asked(twin)(), without)
        assert torch.equal(asked(net)(), asked(small("mlp"))())
    seen = []
    with leaving_out(net, ["blocks.0"]):
        other = threading.Thread(target=lambda: seen.append(asked(net)()))
        other.start()
        other.join()
    assert torch.equal(seen[0], asked(small("mlp"))())


def test_only_residual_blocks_can_be_left_out_and_only_by_their_names():
    net = small("unet")
    with pytest.raises(ValueError, match="UNet has no block 'blocks.7'"), leaving_out(net, ["blocks.7"]):
        pass
    for name in ("down_blocks.1.resnets.0", "conv_in", "mid_block.resnets.0.conv1"):
        with leaving_out(net, [name]), pytest.raises(ValueError, match=f"{name!r} is no residual block"):
            asked(net)()

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = small("mlp").blocks[0]

        def forward(self, x):
            return self.block(self.block(x, x), x)

    x = torch.randn(2, 16, dtype=torch.float64)
    shared = Twice()
    assert skippable(shared, lambda: shared(x)) == {}  # one name for two places


class Streams(nn.Module):
    """Two streams joined, changed and parted again, as in joint transformers; it returns them in another order."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, image, *, text, scale):
        both = torch.cat([text, image], 1)
        both = both + self.mix(both) * scale
        return both[:, : text.shape[1]], both[:, text.shape[1] :]


class Joint(nn.Module):
    def __init__(self):
        super().__init__()
        self.streams = Streams()

    def forward(self, image, text):
        return self.streams(image, text=text, scale=torch.full((4,), 2.0))


def test_a_block_of_two_streams_gives_both_back():
    net, image, text = Joint(), torch.randn(2, 5, 4), torch.randn(2, 3, 4)
    assert set(skippable(net, lambda: net(image, text))) == {"streams"}
    with leaving_out(net, ["streams"]):
        first, second = net(image, text)
    assert torch.equal(first, text) and torch.equal(second, image)
    alike = torch.randn(2, 5, 4)  # of one shape: which came out where cannot be told
    assert skippable(Joint(), lambda: Joint()(image, alike)) == {}


def test_each_call_of_a_plan_leaves_out_its_own_blocks():
    denoiser = Wrapped(small("mlp"), Exploding(sigma_min=0.1, sigma_max=10.0))
    names = [("blocks.0",), (), ("blocks.1", "blocks.2")]
    plan = SolverPlan(levels=(None, -1.0, 1.0), steps=tuple(StepPlan(skip=skip) for skip in names))
    assert SolverPlan.model_validate_json(plan.model_dump_json()) == plan
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 10
    with torch.inference_mode():  # a block that is left out before it was ever run
        made = sample(denoiser, x, plan)
    by_hand, times = x, plan.times(denoiser.path)
    for i, skip in enumerate(names):
        with leaving_out(denoiser, skip):
            guess = denoiser(by_hand, times[i])
        by_hand = guess + (by_hand - guess) * times[i + 1] / times[i]
    assert torch.allclose(made, by_hand)
    whole = plan.skipping([()] * 3)
    assert not torch.allclose(sample(denoiser, x, whole), made)
    assert SolverPlan.of(denoiser.path, plan.solver(), times).steps[2].skip == names[2]
    with pytest.raises(ValueError, match="has no block 'blocks.9'"):
        sample(denoiser, x, plan.skipping([("blocks.9",), (), ()]))


@pytest.mark.slow
def test_blocks_of_diffusers_networks_are_found():
    pytest.importorskip("diffusers")
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)
    cases = []
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8, cross_attention_dim=8, attention_head_dim=4,
    ).eval()  # fmt: skip
    cases.append((unet, lambda: unet(x, torch.tensor(3.0), text)[0], {
        "down_blocks.0.resnets.0", "down_blocks.0.attentions.0.transformer_blocks.0", "mid_block.resnets.0",
        "mid_block.resnets.1", "mid_block.attentions.0.transformer_blocks.0",
        "up_blocks.1.attentions.0.transformer_blocks.0", "up_blocks.1.attentions.1.transformer_blocks.0",
    }))  # fmt: skip
    sd3 = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
    ).eval()  # fmt: skip
    cases.append((sd3, lambda: sd3(x, text, torch.ones(2, 8), torch.ones(2))[0],
                  {"transformer_blocks.0", "transformer_blocks.1"}))  # fmt: skip
    flux = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    tokens = torch.randn(2, 16, 4)
    cases.append((flux, lambda: flux(
        tokens, text, torch.ones(2, 8), torch.ones(2), torch.zeros(16, 3), torch.zeros(5, 3)
    )[0], {"transformer_blocks.0", "single_transformer_blocks.0"}))  # fmt: skip
    for net, run, names in cases:
        with torch.no_grad():
            blocks, whole, before = skippable(net, run), flops(run), run()
            assert set(blocks) == names
            with leaving_out(net, names):
                assert flops(run) == whole - sum(blocks.values())
                assert not torch.allclose(run(), before)
            assert torch.equal(run(), before)
