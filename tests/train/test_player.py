"""Weights of 16 bits: rounding at random keeps the mean, and small updates arrive."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fewstep.errors import Refused
from fewstep.train.player import Player, stochastic_round
from fewstep.train.recipe import Optim

SLOW = Optim(kind="adam", lr=1e-4, clip=None)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("value", [1.2345678, -1.2345678, 3e-30, -7.7e20, 255.99, 2.0 - 2**-10, 1e-4])
def test_the_mean_of_random_rounding_is_the_number_itself(value):
    count = 200_000
    x = torch.full((count,), value)
    rounded = stochastic_round(x, seeded()).double()
    true = x[0].double()
    step = float((rounded.max() - rounded.min()) / abs(true))
    assert 0 < step <= 2**-7  # only the two neighbours
    assert float((rounded.mean() - true) / abs(true)) == pytest.approx(0, abs=4 * 0.5 * step / count**0.5)
    nearest = x.to(torch.bfloat16).double().mean()
    if value == 1.2345678:  # what plain rounding is off by, a hundred times more
        assert abs(float(nearest - true)) > 100 * abs(float(rounded.mean() - true))


def test_what_a_bfloat16_can_say_and_what_is_not_finite_is_not_changed():
    x = torch.cat([torch.randn(1000, generator=seeded()).to(torch.bfloat16).float(), torch.zeros(3)])
    assert torch.equal(stochastic_round(x, seeded(1)).float(), x)
    odd = torch.tensor([float("inf"), -float("inf"), float("nan")])
    rounded = stochastic_round(odd, seeded())
    assert rounded[0] == float("inf") and rounded[1] == -float("inf") and rounded[2].isnan()


def moved(dtype: torch.dtype, updates: int, plain: bool = False) -> torch.Tensor:
    """Weights of 1 after updates of 1e-4 downwards each (Adam moves by its rate)."""
    module = nn.Linear(64, 64, bias=False)
    nn.init.ones_(module.weight)
    player = Player(module.to(dtype), SLOW)
    for key in range(updates):
        player.parameters[0].grad = torch.ones_like(player.parameters[0])
        if plain:
            before = player.parameters[0].detach().float() - 1e-4
            player.parameters[0].data = before.to(dtype)
        else:
            player.update(1.0, key=key)
    return module.weight.detach().double()


def test_small_updates_are_lost_by_plain_rounding_and_arrive_by_random_rounding():
    assert torch.equal(moved(torch.bfloat16, 200, plain=True), torch.ones(64, 64).double())
    weights = moved(torch.bfloat16, 200)
    assert weights.mean().item() == pytest.approx(1 - 200e-4, abs=5 * weights.std().item() / 64)
    assert moved(torch.float32, 200).mean().item() == pytest.approx(1 - 200e-4, abs=1e-5)


def test_an_update_of_narrow_weights_is_the_wide_one_rounded_once():
    torch.manual_seed(0)
    narrow = nn.Linear(8, 8).to(torch.bfloat16)
    wide = nn.Linear(8, 8)
    wide.load_state_dict({k: v.float() for k, v in narrow.state_dict().items()})
    both = [Player(m, Optim(lr=1e-2, weight_decay=0.1, clip=0.5)) for m in (narrow, wide)]
    for p, q in zip(narrow.parameters(), wide.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.float()
    norms = [player.update(0.7, key=3)[0] for player in both]
    assert torch.equal(*norms)
    for p, q in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert p.dtype == torch.bfloat16 and p.grad is None
        assert ((p.float() - q).abs() <= 2**-7 * q.abs()).all()  # a neighbour of where the wide update went
        assert not torch.equal(p, q.detach().to(torch.bfloat16))
    assert all(w.numel() == 0 for w, _ in both[0].pairs), "wide copies are there for an update alone"
    assert all(v.dtype == torch.float32 for v in both[0].state().values())


@pytest.mark.parametrize("kind", ["adam", "adamw", "radam"])
def test_a_gradient_that_is_not_finite_leaves_narrow_weights_as_they_are(kind):
    module = nn.Linear(4, 4).to(torch.bfloat16)
    player = Player(module, Optim(kind=kind, lr=0.1))
    before = module.weight.detach().clone()
    for p in module.parameters():
        p.grad = torch.full_like(p, float("nan"))
    _, bad = player.update(1.0, key=1)
    assert bad == 1
    assert torch.equal(module.weight, before)


def test_the_same_key_rounds_the_same_and_another_key_otherwise():
    def after(key: int) -> torch.Tensor:
        torch.manual_seed(0)
        module = nn.Linear(16, 16).to(torch.bfloat16)
        player = Player(module, SLOW)
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        player.update(1.0, key=key)
        return module.weight.detach()

    assert torch.equal(after(1), after(1))
    assert not torch.equal(after(1), after(2))


def test_half_precision_is_refused_because_its_updates_would_vanish():
    with pytest.raises(Refused, match="float16"):
        Player(nn.Linear(2, 2).half(), SLOW)
