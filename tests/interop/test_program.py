import pytest
import torch
from torch import nn

from fewstep.denoiser import Wrapped
from fewstep.errors import Refused
from fewstep.interop.program import Draws, Program, table_of, traced
from fewstep.nets import MLP, MLPConfig
from fewstep.path import Exploding, Straight, Trigonometric, VariancePreserving
from fewstep.student import Student

SIGMAS = Exploding(sigma_min=0.02, sigma_max=20.0)


def mlp(**options):
    torch.manual_seed(0)
    return MLP(MLPConfig(shape=(2,), width=16, depth=1, **options)).eval()


class Told(nn.Module):
    """A network with two conditions by dotted names, as recorded ones have them."""

    conditions = ("text", "added.pooled")

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(2 + 3 + 4, 2)

    def forward(self, x, time, cond=None, span=None):
        return self.mix(torch.cat([x, cond["text"].mean(1), cond["added.pooled"]], 1)) * time[:, None].cos()


def given(student, steps, count=5):
    rng = torch.Generator().manual_seed(1)
    noise, *draws = [torch.randn(count, *student.shape, generator=rng) for _ in range(steps)]
    return noise, draws


# -- the table --------------------------------------------------------------------------------------


def test_one_step_of_a_flow_is_the_noise_less_its_velocity():
    table = table_of(Student(Wrapped(mlp(), Straight(), "velocity", "1000t"), (2,)), 1)
    assert table.entries == ((1.0, 0.0),)
    assert table.sample == (1.0, -1.0)
    assert (table.clocks, table.spans, table.draws) == ((1000.0,), (None,), 0)


def test_a_step_that_renoises_reads_the_first_guess_and_a_fresh_noise():
    path = VariancePreserving(zero_snr=True)
    student = Student(Wrapped(mlp(), path, "x0", "999t"), (2,), steps={2: (1.0, 0.5)}, policy="renoise")
    table = table_of(student, 2)
    alpha, sigma, _, _ = path.coefs(0.5)
    assert table.entries[1] == pytest.approx((0, float(alpha), 0, float(sigma)))  # noise, answers, draw
    assert table.sample == (0, 0, 1, 0)
    assert table.draws == 1


def test_a_flow_map_is_told_the_length_of_every_jump():
    student = Student(Wrapped(mlp(reads_s=True), Straight(), "velocity", "t"), (2,), steps={2: (1.0, 0.25)})
    table = table_of(student, 2)
    assert table.spans == (0.75, 0.25)
    assert table.sample == pytest.approx((1, -0.75, -0.25, 0))


def test_a_step_count_that_was_not_trained_has_no_table():
    with pytest.raises(Refused, match=r"trained for 1 step\(s\), got 3"):
        table_of(Student(Wrapped(mlp(), Straight(), "velocity", "t"), (2,)), 3)


@pytest.mark.parametrize("policy", ["ode", "renoise"])
@pytest.mark.parametrize(
    ("path", "prediction", "clock", "scaled"),
    [
        (SIGMAS, "cm", "250 log_sigma", True),
        (SIGMAS, "edm", "log_sigma/4", True),
        (SIGMAS, "eps", "t", False),
        (VariancePreserving(), "v", "index", False),
        (VariancePreserving(schedule="cosine"), "x0", "999t", False),
        (Trigonometric(), "velocity", "t", False),
        (Straight(), "velocity", "1000t", False),
    ],
    ids=lambda v: getattr(v, "kind", str(v)),
)
def test_a_program_gives_the_students_samples_on_every_path(path, prediction, clock, scaled, policy):
    one = Wrapped(mlp(classes=3), path, prediction, clock, scale_input=scaled, data_std=0.6)
    top = path.t_max
    steps = {1: (top,), 2: (top, 0.4 * top), 4: (top, 0.6 * top, 0.3 * top, 0.1 * top)}
    student = Student(one, (2,), steps=steps, policy=policy)
    labels = torch.tensor([0, 1, 2, 0, 1])
    for count in steps:
        noise, draws = given(student, count)
        wanted = student.generate(noise, labels, Draws(draws), count)
        program = Program(student, count, labels)
        named = {f"noise_{i + 2}": draws[i] for i in range(program.table.draws)}
        got = program(noise, labels=labels, **named)
        assert float((got - wanted).abs().max()) <= 3e-6 * max(1.0, float(wanted.abs().max()))
        assert program.table.draws == (count - 1 if policy == "renoise" else 0)


# -- the graph --------------------------------------------------------------------------------------


def test_conditions_are_inputs_by_the_networks_own_names_and_the_batch_is_free():
    student = Student(Wrapped(Told().eval(), Straight(), "velocity", "t"), (2,), steps={1: (1.0,)})
    cond = {"text": torch.randn(4, 6, 3), "added.pooled": torch.randn(4, 4)}
    program = Program(student, 1, cond)
    assert [(one.name, one.key, one.shape) for one in program.inputs] == [
        ("noise", None, (2,)), ("text", "text", (6, 3)), ("added_pooled", "added.pooled", (4,)),
    ]  # fmt: skip
    graph = traced(program, cond).module()
    for count in (1, 64, 100):
        noise, text, pooled = torch.randn(count, 2), torch.randn(count, 6, 3), torch.randn(count, 4)
        got = graph(noise, text=text, added_pooled=pooled)
        wanted = student.generate(noise, {"text": text, "added.pooled": pooled})
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


class Chooses(nn.Module):
    """What it does depends on what it is given: no graph can hold that."""

    def forward(self, x, time, cond=None, span=None):
        return x if float(x.sum()) > 0 else -x


def test_a_network_that_looks_at_its_values_is_refused_in_one_line():
    student = Student(Wrapped(Chooses(), Straight(), "velocity", "t"), (2,))
    with pytest.raises(Refused, match="Chooses cannot be traced as one program") as raised:
        traced(Program(student, 1))
    assert "\n" not in str(raised.value)


def test_diffusers_upsampling_serves_a_batch_on_both_sides_of_its_branch():
    pytest.importorskip("diffusers")
    from diffusers.models.upsampling import Upsample2D

    class Doubles(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = Upsample2D(4, use_conv=True)

        def forward(self, x, time, cond=None, span=None):
            return nn.functional.avg_pool2d(self.up(x), 2)

    student = Student(Wrapped(Doubles().eval(), Straight(), "velocity", "t"), (4, 2, 2))
    graph = traced(Program(student, 1)).module()
    for count in (1, 63, 64, 65):
        noise = torch.randn(count, 4, 2, 2)
        torch.testing.assert_close(graph(noise), student.generate(noise), rtol=1e-5, atol=1e-6)
    assert "forward" not in vars(student.denoiser.net.up)  # the network itself is as it was
