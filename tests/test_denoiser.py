import math

import pytest
import torch
from laws import PATHS, draw, finite_set, gaussian, inner_times, mixture, seeded
from torch import nn

from fewstep.denoiser import CLOCKS, Clipped, Counted, Guided, Reframed, Wrapped, choose_taps, clock_of, tapped
from fewstep.path import PREDICTIONS, Exploding, Straight, Tabulated, VariancePreserving

every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
EDM = Exploding(sigma_min=0.002, sigma_max=80.0)


class Says(nn.Module):
    """A network that remembers what it was asked and answers with its weight times the input."""

    def __init__(self, reads_s=False):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.reads_s, self.asked = reads_s, []

    def forward(self, x, clock, cond=None, span=None):
        self.asked.append((x, clock, cond, span))
        return self.weight * x


def noisy(rows=4, seed=0):
    return torch.randn(rows, 3, generator=seeded(seed), dtype=torch.float64)


def null(law):
    return lambda cond: torch.full_like(cond, law.classes)


# -- wrapped networks --------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@every_path
def test_a_network_is_read_as_what_it_predicts(path, prediction):
    net, x, t = Says(), noisy(), inner_times(path)[3].item()
    model = Wrapped(net, path, prediction)
    assert torch.allclose(model(x, t, want=prediction), 0.7 * x)
    assert torch.allclose(model(x, t), path.convert(0.7 * x, x, t, prediction, "x0"), atol=1e-10)
    assert torch.equal(model.velocity(x, t), model(x, t, want="velocity"))


def test_edm_s_preconditioning_is_its_table_1():
    net, x, sd = Says(), noisy(), 0.5
    model = Wrapped(net, EDM, "edm", "log_sigma/4", scale_input=True, data_std=sd)
    for sigma in (0.002, 0.3, 7.0, 80.0):
        c_in, c_noise = 1 / math.sqrt(sigma**2 + sd**2), math.log(sigma) / 4
        c_skip, c_out = sd**2 / (sigma**2 + sd**2), sigma * sd / math.sqrt(sigma**2 + sd**2)
        assert torch.allclose(model(x, sigma), c_skip * x + c_out * 0.7 * c_in * x, atol=1e-14)
        entry, clock, _, _ = net.asked[-1]
        assert torch.allclose(entry, c_in * x, atol=1e-14)
        assert clock.tolist() == pytest.approx([c_noise] * 4)


def test_edm_s_network_sees_and_aims_at_unit_variance():
    """What Table 1 was made for, here by sums of independent variances: data of spread sd, noise of spread sigma."""
    sd = 0.6
    for sigma in (0.01, 0.5, 20.0):
        skip, c_in = (  # read off the wrapper: a silent network leaves c_skip x, an echoing one shows c_in
            Wrapped(_Constant(0.0), EDM, "edm", data_std=sd)(torch.ones(1, 1).double(), sigma).item(),
            1 / math.sqrt(sigma**2 + sd**2),
        )
        out = Wrapped(_Constant(1.0), EDM, "edm", data_std=sd)(torch.zeros(1, 1).double(), sigma).item()
        assert c_in**2 * (sd**2 + sigma**2) == pytest.approx(1)
        assert ((1 - skip) ** 2 * sd**2 + skip**2 * sigma**2) / out**2 == pytest.approx(1, abs=1e-12)


class _Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x, clock, cond=None):
        return torch.full_like(x, self.value)


def test_consistency_s_preconditioning_is_the_one_of_its_scheduler():
    net, x, sd, low = Says(), noisy(), 0.75, 0.002
    model = Wrapped(net, EDM, "cm", "250 log_sigma", data_std=sd, boundary=low)
    for sigma in (0.002, 0.3, 7.0, 80.0):
        c_skip = sd**2 / ((sigma - low) ** 2 + sd**2)
        c_out = (sigma - low) * sd / math.sqrt(sigma**2 + sd**2)
        assert torch.allclose(model(x, sigma), c_skip * x + c_out * 0.7 * x, atol=1e-13)
        assert net.asked[-1][1].tolist() == pytest.approx([250 * math.log(sigma + 1e-44)] * 4)


def test_at_the_boundary_the_guess_is_the_sample_whatever_the_network_says():
    x = noisy()
    model = Wrapped(_Constant(1e6), EDM, "cm", data_std=0.75, boundary=0.002)
    assert torch.equal(model(x, 0.002), x)
    assert not torch.allclose(Wrapped(_Constant(1e6), EDM, "edm", data_std=0.75)(x, 0.002), x)  # the broken twin


def test_scaled_input_has_unit_variance_on_every_path():
    sd = 0.4
    for path in PATHS.values():
        net, t = Says(), inner_times(path)[2].item()
        Wrapped(net, path, "v", scale_input=True, data_std=sd)(torch.ones(1, 3).double(), t)
        alpha, sigma, _, _ = path.coefs(t)
        assert net.asked[0][0][0, 0] ** 2 * (alpha**2 * sd**2 + sigma**2) == pytest.approx(1)


def test_preconditioning_for_exploding_paths_is_refused_on_others():
    with pytest.raises(ValueError, match="'cm' needs the exploding path, got Straight"):
        Wrapped(Says(), Straight(), "cm")


def test_clocks_read_what_they_are_called():
    t = torch.tensor([0.25, 1.0], dtype=torch.float64)
    vp = VariancePreserving()
    assert clock_of("t", vp, t).tolist() == [0.25, 1.0]
    assert clock_of("999t", vp, t).tolist() == [249.75, 999.0]
    assert clock_of("1000t", vp, t).tolist() == [250.0, 1000.0]
    assert clock_of("index", vp, t).tolist() == [249.0, 999.0]
    assert clock_of("index", Tabulated(alphas_cumprod=(0.9, 0.5, 0.2, 0.1)), t).tolist() == [0.0, 3.0]
    assert clock_of("log_sigma/4", EDM, t).tolist() == pytest.approx([math.log(0.25) / 4, 0.0])
    assert clock_of("250 log_sigma", EDM, t).tolist() == pytest.approx([250 * math.log(0.25), 0.0])
    with pytest.raises(ValueError, match="unknown clock 'tick'"):
        clock_of("tick", vp, t)


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_network_reads_one_time_a_row_in_single_precision_or_better(clock):
    net = nn.Module()
    net.forward = lambda x, clock, cond=None: seen.append(clock) or x
    seen = []
    for t in (0.5, torch.tensor(0.5), torch.full((3,), 0.5)):
        Wrapped(net, EDM, "eps", clock)(torch.ones(3, 2, dtype=torch.bfloat16), t)
    assert all(c.shape == (3,) and c.dtype == torch.float32 for c in seen)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_a_network_that_reads_s_is_given_the_length_of_the_jump():
    net, x = Says(reads_s=True), noisy(2)
    model = Wrapped(net, Straight(), "flow")
    model(x, 0.8, want="flow", s=0.3)
    model(x, torch.tensor([0.8, 0.5]), want="flow", s=torch.tensor([0.3, 0.5]))
    assert net.asked[0][3].tolist() == pytest.approx([0.5, 0.5])
    assert net.asked[1][3].tolist() == pytest.approx([0.5, 0.0])
    model(x, 0.8)  # a plain guess is that of no jump: the instantaneous one
    assert net.asked[2][3].tolist() == [0.0, 0.0]
    plain = Says()
    Wrapped(plain, Straight(), "flow")(x, 0.8, s=0.3)
    assert plain.asked[0][3] is None


@every_path
def test_the_length_of_a_jump_is_told_in_straight_time_on_every_path(path):
    net, (s, t) = Says(reads_s=True), inner_times(path)[[2, 5]].tolist()
    Wrapped(net, path, "x0")(noisy(2), t, s=s)
    straight = Straight()
    there = [straight.time(path.lam(u)).item() for u in (t, s)]
    assert net.asked[0][3].tolist() == pytest.approx([there[0] - there[1]] * 2)


def test_the_condition_reaches_the_network():
    net, labels = Says(), torch.tensor([1, 2])
    Wrapped(net, Straight())(noisy(2), 0.5, labels)
    assert net.asked[0][2] is labels


# -- guidance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("want", ["x0", "eps", "velocity", "score"])
def test_guidance_is_its_formula_in_one_call(want):
    law = mixture(classes=True)
    counted = Counted(law)
    x, labels = draw(law, 5, 0.5), torch.tensor([0, 1, 0, 1, 2])
    plain, other = law(x, 0.5, want=want), law(x, 0.5, labels, want)
    guided = Guided(counted, 3.0, null(law))(x, 0.5, labels, want)
    assert torch.allclose(guided, plain + 3.0 * (other - plain), atol=1e-10)
    assert (counted.calls, counted.images) == (1, 10)


def test_guidance_towards_the_negative_itself_does_nothing():
    law = mixture(classes=True)
    x, labels = draw(law, 4, 0.5), torch.tensor([0, 1, 0, 2])
    assert torch.allclose(Guided(law, 7.0, lambda cond: cond)(x, 0.5, labels), law(x, 0.5, labels), atol=1e-12)


def test_guidance_of_scale_one_is_the_teacher_at_its_own_price():
    counted = Counted(mixture(classes=True))
    x, labels = noisy(3)[:, :2], torch.tensor([0, 1, 0])
    assert torch.equal(Guided(counted, 1.0, null(counted.inner))(x, 0.5, labels), counted.inner(x, 0.5, labels))
    assert counted.images == 3


def test_guidance_asks_the_network_for_its_no_condition():
    net = Says()
    net.null = lambda cond: torch.full_like(cond, 10)
    Guided(Counted(Wrapped(net, Straight())), 2.0)(noisy(2), 0.5, torch.tensor([3, 4]))
    assert net.asked[0][2].tolist() == [3, 4, 10, 10]
    with pytest.raises(ValueError, match="no negative condition"):
        Guided(Wrapped(Says(), Straight()), 2.0)(noisy(2), 0.5, torch.tensor([3, 4]))


def test_guidance_of_scale_zero_is_the_negative():
    law = mixture(classes=True)
    x, labels = noisy(3)[:, :2], torch.tensor([0, 1, 0])
    assert torch.allclose(Guided(law, 0.0, null(law))(x, 0.5, labels), law(x, 0.5), atol=1e-12)


def test_guidance_outside_its_interval_costs_nothing_and_does_nothing():
    law = mixture(classes=True)
    counted = Counted(law)
    guided = Guided(counted, 4.0, null(law), interval=(0.2, 0.6))
    x, labels = noisy(3)[:, :2], torch.tensor([0, 1, 0])
    for t in (0.1, 0.2, 0.7):
        assert torch.equal(guided(x, t, labels), law(x, t, labels))
    assert counted.images == 9
    assert not torch.allclose(guided(x, 0.6, labels), law(x, 0.6, labels))
    assert counted.images == 15


def test_rows_with_their_own_times_are_guided_each_by_the_interval():
    law = mixture(classes=True)
    guided = Guided(law, 4.0, null(law), interval=(0.2, 0.6))
    x, labels, t = noisy(3)[:, :2], torch.tensor([0, 1, 0]), torch.tensor([0.1, 0.4, 0.7]).double()
    rows = [guided(x[i : i + 1], t[i].item(), labels[i : i + 1]) for i in range(3)]
    assert torch.allclose(guided(x, t, labels), torch.cat(rows), atol=1e-12)


# -- counting and clipping ---------------------------------------------------------------------


def test_counting_changes_no_answer():
    law = mixture()
    counted, x = Counted(law), noisy()[:, :2]
    for want in ("x0", "eps", "score"):
        assert torch.equal(counted(x, 0.5, want=want), law(x, 0.5, want=want))
    counted.velocity(x, 0.5)
    assert (counted.calls, counted.images) == (4, 16)


def test_clipping_holds_the_guess_and_every_other_prediction_with_it():
    law, path = gaussian(), Straight()
    clipped, x = Clipped(law, -1.0, 1.0), 5 * noisy()[:, :2]
    guess = law(x, 0.5).clamp(-1, 1)
    assert law(x, 0.5).abs().max() > 1
    assert torch.equal(clipped(x, 0.5), guess)
    for want in ("eps", "v", "velocity", "score"):
        read = clipped(x, 0.5, want=want)
        assert torch.allclose(path.convert(read, x, 0.5, want, "x0"), guess, atol=1e-12)


def test_clipping_a_guess_inside_the_range_changes_nothing():
    law, x = gaussian(), noisy()[:, :2]
    assert torch.allclose(Clipped(law, -50, 50)(x, 0.5, want="velocity"), law.velocity(x, 0.5), atol=1e-12)


def test_an_empty_range_is_refused():
    with pytest.raises(ValueError, match="low < high, got 1 and 1"):
        Clipped(gaussian(), 1, 1)


# -- one path seen on another ------------------------------------------------------------------


@pytest.mark.parametrize("make", [gaussian, mixture, finite_set])
@pytest.mark.parametrize("inner", PATHS.values(), ids=PATHS)
def test_a_denoiser_of_one_path_is_exact_on_every_other(inner, make):
    for path in PATHS.values():
        there, seen = make(path=path), Reframed(make(path=inner), path)
        low, high = (max(f(inner), f(path)) for f in (lambda p: -p.lam(p.t_low), lambda p: -p.lam(p.t_low)))
        high = min(-p.lam(0.97 * p.t_max) for p in (inner, path))
        t = path.time(-(low + 1e-3 + (high - low - 2e-3) * torch.linspace(0, 1, 5).double()))
        x = draw(there, 5, t)
        for want in ("x0", "eps", "score", "velocity"):
            exact, read = there(x, t, want=want), seen(x, t, want=want)
            assert torch.allclose(read, exact, rtol=1e-6, atol=1e-6 * exact.abs().max().item()), (path, want)
        one = seen(x[2:3], t[2].item())
        assert torch.allclose(one, there(x[2:3], t[2].item()), atol=1e-6)


def test_asking_at_the_same_time_instead_of_the_same_noise_ratio_is_wrong():
    """Broken twin of the reframing."""
    law, path = mixture(Straight()), VariancePreserving()
    x = draw(mixture(path), 5, 0.4)
    assert not torch.allclose(law(x, 0.4), mixture(path)(x, 0.4), atol=1e-2)


def test_a_level_beyond_the_noisiest_is_asked_at_the_noisiest():
    inner, x = Counted(mixture(Exploding(sigma_max=5.0))), noisy()[:, :2]
    seen = Reframed(inner, Straight())
    assert seen.match(1.0, x) == 5.0
    assert seen(x, 1.0).isfinite().all()


def test_a_reframed_flow_map_is_told_both_ends_of_the_jump():
    net = Says(reads_s=True)
    model = Reframed(Wrapped(net, EDM, "x0"), Straight())
    model(noisy(2), 0.8, s=0.5)
    assert net.asked[0][1].tolist() == pytest.approx([4.0, 4.0])
    assert net.asked[0][3].tolist() == pytest.approx([0.3, 0.3])  # from sigma 4 to sigma 1, in straight time


# -- features ----------------------------------------------------------------------------------


class Alarm(nn.Module):
    """A part that must never run."""

    def forward(self, x):
        raise AssertionError("this part was to be skipped")


class Net(nn.Module):
    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x, clock, cond=None):
        return self.decoder(self.encoder(x))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.enter, self.body, self.leave = nn.Linear(3, 8), nn.TransformerEncoder(layer, 3), nn.Linear(8, 3)

    def forward(self, x, clock, cond=None):
        return self.leave(self.body(self.enter(x)))


class Block(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.conv, self.act = nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()

    def forward(self, x):
        return self.act(self.conv(x))


class Hourglass(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.deep = Block(3, 8), Block(8, 16)
        self.up = nn.Sequential(nn.Upsample(scale_factor=4), nn.Conv2d(16, 3, 3, padding=1))

    def forward(self, x, clock, cond=None):
        return self.up(self.deep(self.down(x)))


class Plain(nn.Sequential):
    def forward(self, x, clock, cond=None):
        return super().forward(x)


def mlp():
    return Plain(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 3))


NETS = {
    "mlp": (mlp, (3,)),
    "conv": (Hourglass, (3, 8, 8)),
    "transformer": (Attending, (5, 3)),
}
every_net = pytest.mark.parametrize(("make", "shape"), NETS.values(), ids=NETS)


@pytest.mark.parametrize("count", [1, 2])
@every_net
def test_features_are_found_in_any_network(make, shape, count):
    net, x = make().eval(), torch.randn(4, *shape)
    taps = choose_taps(net, lambda: net(x, None), count)
    assert len(taps) == len(set(taps)) <= count
    with torch.no_grad():
        answer, features = Wrapped(net, Straight(), taps=taps)(x, 0.5, want="both")
    assert torch.allclose(answer, net(x, None), atol=1e-5)
    assert len(features) == len(taps)
    for feature in features:
        assert feature.shape[0] == 4
        assert feature.std() > 0
        assert feature.shape != answer.shape  # something inside, not the answer again


@every_net
def test_features_carry_gradients_to_the_sample(make, shape):
    net, x = make(), torch.randn(2, *shape, requires_grad=True)
    taps = choose_taps(net, lambda: net(x, None))
    features = Wrapped(net, Straight(), taps=taps)(x, 0.5, want="features")
    sum(f.square().sum() for f in features).backward()
    assert x.grad.abs().max() > 0


@every_net
def test_features_alone_are_those_of_a_whole_run(make, shape):
    net, x = make().eval(), torch.randn(2, *shape)
    taps = choose_taps(net, lambda: net(x, None), 2)
    model = Wrapped(net, Straight(), taps=taps)
    with torch.no_grad():
        for alone, whole in zip(model(x, 0.5, want="features"), model(x, 0.5, want="both")[1], strict=True):
            assert torch.equal(alone, whole)


def test_the_deepest_part_of_an_hourglass_is_chosen():
    net = Hourglass()
    assert choose_taps(net, lambda: net(torch.randn(2, 3, 8, 8), None))[0].startswith("deep")


def test_nothing_runs_after_the_last_feature():
    model = Wrapped(Net(nn.Linear(3, 8), Alarm()), Straight(), taps=("encoder",))
    assert model(torch.ones(2, 3), 0.5, want="features")[0].shape == (2, 8)
    with pytest.raises(AssertionError, match="skipped"):
        model(torch.ones(2, 3), 0.5, want="both")


def test_features_come_in_the_order_of_their_names():
    net = Net(nn.Linear(3, 8), nn.Linear(8, 3))
    with tapped(net, ("decoder", "encoder")) as features:
        net(torch.ones(2, 3), None)
    assert [f.shape[1] for f in features] == [3, 8]


def test_watching_leaves_the_network_as_it_was():
    net = Net(nn.Linear(3, 8), nn.Linear(8, 3))
    with pytest.raises(RuntimeError), tapped(net, ("encoder",)):
        raise RuntimeError
    assert not net.encoder._forward_hooks


def test_features_without_a_name_or_with_a_wrong_one_are_refused():
    net = Net(nn.Linear(3, 8), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="name the submodules"):
        Wrapped(net, Straight())(torch.ones(2, 3), 0.5, want="features")
    with pytest.raises(ValueError, match="no submodule 'encodr'"):
        Wrapped(net, Straight(), taps=("encodr",))(torch.ones(2, 3), 0.5, want="features")


def test_guidance_gives_the_features_of_the_condition_alone():
    class Labelled(Net):
        def forward(self, x, clock, cond=None):
            return self.decoder(self.encoder(x + cond[:, None]))

    net, x, labels = Labelled(nn.Linear(3, 8), nn.Linear(8, 3)), torch.randn(2, 3), torch.tensor([1, 2])
    model = Wrapped(net, Straight(), taps=("encoder",))
    guided = Guided(model, 3.0, torch.zeros_like)
    alone = model(x, 0.5, labels, "features")[0]
    assert torch.equal(guided(x, 0.5, labels, "features")[0], alone)
    guess, features = guided(x, 0.5, labels, "both")
    assert torch.allclose(features[0], alone)
    assert torch.allclose(guess, guided(x, 0.5, labels), atol=1e-6)
