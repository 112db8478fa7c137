import pytest
import torch
from laws import seeded

from fewstep.errors import Refused
from fewstep.nets import build, config_of, inherited, parameters_of, resized
from fewstep.nets.base import sinusoids

KINDS = {
    "mlp": {"kind": "mlp", "shape": (3,), "width": 16, "depth": 2},
    "mlp of pictures": {"kind": "mlp", "shape": (1, 4, 4), "width": 16, "depth": 1},
    "dit": {"kind": "dit", "shape": (1, 8, 8), "width": 16, "depth": 2, "heads": 2},
    "dit of wide pictures": {"kind": "dit", "shape": (3, 4, 8), "width": 16, "depth": 1, "heads": 4, "patch": 4},
    "unet": {"kind": "unet", "shape": (1, 8, 8), "widths": (8, 16)},
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def made(kind, **more):
    torch.manual_seed(0)
    net = build({**kind, **more})
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval()


def question(net, count=4):
    return torch.randn(count, *net.config.shape, generator=seeded(1)), torch.linspace(1, 900, count)


@every_kind
def test_the_answer_has_the_shape_of_the_sample(kind):
    net = made(kind)
    x, time = question(net)
    assert net(x, time).shape == x.shape
    assert net(x[:1], time[:1]).shape == x[:1].shape


@every_kind
def test_rows_do_not_know_each_other(kind):
    net = made(kind, classes=3)
    x, time = question(net)
    labels = torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        assert torch.allclose(net(x, time, labels)[1:2], net(x[1:2], time[1:2], labels[1:2]), atol=1e-5)


@every_kind
def test_time_label_and_span_each_change_the_answer(kind):
    net = made(kind, classes=3, reads_s=True)
    x, time = question(net)
    labels, span = torch.tensor([0, 1, 2, 0]), torch.full((4,), 0.3)
    with torch.no_grad():
        answer = net(x, time, labels, span)
        assert not torch.allclose(net(x, time + 20, labels, span), answer, atol=1e-5)
        assert not torch.allclose(net(x, time, (labels + 1) % 3, span), answer, atol=1e-5)
        assert not torch.allclose(net(x, time, labels, span + 0.6), answer, atol=1e-5)


@every_kind
def test_no_condition_is_the_label_past_the_last(kind):
    net = made(kind, classes=3)
    x, time = question(net)
    with torch.no_grad():
        assert torch.equal(net(x, time), net(x, time, net.null(torch.zeros(4, dtype=torch.long))))


@every_kind
def test_a_fresh_span_embedding_is_silent(kind):
    torch.manual_seed(0)
    net = build({**kind, "reads_s": True})
    x, time = question(net)
    with torch.no_grad():
        assert torch.equal(net(x, time, None, torch.rand(4)), net(x, time))


@every_kind
def test_the_derivative_in_the_length_of_a_jump_is_not_dominated_by_fast_waves(kind):
    """Average velocities are learned through it: a wave of 1000 radians would drown them."""
    net = made(kind, reads_s=True).double()
    x, time = question(net)
    x, time = x.double(), time.double()
    span = torch.full((4,), 0.5, dtype=torch.float64)
    step = 1e-3
    with torch.no_grad():
        low, mid, high = (net(x, time, None, span + by) for by in (-step, 0, step))
    first, second = (high - low).abs().max() / (2 * step), (high - 2 * mid + low).abs().max() / step**2
    assert 0 < second < 10 * first


@every_kind
def test_every_parameter_learns(kind):
    net = made(kind, classes=3, reads_s=True)
    x, time = question(net)
    net(x, time, torch.tensor([0, 1, 2, 3]), torch.rand(4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


@every_kind
def test_it_runs_in_double_precision(kind):
    net = made(kind).double()
    x, time = question(net)
    assert net(x.double(), time.double()).dtype == torch.float64


@every_kind
def test_a_description_survives_json(kind):
    config = config_of(kind)
    assert config_of(config.model_dump(mode="json")) == config
    assert config_of(config) is config


def test_waves_are_cosines_then_sines_from_fast_to_slow():
    time = torch.tensor([0.0, 1.0, 7.0])
    waves = sinusoids(time, 4, period=100.0)
    wanted = torch.stack([time.cos(), (time / 10).cos(), time.sin(), (time / 10).sin()], 1)
    assert torch.allclose(waves, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "dit", "shape": (1, 8, 8), "width": 18, "heads": 4}, "18 is not a multiple"),
        ({"kind": "dit", "shape": (1, 9, 8)}, "9x8 has no whole patches of 2"),
        ({"kind": "dit", "shape": (1, 8)}, "shape"),
        ({"kind": "mlp"}, "shape"),
        ({"kind": "mlp", "shape": (2,), "wdith": 3}, "wdith"),
        ({"kind": "transformer"}, "transformer"),
    ],
)
def test_a_description_that_cannot_be_built_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        build(wrong)


def test_a_fresh_transformer_says_nothing_yet():
    net = build(KINDS["dit"])
    x, time = question(net)
    assert net(x, time).abs().max() == 0


def test_a_transformer_knows_where_its_patches_are():
    net = made(KINDS["dit"])
    x, time = question(net)
    with torch.no_grad():
        moved = net(x.roll(2, 3), time).roll(-2, 3)
        assert not torch.allclose(moved, net(x, time), atol=1e-4)


# -- sizes --------------------------------------------------------------------------------------

LARGER = {
    "mlp": {"kind": "mlp", "shape": (3,), "width": 64, "depth": 4},
    "dit": {"kind": "dit", "shape": (1, 8, 8), "width": 64, "depth": 4, "heads": 4},
    "unet": {"kind": "unet", "shape": (1, 8, 8), "widths": (32, 64), "depth": 2, "head_width": 32},
}
every_larger = pytest.mark.parametrize("kind", LARGER.values(), ids=LARGER)


@every_larger
@pytest.mark.parametrize("size", [0.5, 0.25, 0.1])
def test_a_smaller_network_has_at_most_the_share_of_parameters_and_no_wider_one_has(kind, size):
    whole = config_of(kind)
    small = resized(whole, size)
    assert parameters_of(small) == sum(p.numel() for p in build(small).parameters()) <= size * parameters_of(whole)
    top, step = small.widest()
    assert parameters_of(whole.scaled(top + whole.widest()[1], small.depth)) > size * parameters_of(whole)
    assert small.depth <= whole.depth and top < whole.widest()[0]
    x = torch.zeros(2, *small.shape)
    assert build(small)(x, torch.ones(2)).shape == x.shape


@pytest.mark.parametrize(
    ("widths", "attention", "width", "head", "found"),
    [
        ((24, 48), (False, True), 22, 48, 22),  # one head stays one
        ((24, 48), (False, True), 24, 8, 8),  # heads keep their width
        ((24, 48), (False, True), 20, 8, 10),  # or become wider
        ((24, 48), (True, True), 20, 24, 10),  # what divides both widths, 10 and 20
        ((24, 48), (False, False), 22, 48, 22),  # in the middle alone
    ],
)
def test_heads_of_a_narrower_network_are_as_wide_as_they_were_where_they_can_be(widths, attention, width, head, found):
    whole = config_of({
        "kind": "unet", "shape": (1, 8, 8), "widths": widths, "attention": attention, "head_width": head, "groups": 4,
    })  # fmt: skip
    small = whole.scaled(width, 1)
    assert (small.head_width, small.widths[-1]) == (found, width)
    assert build(small)(torch.zeros(1, 1, 8, 8), torch.ones(1)).shape == (1, 1, 8, 8)


def test_a_size_that_is_none_or_that_no_network_has_is_refused():
    whole = config_of(KINDS["mlp"])
    assert resized(whole, 1.0) is whole
    for size in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"share of the parameters in \(0, 1\]"):
            resized(whole, size)
    with pytest.raises(ValueError, match="take a larger size"):
        resized(whole, 1e-4)


@every_larger
def test_a_network_of_equal_size_inherits_everything_and_a_smaller_one_even_channels(kind):
    whole = made(kind, classes=3)
    twin = build(whole.config)
    assert inherited(twin, whole) == len(whole.state_dict())
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in whole.state_dict().items())
    half = build(whole.config.scaled(whole.config.widest()[0] // 2, whole.config.depth))
    taken = inherited(half, whole)
    assert taken == len(half.state_dict())
    for name, own in half.state_dict().items():
        value = whole.state_dict()[name]
        for side, length in enumerate(own.shape):
            assert value.shape[side] in (length, 2 * length) or "norm" in name
            value = value.index_select(side, torch.arange(0, value.shape[side], value.shape[side] // length))
        assert torch.equal(own, value), name


def test_what_a_smaller_network_inherits_is_a_start():
    """On a task that the larger one has learned the smaller one begins better than a fresh one."""
    torch.manual_seed(0)
    whole = build({"kind": "mlp", "shape": (4,), "width": 64, "depth": 2})
    fresh, heir = (build({"kind": "mlp", "shape": (4,), "width": 48, "depth": 2}) for _ in range(2))
    x, time = torch.randn(256, 4, generator=seeded(0)), torch.ones(256)
    wanted = x.roll(1, 1) * 2 + 1
    optimiser = torch.optim.Adam(whole.parameters(), 1e-2)
    for _ in range(200):
        optimiser.zero_grad()
        (whole(x, time) - wanted).square().mean().backward()
        optimiser.step()
    inherited(heir, whole)
    with torch.no_grad():
        errors = {
            name: (net(x, time) - wanted).square().mean().item() for name, net in (("heir", heir), ("fresh", fresh))
        }
    assert errors["heir"] < 0.8 * errors["fresh"], errors


@pytest.mark.parametrize(
    "kind",
    [
        {"kind": "mlp", "width": 16, "depth": 1},
        {"kind": "unet", "widths": (8, 16)},
        {"kind": "unet", "widths": (8,), "attention": (False,), "patch": 2, "groups": 4},
        {"kind": "dit", "width": 32, "depth": 1},
    ],
    ids=lambda kind: kind["kind"],
)
def test_a_network_reads_parts_of_the_condition_beside_the_sample(kind):
    torch.manual_seed(0)
    net = build({"shape": (1, 4, 4), "classes": 3, "beside": {"low": 1, "mask": 2}, **kind})
    for value in net.parameters():  # some begin at zero
        torch.nn.init.normal_(value, std=0.2)
    x, time = torch.randn(2, 1, 4, 4), torch.tensor([10.0, 500.0])
    cond = {"low": torch.randn(2, 1, 4, 4), "mask": torch.randn(2, 2, 4, 4), "label": torch.tensor([0, 2])}
    answer = net(x, time, cond)
    assert answer.shape == x.shape
    for name, value in cond.items():
        other = {**cond, name: value.roll(1, 0)}
        assert not torch.allclose(net(x, time, other), answer), name
    assert torch.equal(net(x, time, {**cond, "text": torch.zeros(2, 5)}), answer), "other parts are for others"
    nothing = {k: torch.zeros_like(v) for k, v in cond.items()} | {"label": torch.tensor([3, 3])}
    assert torch.allclose(net(x, time, None), net(x, time, nothing), atol=1e-6)
    null = net.null(cond)
    assert null["label"].tolist() == [3, 3] and null["low"] is cond["low"]
    with pytest.raises(Refused, match="the condition has no 'mask': its parts are label, low"):
        net(x, time, {k: cond[k] for k in ("low", "label")})
    with pytest.raises(ValueError, match=r"reads 'low' as \[1, 4, 4\], got \[1, 2, 2\]"):
        net(x, time, {**cond, "low": torch.zeros(2, 1, 2, 2)})
    with pytest.raises(ValueError, match="conditioned on labels"):
        net(x, time, {k: cond[k] for k in ("low", "mask")})
    assert build(net.config.model_dump(mode="json")).load_state_dict(net.state_dict())
    if kind["kind"] == "unet" and "patch" not in kind:
        with pytest.raises(ValueError, match="no stock pipeline"):
            net.config.to_diffusers()
