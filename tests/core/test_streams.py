"""Counter-based random numbers: the published known answers, and independence of who asks together with whom."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hanse.core.streams import Streams, philox

KNOWN = {  # kat_vectors of Random123: counter, key -> output
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "digits of pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}
PEOPLE = torch.arange(1000)


def hexes(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("name", KNOWN)
def test_philox_gives_the_known_answers(name: str) -> None:
    counter, key, expected = map(hexes, KNOWN[name])
    out = philox(*(torch.tensor([c]) for c in counter), key=(key[0], key[1]))
    assert [int(w) for w in out] == expected


@given(st.permutations(range(12)), st.integers(1, 11), st.integers(1, 9), st.integers(0, 1 << 20))
def test_a_client_draws_the_same_whoever_else_draws(order: list[int], cut: int, n: int, round: int) -> None:
    streams, everyone = Streams(3), torch.arange(12)
    together = streams.words("batches", everyone, round, n)
    ids = torch.tensor(order)
    apart = torch.cat([streams.words("batches", ids[:cut], round, n), streams.words("batches", ids[cut:], round, n)])
    assert torch.equal(apart, together[ids])


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1 << 20), st.integers(0, 9)), min_size=1, max_size=8))
def test_clients_in_rounds_of_their_own_draw_what_each_draws_alone(asked: list[tuple[int, int, int]]) -> None:
    streams, (ids, rounds, extra) = Streams(3), torch.tensor(asked).unbind(1)
    together = streams.words("batches", ids, rounds, 7, extra)
    apart = [streams.words("batches", torch.tensor([client]), round, 7, more)[0] for client, round, more in asked]
    assert torch.equal(together, torch.stack(apart))
    drawn = streams.uniform("link.loss", ids, rounds)[:, 0].tolist()
    assert drawn == [float(streams.uniform("link.loss", torch.tensor([i]), t)) for i, t, _ in asked]


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    streams = Streams(0)
    assert torch.equal(streams.words("p", PEOPLE, 1, 11)[:, :6], streams.words("p", PEOPLE, 1, 6))


def test_every_counter_matters() -> None:
    """Seed, purpose, client, round, position and the extra counter each give numbers of their own."""
    draws = [
        Streams(seed).words(purpose, torch.tensor([client]), round, 8, extra)[0]
        for seed in (0, 1)
        for purpose in ("a", "b")
        for client in (0, 1, 1 << 31)
        for round in (0, 1)
        for extra in (0, 1)
    ]
    words = torch.cat(draws)
    assert len(words.unique()) == len(words)
    assert int(words.min()) >= 0 and int(words.max()) < 1 << 32


def test_purposes_are_uncorrelated() -> None:
    a, b = (Streams(0).normal(purpose, PEOPLE, n=100).flatten() for purpose in ("a", "b"))
    assert abs(float((a * b).mean())) < 4 / len(a) ** 0.5


def test_uniform_moments_and_open_interval() -> None:
    u = Streams(1).uniform("u", PEOPLE, n=400)
    assert float(u.min()) > 0 and float(u.max()) < 1
    assert float(u.mean()) == pytest.approx(1 / 2, abs=4 * (1 / 12 / u.numel()) ** 0.5)
    assert float(u.var()) == pytest.approx(1 / 12, rel=0.01)
    assert torch.histc(u, 16, 0, 1).div(u.numel() / 16).sub(1).abs().max() < 0.04


def test_normal_moments() -> None:
    z = Streams(1).normal("z", PEOPLE, n=400)
    assert z.shape == (1000, 400)
    assert float(z.mean()) == pytest.approx(0, abs=4 / z.numel() ** 0.5)
    assert float(z.var()) == pytest.approx(1, rel=0.01)
    assert float((z**3).mean()) == pytest.approx(0, abs=0.03)
    assert float((z**4).mean()) == pytest.approx(3, rel=0.02)
    assert abs(float((z[:, :-1] * z[:, 1:]).mean())) < 0.01


@given(st.integers(1, 2000), st.data(), st.integers(0, 99))
def test_sample_is_distinct_sorted_and_in_range(population: int, data: st.DataObject, round: int) -> None:
    k = data.draw(st.integers(1, population))
    drawn = Streams(5).sample("cohort", population, k, round)
    assert len(drawn) == k
    assert bool((drawn.diff() > 0).all())
    assert int(drawn[0]) >= 0 and int(drawn[-1]) < population


def test_sample_is_uniform() -> None:
    streams, rounds = Streams(2), 4000
    seen = torch.zeros(20)
    pairs = torch.zeros(20, 20)
    for t in range(rounds):
        drawn = streams.sample("cohort", 20, 5, t)
        seen[drawn] += 1
        pairs[drawn[:, None], drawn] += 1
    assert float((seen / rounds - 5 / 20).abs().max()) < 4 * (0.25 * 0.75 / rounds) ** 0.5
    apart = pairs[~torch.eye(20, dtype=torch.bool)] / rounds  # two given clients meet with probability 5/20 * 4/19
    assert float((apart - 1 / 19).abs().max()) < 4.5 * (1 / 19 * 18 / 19 / rounds) ** 0.5


def test_sample_from_a_million_needs_no_list_of_them() -> None:
    drawn = Streams(0).sample("cohort", 10**12, 5, 0)
    assert len(drawn.unique()) == 5


def test_works_under_vmap() -> None:
    streams, ids = Streams(4), torch.arange(7)

    def one(client: Tensor) -> Tensor:
        return streams.normal("noise", client.unsqueeze(0), 3, 5)[0]

    assert torch.equal(torch.vmap(one)(ids), streams.normal("noise", ids, 3, 5))


def test_ordinary_generators_follow_the_same_keys() -> None:
    streams = Streams(0)
    for make in (streams.numpy, streams.torch):
        first = {(p, c, r): _draw(make(p, c, r)) for p in ("a", "b") for c in (0, 1) for r in (0, 1)}
        assert len(set(first.values())) == 8
        assert _draw(make("a", 1, 0)) == first["a", 1, 0]


def _draw(generator: object) -> int:
    if isinstance(generator, torch.Generator):
        return int(torch.randint(1 << 62, (), generator=generator))
    return int(generator.integers(1 << 62))  # type: ignore[attr-defined]


@given(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**30)), min_size=2, max_size=20, unique=True))
def test_no_two_clients_or_rounds_share_a_seed(pairs: list[tuple[int, int]]) -> None:
    clients, rounds = torch.tensor(pairs).T
    found = Streams(3).seeds("codec", clients, rounds)
    assert len(found.unique()) == len(pairs)
    assert [int(Streams(3).seeds("codec", c[None], int(r))) for c, r in zip(clients, rounds, strict=True)] == found.tolist()
    assert bool((found != Streams(4).seeds("codec", clients, rounds)).all())
    assert bool((found != Streams(3).seeds("other", clients, rounds)).all())
