import copy

import pytest
import torch
from games import batch_of, mlp
from torch import nn
from torch.utils.checkpoint import checkpoint

from fewstep.adapters import (
    LoraOptions,
    LowRank,
    adapted,
    adapters,
    attach,
    fold,
    learn,
    options_of,
    own,
    shared,
    targets,
    twin,
)
from fewstep.denoiser import Wrapped
from fewstep.methods.consistency import Consistency, ConsistencyOptions
from fewstep.methods.dmd2 import DMD2, DMD2Options
from fewstep.methods.families.score_gap import GanOptions, still
from fewstep.nets import build
from fewstep.path import Straight
from fewstep.rng import Rng
from fewstep.student import Student, trainable_copy
from fewstep.train.average import Average
from fewstep.train.recipe import Optim
from fewstep.train.trainer import Player, learned

ALL = LoraOptions(rank=3, alpha=6.0, targets="all")
NETS = {
    "mlp": {"kind": "mlp", "shape": (2, 4, 4), "width": 8, "depth": 1, "classes": 3},
    "dit": {"kind": "dit", "shape": (2, 4, 4), "width": 8, "depth": 2, "heads": 2, "classes": 3},
    "unet": {"kind": "unet", "shape": (2, 4, 4), "widths": (8, 8), "groups": 4, "classes": 3},
}
every_net = pytest.mark.parametrize("kind", list(NETS))


def net_of(kind, seed=0, dtype=torch.float64):
    """A network without a zero in it, so that every adapter shows."""
    torch.manual_seed(seed)
    net = build(NETS[kind]).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def inputs(dtype=torch.float64):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(3, 2, 4, 4, generator=rng, dtype=dtype), torch.tensor([10.0, 500.0, 900.0]), torch.arange(3)


def moved(module, seed=5, size=0.3):
    """Adapters as training leaves them: up is no longer zero."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in adapters(module):
            layer.lora_up.add_(size * torch.randn(layer.lora_up.shape, generator=rng, dtype=layer.lora_up.dtype))
    return module


# -- one layer, one network --------------------------------------------------------------------------------


@every_net
def test_adapters_change_nothing_at_first_to_the_last_bit(kind):
    base = net_of(kind, dtype=torch.float32)
    twin_ = adapted(base, ALL)
    given = inputs(torch.float32)
    assert torch.equal(twin_(*given), base(*given))
    assert not torch.equal(moved(twin_)(*given), base(*given))


@every_net
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folded_weights_give_what_the_adapters_give(kind, dtype):
    base = net_of(kind, dtype=dtype)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    student = moved(adapted(base, ALL))
    wanted = student(*inputs(dtype))
    folded = fold(twin(student))
    assert not list(adapters(folded))
    assert set(folded.state_dict()) == set(before)
    assert type(folded.time_embedding.linear_1) is nn.Linear
    size = wanted.abs().max()
    assert (folded(*inputs(dtype)) - wanted).abs().max() < (1e-6 if dtype == torch.float32 else 1e-13) * size
    assert (wanted - base(*inputs(dtype))).abs().max() > 1e-2 * size
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 5),
        nn.Conv1d(6, 5, 3, padding=1, stride=2),
        nn.Conv2d(6, 5, (3, 1), padding=(1, 0), dilation=(2, 1), padding_mode="circular"),
        nn.Conv3d(6, 5, 2, bias=False),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_the_gradient_is_that_of_the_dense_weight_projected(layer):
    """W' = W + s up down, so dL/dup = s G down^T and dL/ddown = s up^T G, with G = dL/dW' of the dense layer."""
    layer = layer.double()
    net = moved(adapted(nn.Sequential(layer), LoraOptions(rank=3, alpha=1.5, targets="all")))
    low = net[0]
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, *(5 for _ in layer.weight.shape[2:]), generator=rng, dtype=torch.float64)
    dense = fold(twin(net))
    dense[0].weight.requires_grad_(True)
    dense(x).square().sum().backward()
    net(x).square().sum().backward()
    g, scale = dense[0].weight.grad.flatten(1), 0.5
    torch.testing.assert_close(low.lora_up.grad, scale * g @ low.lora_down.flatten(1).T)
    torch.testing.assert_close(low.lora_down.grad.flatten(1), scale * low.lora_up.T @ g)
    assert low.weight.grad is None
    assert low.weight is layer.weight


def test_a_layer_keeps_its_class_its_names_and_its_attributes():
    net = net_of("unet")
    names = set(net.state_dict())
    attach(net, ALL)
    assert isinstance(net.conv_in, nn.Conv2d) and isinstance(net.conv_in, LowRank)
    assert names < set(net.state_dict())
    assert all(name.endswith(("lora_down", "lora_up")) for name in set(net.state_dict()) - names)
    assert net.time_embedding.linear_1.in_features == 8


def test_a_rank_above_the_layers_own_is_cut_and_its_strength_kept():
    net = nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 5)).double()
    attach(net, LoraOptions(rank=4, alpha=8.0, targets="all"))
    assert [len(layer.lora_down) for _, layer in adapters(net)] == [2, 4]
    assert [layer.options.scale for _, layer in adapters(net)] == [2.0, 2.0]


def test_adapters_of_a_bfloat16_network_learn_in_float32():
    net = adapted(nn.Sequential(nn.Linear(4, 4)).bfloat16(), LoraOptions(rank=2, targets="all"))
    assert net[0].lora_up.dtype == torch.float32
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    assert moved(net)(x).dtype == torch.bfloat16


# -- which layers ------------------------------------------------------------------------------------------


def test_attention_means_the_projections_of_attentions_alone():
    found = targets(net_of("unet"), "attention")
    assert found
    assert {name.rpartition("attentions.")[2][2:] for name in found} == {"to_q", "to_k", "to_v", "to_out.0"}


def test_patterns_choose_by_whole_names_or_their_ends():
    net = net_of("unet")
    assert list(targets(net, "conv_in")) == ["conv_in"]
    assert set(targets(net, ("*.to_q", "conv_out"))) == {n for n in targets(net, "all") if n.endswith("to_q")} | {
        "conv_out"
    }
    assert not targets(net, "onv_in")


def test_targets_that_match_nothing_are_an_error_that_names_what_there_is():
    with pytest.raises(ValueError, match="found no layer for targets 'attention'.*such as .*out"):
        adapted(net_of("mlp"), LoraOptions())
    with pytest.raises(ValueError, match="targets must name layers"):
        LoraOptions(targets=())


def test_layers_that_are_read_instead_of_called_are_never_adapted():
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "depthwise": nn.Conv2d(4, 4, 3, groups=4)})
    assert not targets(net, "all")


# -- shared weights ----------------------------------------------------------------------------------------


def test_a_shared_network_holds_the_very_tensors_and_lets_none_of_them_learn():
    base = net_of("unet")
    one, other = adapted(base, ALL), adapted(base, ALL)
    theirs = {id(p) for p in base.parameters()}
    for net in (one, other):
        assert {id(p) for p in net.parameters() if not p.requires_grad} == theirs
        assert all(name.endswith(("lora_down", "lora_up")) for name in own(net))
    assert not {id(p) for p in own(one).values()} & {id(p) for p in own(other).values()}


def test_what_a_network_shares_is_not_copied_again_and_never_learns():
    student = adapted(net_of("unet"), ALL)
    for copied in (twin(student), trainable_copy(student), learn(twin(twin(student)))):
        assert {id(t) for t in shared(copied)} == {id(t) for t in shared(student)}
        assert not {id(t) for t in own(copied).values()} & {id(t) for t in own(student).values()}
    assert not any(p.requires_grad for p in shared(trainable_copy(student)))
    full = copy.deepcopy(student)
    assert not {id(t) for t in shared(full)} & {id(t) for t in shared(student)}


def test_running_statistics_are_the_one_thing_that_is_not_shared():
    base = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    before = base[1].running_mean.clone()
    student = adapted(base, LoraOptions(rank=1, targets="all")).train()
    student(torch.randn(8, 3))
    assert torch.equal(base[1].running_mean, before)
    assert not torch.equal(student[1].running_mean, before)
    assert "1.running_mean" in own(student)


# -- calls in any order, and passes that are computed again -------------------------------------------------


class Blocks(nn.Module):
    """A network whose blocks are computed again in the backward pass, where it is told to."""

    def __init__(self, again=None):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 6)) for _ in range(3))
        self.again = again

    def forward(self, x, time, cond=None, span=None):
        for block in self.blocks:
            x = x + (block(x) if self.again is None else checkpoint(block, x, use_reentrant=self.again))
        return x


def trio(again):
    """Teacher, student and critic on one set of weights."""
    torch.manual_seed(0)
    base = Blocks(again).double()
    options = LoraOptions(rank=2, alpha=3.0, targets="all")
    teacher = Wrapped(base, Straight()).requires_grad_(False)
    torch.manual_seed(1)
    student, critic = (moved(adapted(teacher, options), seed) for seed in (1, 2))
    return teacher, student, critic


def interleaved(teacher, student, critic):
    """Three networks called in turns before one backward goes through all of them; gradients by name."""
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(5, 6, generator=rng, dtype=torch.float64).requires_grad_(True)
    made = student(x, 1.0)
    guess = critic(made, 0.5)
    real = teacher(made, 0.5)
    back = student(guess - real, 0.3)
    (made.square().sum() + (guess - real).pow(3).sum() + back.square().sum() + teacher(back, 0.1).sum()).backward()
    found = {f"{i}.{n}": p.grad for i, m in enumerate((student, critic)) for n, p in m.named_parameters()}
    return {"x": x.grad, **{n: g for n, g in found.items() if g is not None}}


class Switched(nn.Linear):
    """What not to build: the adapters of all players in one layer, and a switch that says which of them acts."""

    active = 0

    def forward(self, x):
        low = self.players[Switched.active]
        return super().forward(x) + low.options.scale * (x @ low.lora_down.T) @ low.lora_up.T


def in_turns(student, critic):
    """The gradient of a student's sample that a critic has judged before the student was called again."""
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(5, 6, generator=rng, dtype=torch.float64).requires_grad_(True)
    made = student(x, 1.0)
    (student(critic(made, 0.5), 0.3) - made).square().sum().backward()
    return x.grad


def switched(again):
    """A student and a critic that are one module and a global switch."""
    _, *players = trio(again)
    mixed = twin(players[0])
    for path, layer in list(mixed.named_modules()):
        if isinstance(layer, LowRank):
            layer.__class__ = Switched
            layer.__dict__["players"] = [player.get_submodule(path) for player in players]

    def player(index):
        def call(x, t):
            Switched.active = index
            return mixed(x, t)

        return call

    return player(0), player(1)


@pytest.mark.parametrize("again", [False, True], ids=["not reentrant", "reentrant"])
def test_a_pass_that_is_computed_again_meets_its_own_players_adapters(again):
    wanted, found = interleaved(*trio(None)), interleaved(*trio(again))
    assert wanted.keys() == found.keys() and len(wanted) == 1 + 2 * 2 * 6
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def test_a_global_switch_would_give_another_gradient():
    wanted = in_turns(*trio(None)[1:])
    torch.testing.assert_close(in_turns(*trio(False)[1:]), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(in_turns(*switched(None)), wanted)  # without recomputation a switch is right ...
    assert (in_turns(*switched(False)) - wanted).abs().max() > 1e-2 * wanted.abs().max()  # ... with it silently wrong


def test_networks_of_diffusers_with_gradient_checkpointing_meet_their_own_adapters():
    pytest.importorskip("diffusers")
    from diffusers import UNet2DModel

    def three(again):
        torch.manual_seed(0)
        net = UNet2DModel(
            sample_size=4, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
            norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
        ).double().requires_grad_(False)  # fmt: skip
        torch.manual_seed(1)
        nets = [net, *(moved(adapted(net, ALL), seed) for seed in (1, 2))]
        for one in nets[1:]:
            one.train()
            if again:
                one.enable_gradient_checkpointing()
        return nets

    def gradients(teacher, student, critic):
        x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        made = student(x, 999).sample
        gap = critic(made, 500).sample - teacher(made, 500).sample
        (made * gap).sum().backward()
        return [p.grad for net in (student, critic) for p in net.parameters() if p.grad is not None]

    plain, again = gradients(*three(False)), gradients(*three(True))
    assert len(plain) == len(again) > 50
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


# -- in a game ---------------------------------------------------------------------------------------------


def game(options=None, lora=ALL, shape=(2,), **changes):
    teacher = mlp(shape=shape, seed=0)
    student = Student(teacher if lora is None else adapted(teacher, lora), shape, **changes)
    return DMD2(teacher, student, options or DMD2Options())


def steps(method, count):
    """A few turns of every player, with the trainer's own optimiser and average."""
    players = {name: Player(getattr(method, name), Optim(lr=1e-2)) for name in method.players}
    average = Average(method.student, 0.9)
    method.train()
    for step in range(count):
        for turn, name in enumerate(method.turns(step)):
            for other, player in players.items():
                player.learns(other == name)
            method.loss(name, batch_of(16, seed=step), Rng(0, step, turn)).total.backward()
            players[name].update(1.0)
        average.update()
    for player in players.values():
        player.learns(True)
    return players, average


@pytest.mark.parametrize(
    "options",
    [{}, {"gan": GanOptions(width=8)}, {"gan": GanOptions(width=8, on="teacher")}, {"gap": "fisher"}],
    ids=["plain", "gan", "gan on teacher", "fisher"],
)
def test_the_players_learn_and_the_teacher_under_them_stays_as_it_was(options):
    method = game(DMD2Options(critic_turns=2, **options))
    before = {k: v.clone() for k, v in method.teacher.state_dict().items()}
    first = {k: v.detach().clone() for k, v in method.student.named_parameters()}
    x = torch.randn(4, 2)
    assert torch.equal(method.student.denoiser(x, 1.0), method.teacher(x, 1.0))
    assert torch.equal(method.critic(x, 0.5), method.teacher(x, 0.5))
    players, average = steps(method, 4)
    assert all(torch.equal(v, before[k]) for k, v in method.teacher.state_dict().items())
    learning = {k for k, v in method.student.named_parameters() if v.requires_grad}
    changed = {k for k, v in method.student.named_parameters() if not torch.equal(v, first[k])}
    assert changed == learning == {k for k in first if k.endswith(("lora_down", "lora_up"))}
    assert not torch.equal(method.critic(x, 0.5), method.teacher(x, 0.5))
    assert not torch.equal(method.student.denoiser(x, 0.5), method.critic(x, 0.5))
    assert not any(p.requires_grad for p in method.teacher.parameters())
    assert set(average.names) == learning


def test_one_players_turn_leaves_no_gradient_with_another():
    method = game()
    moved(method.critic)
    with still(method.critic):
        assert not any(p.requires_grad for p in method.critic.parameters())
    method.loss("student", batch_of(8), Rng(0)).total.backward()
    assert all(p.grad is None for p in method.critic.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in method.student.parameters())


def test_a_checkpoint_holds_the_adapters_once_and_the_shared_weights_never():
    method = game(DMD2Options(gan=GanOptions(width=8)))
    names = set(learned(method))
    assert any("student" in n for n in names) and any("critic.denoiser" in n for n in names)
    assert all(n.endswith(("lora_down", "lora_up")) or ".adversary." in n for n in names)
    assert not any(n.startswith("teacher") for n in names)


def test_an_average_of_adapters_is_lent_and_taken_back():
    method = game()
    _, average = steps(method, 3)
    x = torch.randn(4, 2)
    here, base = method.student.denoiser(x, 0.7), method.teacher(x, 0.7)
    with average.applied():
        assert not torch.equal(method.student.denoiser(x, 0.7), here)
        assert torch.equal(method.teacher(x, 0.7), base)
    assert torch.equal(method.student.denoiser(x, 0.7), here)
    average.apply()
    folded = fold(twin(method.student))
    assert (folded.denoiser(x, 0.7) - method.student.denoiser(x, 0.7)).abs().max() < 1e-5


def test_the_critic_takes_the_students_options_its_own_or_none():
    assert options_of(game().critic) == ALL
    assert options_of(game(lora=None).critic) is None
    full = game(DMD2Options(critic_lora="off")).critic
    assert options_of(full) is None and all(p.requires_grad for p in full.parameters())
    other = LoraOptions(rank=1, targets="entry")
    method = game(DMD2Options(critic_lora=other))
    assert options_of(method.critic) == other and options_of(method.student) == ALL
    assert DMD2Options.model_validate({"critic_lora": {"rank": 4}}).critic_lora == LoraOptions(rank=4)
    with pytest.raises(ValueError, match="critic_lora"):
        DMD2Options(critic_lora="some")


def test_a_moving_target_shares_the_weights_and_follows_the_adapters():
    teacher = mlp()
    student = Student(adapted(teacher, ALL), (2,))
    method = Consistency(teacher, student, ConsistencyOptions(first=4, last=8, target_decay=0.5))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    moved(student)
    method.settle(0)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    for (_, a), (_, b) in zip(adapters(method.target), adapters(student), strict=True):
        torch.testing.assert_close(a.lora_up, b.lora_up / 2)
    assert {id(t) for t in shared(method.target)} == {id(p) for p in teacher.parameters()}


def bytes_of(method, players, average):
    """Weights, gradients and optimiser states of all players and the teacher, each tensor once."""
    tensors = {t.data_ptr(): t for t in method.state_dict(keep_vars=True).values()}
    for player in players.values():
        for p in player.parameters:
            tensors[(id(p), "gradient")] = p  # as large as the weight, while there is one
            for key, value in player.optimiser.state[p].items():
                tensors[(id(p), key)] = value
    return sum(t.numel() * t.element_size() for t in tensors.values())


def test_a_lora_student_and_critic_take_a_fifth_of_three_full_copies():
    net = {"kind": "dit", "shape": (2, 8, 8), "width": 96, "depth": 3, "heads": 4}
    sizes = []
    for lora in (None, LoraOptions(rank=8)):
        torch.manual_seed(0)
        teacher = Wrapped(build(net), Straight(), "x0", "1000t")
        student = Student(trainable_copy(teacher) if lora is None else adapted(teacher, lora), (2, 8, 8))
        method = DMD2(teacher, student, DMD2Options(critic_turns=1))
        players = {name: Player(getattr(method, name), Optim()) for name in method.players}
        for name, player in players.items():
            for other, one in players.items():
                one.learns(other == name)
            method.loss(name, batch_of(2, (2, 8, 8)), Rng(0)).total.backward()
            player.update(1.0)
        sizes.append(bytes_of(method, players, None))
    assert sizes[1] / sizes[0] <= 0.20
