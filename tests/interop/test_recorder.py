import inspect

import pytest
import torch
from torch import nn

from fewstep.errors import Refused
from fewstep.interop import read_schedule, record
from fewstep.interop.recorded import Layouts, Recorded
from fewstep.path import Tabulated

KINDS = ("ddpm", "ddim", "dit", "cm")


@pytest.mark.parametrize("kind", KINDS)
def test_replay_sends_the_very_tensors_that_the_pipeline_sent(pipes, kind):
    pipe = getattr(pipes, kind)()
    recording = record(pipe)
    net = recording.replay()
    names = list(inspect.signature(type(recording.network).forward).parameters)[1:]
    sent = {}

    def watch(module, args, kwargs):
        sent.update(dict(zip(names, args, strict=False)), **kwargs)

    handle = recording.network.register_forward_pre_hook(watch, with_kwargs=True)
    for call in recording.calls:
        state, time = call.arguments[recording.state], torch.as_tensor(call.arguments[recording.clock])
        cond = call.arguments[recording.conditions[0]] if recording.conditions else None
        answer = net(state, time.expand(state.shape[0]), cond)
        assert sent.keys() == call.arguments.keys()
        for name, value in call.arguments.items():
            if isinstance(value, torch.Tensor) or name == recording.clock:
                given = torch.as_tensor(value)
                assert torch.equal(sent[name].double(), given.double().expand(sent[name].shape))
            else:
                assert sent[name] == value
        torch.testing.assert_close(answer, call.output[:, : recording.channels], rtol=0, atol=1e-5)
    handle.remove()


@pytest.mark.parametrize(
    ("kind", "state", "conditions", "shape"),
    [
        ("ddpm", "sample", (), (1, 8, 8)),
        ("ddim", "sample", (), (1, 8, 8)),
        ("dit", "hidden_states", ("class_labels",), (2, 4, 4)),
        ("cm", "sample", ("class_labels",), (1, 8, 8)),
    ],
)
def test_the_roles_of_arguments_are_read_from_the_calls(pipes, kind, state, conditions, shape):
    recording = record(getattr(pipes, kind)())
    assert (recording.state, recording.clock) == (state, "timestep")
    assert (recording.conditions, recording.shape) == (conditions, shape)


def test_the_guidance_pair_is_found_with_its_scale_and_its_null_label(pipes):
    call = {"class_labels": [3, 7], "guidance_scale": 2.5, "num_inference_steps": 3, "output_type": "pt"}
    recording = record(pipes.dit(), {**call, "generator": torch.Generator().manual_seed(1)})
    assert recording.guidance == pytest.approx(2.5, abs=1e-4)
    assert recording.cond.tolist() == [3, 7]
    assert recording.negative.tolist() == [1000, 1000]
    plain = record(pipes.dit(), {**call, "guidance_scale": 1.0, "generator": torch.Generator().manual_seed(1)})
    assert plain.guidance is None
    assert plain.negative is None


def test_a_learned_sigma_is_cut_off_and_no_condition_means_the_recorded_null(pipes):
    net = record(pipes.dit()).replay()
    x, time = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.full((3,), 500.0)
    assert net(x, time).shape == x.shape
    assert torch.equal(net(x, time), net(x, time, torch.full((3,), 1000)))


def test_a_pipeline_is_left_as_it_was(pipes):
    pipe = pipes.ddpm()
    pipe.unet.train()
    record(pipe)
    assert pipe.unet.training
    assert "step" not in vars(pipe.scheduler)
    assert not pipe.unet._forward_hooks
    assert not pipe.unet._forward_pre_hooks


def test_a_replayed_network_never_drops_labels_while_it_learns(pipes):
    net = record(pipes.dit()).replay().train()
    x, time, labels = torch.zeros(64, 2, 4, 4), torch.full((64,), 10.0), torch.full((64,), 3)
    answer = net(x, time, labels)
    assert (answer - answer[:1]).abs().max() < 1e-5
    answer.sum().backward()
    assert any(p.grad is not None for p in net.parameters())


class TwoNetworks(nn.Module):
    """A network that changes its answer by what it saw before: it cannot be replayed."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.layer = nn.Conv2d(1, 1, 1)

    def forward(self, sample, timestep, mood):
        self.count += 1
        return (self.layer(sample) + self.count,)


class Odd:
    """The least that looks like a pipeline."""

    def __init__(self, scheduler, change_mood=False, scale=1.0, step=True):
        self.net, self.scheduler, self.change_mood, self.scale, self.step = (
            TwoNetworks(), scheduler, change_mood, scale, step,
        )  # fmt: skip

    @property
    def components(self):
        return {"net": self.net, "scheduler": self.scheduler}

    def __call__(self, num_inference_steps=2):
        x = torch.randn(2, 1, 4, 4)
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            answer = self.net(x, t, i if self.change_mood else 0)[0] * self.scale
            if self.step:
                x = self.scheduler.step(answer, t, x).prev_sample


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "another answer"),
        ({"change_mood": True}, "'mood' of net changes"),
        ({"scale": 2.0}, "changes its network's answer"),
        ({"step": False}, "took 0 scheduler step"),
    ],
)
def test_a_pipeline_that_cannot_be_read_is_refused_with_the_reason(pipes, options, reason):
    with pytest.raises(Refused, match=reason) as refused:
        record(Odd(pipes.ddim().scheduler, **options))
    assert "\n" not in str(refused.value)


def test_a_pipeline_that_fails_while_it_runs_is_refused_in_one_line(pipes):
    with pytest.raises(Refused, match="could not be run for a recording: TypeError") as refused:
        record(pipes.ddpm(), {"no_such_argument": 1})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_converted_denoiser_is_the_schedulers_own_guess(pipes, prediction, schedule):
    pipe = pipes.ddim(prediction_type=prediction, beta_schedule=schedule)
    recording = record(pipe)
    denoiser = recording.schedule.wrap(recording.replay())
    pipe.scheduler.set_timesteps(4)
    for t in pipe.scheduler.timesteps:
        x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(int(t)))
        with torch.no_grad():
            wanted = pipe.scheduler.step(pipe.unet(x, t).sample, t, x).pred_original_sample
            guess = denoiser(x, (int(t) + 1) / 1000)
        torch.testing.assert_close(guess, wanted, rtol=1e-4, atol=1e-4)


def test_a_consistency_scheduler_gives_the_same_guess_as_its_denoiser(pipes):
    pipe = pipes.cm()
    recording = record(pipe)
    denoiser = recording.schedule.wrap(recording.replay())
    labels = torch.tensor([1, 4])
    for index in (0, 10, 30):
        pipe.scheduler.set_timesteps(timesteps=[index])
        t, sigma = pipe.scheduler.timesteps[0], float(pipe.scheduler.sigmas[0])
        x = sigma * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(index))
        with torch.no_grad():
            raw = pipe.unet(pipe.scheduler.scale_model_input(x, t), t, class_labels=labels).sample
            wanted = pipe.scheduler.step(raw, t, x).prev_sample
            guess = denoiser(x, sigma, labels)
        torch.testing.assert_close(guess, wanted, rtol=1e-4, atol=1e-4)


def test_a_flow_scheduler_gives_the_same_jump_to_clean_as_its_denoiser(pipes):
    pipe = pipes.flow()
    recording = record(pipe)
    denoiser = recording.schedule.wrap(recording.replay())
    pipe.scheduler.set_timesteps(1)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = pipe.scheduler.step(pipe.unet(x, pipe.scheduler.timesteps[0]).sample, pipe.scheduler.timesteps[0], x)
        torch.testing.assert_close(denoiser(x, 1.0), wanted.prev_sample, rtol=1e-5, atol=1e-5)


def test_schedulers_of_one_table_are_one_path_whatever_their_frame(pipes):
    from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

    config = pipes.ddim().scheduler.config
    paths = [
        read_schedule(kind.from_config(config)).path for kind in (DPMSolverMultistepScheduler, EulerDiscreteScheduler)
    ]
    assert all(isinstance(path, Tabulated) for path in paths)
    assert paths[0] == paths[1] == read_schedule(pipes.ddim().scheduler).path


def test_a_scheduler_without_a_known_path_is_refused_by_its_name(pipes):
    from diffusers import ScoreSdeVeScheduler

    with pytest.raises(Refused, match="ScoreSdeVeScheduler has neither"):
        read_schedule(ScoreSdeVeScheduler())


def test_several_conditions_are_a_dictionary_by_argument_name():
    class Net(nn.Module):
        def forward(self, x, t, text, added):
            return (x + text[:, :1, None, None] + added["size"][:, None, None, None],)

    net = Recorded(Net(), "x", "t", Layouts({"text": "tensor", "added.size": "tensor"}), {})
    x, cond = torch.zeros(2, 1, 4, 4), {"text": torch.ones(2, 3), "added.size": torch.tensor([1.0, 2.0])}
    assert net(x, torch.zeros(2), cond).flatten(1).mean(1).tolist() == [2.0, 3.0]
    with pytest.raises(Refused, match=r"has conditions text, added\.size"):
        net(x, torch.zeros(2), {"text": torch.ones(2, 3)})
    with pytest.raises(Refused, match="needs a condition"):
        net(x, torch.zeros(2))
