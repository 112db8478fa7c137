import pytest
import torch

from fewstep.path import Exploding, NoiseSampler
from fewstep.rng import Rng, integers, mix, normal, uniform


def shares(total, processes):
    """Row ranges of each process, as even as they can be."""
    edges = [total * i // processes for i in range(processes + 1)]
    return [(a, b, total) for a, b in zip(edges[:-1], edges[1:], strict=True)]


DRAWS = {
    "normal": lambda rng, n: normal(torch.empty(n, 3, dtype=torch.float64), rng),
    "uniform": lambda rng, n: uniform(torch.empty(n, 3), rng),
    "integers": lambda rng, n: integers(torch.empty(n, 3), 10, rng),
    "noise level": lambda rng, n: NoiseSampler(kind="log_normal").on(Exploding())(torch.empty(n, 3), rng),
}


@pytest.mark.parametrize("processes", [2, 3, 7])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_draws_do_not_depend_on_how_many_processes_share_the_batch(draw, processes):
    whole = draw(Rng(0, 5), 7)
    parts = [draw(Rng(0, 5, rows=rows), rows[1] - rows[0]) for rows in shares(7, processes)]
    assert torch.equal(torch.cat(parts), whole)


def test_later_draws_agree_between_processes_too():
    whole, part = Rng(1), Rng(1, rows=(2, 4, 6))
    for shape in ((3,), (5, 2), ()):
        assert torch.equal(whole.normal((6, *shape))[2:4], part.normal((2, *shape)))


def test_a_plain_generator_in_place_of_rng_depends_on_the_process_count():
    """The twin that the row cut guards against."""
    whole = normal(torch.empty(6, 2), torch.Generator().manual_seed(0))
    second = normal(torch.empty(3, 2), torch.Generator().manual_seed(0))
    assert not torch.equal(whole[3:], second)


def test_the_shared_source_is_the_same_whichever_rows_a_process_holds():
    first, second = (Rng(0, 3, rows=rows).shared for rows in ((0, 1, 4), (1, 4, 4)))
    assert torch.equal(torch.rand(5, generator=first), torch.rand(5, generator=second))


def test_the_shared_source_does_not_repeat_the_rows_source():
    assert not torch.equal(torch.rand(5, generator=Rng(0).shared), Rng(0).uniform(5))


def test_drawing_rows_leaves_the_shared_source_where_it_was():
    used, fresh = Rng(0), Rng(0)
    used.normal((5, 2))
    assert torch.equal(torch.rand(5, generator=used.shared), torch.rand(5, generator=fresh.shared))


def test_a_process_that_asks_for_rows_it_does_not_hold_is_told():
    with pytest.raises(ValueError, match=r"rows 1\.\.3 but 4"):
        Rng(0, rows=(1, 3, 6)).normal((4, 2))


def test_near_keys_give_unrelated_seeds():
    seeds = {mix(a, b) for a in range(100) for b in range(100)}
    assert len(seeds) == 10_000
    assert 0 <= min(seeds) < max(seeds) < 2**63
    flips = sum(bin(mix(k) ^ mix(k + 1)).count("1") for k in range(500)) / 500
    assert abs(flips - 31.5) < 1  # half of 63 bits


def test_draws_take_the_type_of_what_they_stand_beside():
    assert normal(torch.empty(2, dtype=torch.float64), Rng(0)).dtype == torch.float64
    assert uniform(torch.empty(2, dtype=torch.bfloat16), Rng(0)).dtype == torch.float32
    assert uniform(torch.empty(2, dtype=torch.long), Rng(0)).dtype == torch.float32
