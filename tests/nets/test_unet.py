import pytest
import torch
from laws import seeded

from fewstep.nets import UNet, UNetConfig, build, config_of

CONFIGS = {
    "digits": {"shape": (1, 8, 8), "widths": (16, 32), "classes": 10},
    "no labels": {"shape": (1, 8, 8), "widths": (16, 32)},
    "three levels": {"shape": (3, 16, 16), "widths": (8, 16, 16), "depth": 2, "attention": (False, True, True)},
    "scale and shift": {"shape": (3, 8, 8), "widths": (16, 16), "scale_shift": True, "groups": 4, "classes": 2},
    "no attention": {"shape": (1, 8, 16), "widths": (8, 24), "attention": (False, False), "mid_attention": False},
    "one level": {"shape": (2, 6, 6), "widths": (16,), "attention": (True,), "head_width": 16},
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def unet(config, seed=0):
    """A U-Net whose every parameter is random, those that start at zero too."""
    torch.manual_seed(seed)
    net = build({"kind": "unet", **config})
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net.eval()


def question(net, count=3):
    rng = seeded(1)
    x = torch.randn(count, *net.config.shape, generator=rng)
    classes = net.config.classes
    labels = None if classes is None else torch.arange(count) % (classes + 1)
    return x, torch.tensor([0.5, 40.0, 999.0])[:count], labels


@every_config
def test_it_is_the_unet2dmodel_of_diffusers_with_the_same_weights(config):
    diffusers = pytest.importorskip("diffusers")
    net = unet(config)
    other = diffusers.UNet2DModel(**net.config.to_diffusers()).eval()
    other.load_state_dict(net.state_dict())  # strict: every name and shape
    x, time, labels = question(net)
    with torch.no_grad():
        ours, theirs = net(x, time, labels), other(x, time, class_labels=labels).sample
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        next(net.up_blocks[0].parameters()).add_(0.1)
        assert not torch.allclose(net(x, time, labels), theirs, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_unet2dmodel():
    diffusers = pytest.importorskip("diffusers")
    net = unet(CONFIGS["digits"])
    other = diffusers.UNet2DModel(**net.config.to_diffusers()).eval()
    other.load_state_dict(net.state_dict())
    x, time, labels = question(net)
    net(x, time, labels).square().mean().backward()
    other(x, time, class_labels=labels).sample.square().mean().backward()
    theirs = {name: p.grad for name, p in other.named_parameters()}
    for name, p in net.named_parameters():
        assert torch.allclose(p.grad, theirs[name], rtol=1e-3, atol=1e-5), name


@every_config
def test_no_condition_is_the_last_label(config):
    net = unet(config)
    x, time, _ = question(net)
    with torch.no_grad():
        free = net(x, time)
        assert free.shape == x.shape
        if net.config.classes is not None:
            assert torch.equal(free, net(x, time, torch.full((3,), net.config.classes)))
            assert not torch.equal(free, net(x, time, torch.zeros(3, dtype=torch.long)))


def test_a_span_whose_embedding_is_new_leaves_the_teachers_function():
    torch.manual_seed(0)
    teacher = build({"kind": "unet", **CONFIGS["digits"]})
    student = build({"kind": "unet", **CONFIGS["digits"], "reads_s": True})
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("span_embedding") for name in missing)
    x, time, labels = question(teacher)
    with torch.no_grad():
        for span in (None, torch.zeros(3), torch.rand(3)):
            assert torch.equal(student(x, time, labels, span), teacher(x, time, labels))


@pytest.mark.parametrize("span", [0.0, 0.4, 1.0])
def test_one_length_of_jump_folds_into_a_plain_unet2dmodel(span):
    diffusers = pytest.importorskip("diffusers")
    net = unet({**CONFIGS["digits"], "reads_s": True})
    folded = net.fold(span)
    assert not folded.reads_s
    x, time, labels = question(net)
    other = diffusers.UNet2DModel(**folded.config.to_diffusers()).eval()
    other.load_state_dict(folded.state_dict())
    with torch.no_grad():
        wanted = net(x, time, labels, torch.full((3,), span))
        assert torch.allclose(folded(x, time, labels), wanted, rtol=1e-4, atol=1e-5)
        assert torch.allclose(other(x, time, class_labels=labels).sample, wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(net(x, time, labels, torch.full((3,), span + 0.3)), wanted, rtol=1e-4, atol=1e-5)


def test_a_network_that_reads_no_span_is_folded_already():
    net = unet(CONFIGS["digits"])
    assert net.fold(0.5) is net


def test_patches_are_folded_into_channels_and_back():
    net = unet({"shape": (1, 16, 16), "widths": (8, 16), "patch": 2})
    x, time, _ = question(net)
    with torch.no_grad():
        assert net(x, time).shape == x.shape
        net.conv_out.weight.zero_()
        net.conv_out.bias.copy_(torch.arange(4.0))  # one number for each pixel of a patch
        assert net(x, time)[0, 0, :2, :2].tolist() == [[0.0, 1.0], [2.0, 3.0]]
    with pytest.raises(ValueError, match="patch = 1"):
        net.config.to_diffusers()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attention": (True,)}, "1 entries for 2 widths"),
        ({"widths": (16, 30), "attention": (False, False)}, "30 is not a multiple of groups = 8"),
        ({"head_width": 5}, "32 is not a multiple of head_width = 5"),
        ({"shape": (1, 9, 8)}, "9x8 cannot be halved to 2 levels"),
        ({"patch": 3}, "8x8 cannot be halved"),
        ({"widhts": (16, 32)}, "widhts"),
        ({"depth": 0}, "depth"),
    ],
)
def test_a_description_that_cannot_be_built_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        config_of({"kind": "unet", **CONFIGS["digits"], **wrong})


def test_a_condition_that_is_no_label_is_refused():
    net = unet(CONFIGS["digits"])
    with pytest.raises(ValueError, match="labels"):
        net(*question(net)[:2], {"text": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match="no labels"):
        unet(CONFIGS["no labels"]).null(torch.zeros(3, dtype=torch.long))


def test_the_description_survives_json_and_builds_the_same_names():
    net = unet(CONFIGS["scale and shift"])
    config = UNetConfig.model_validate_json(net.config.model_dump_json())
    assert config == net.config
    assert UNet(config).state_dict().keys() == net.state_dict().keys()
