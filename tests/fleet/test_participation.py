"""Traces that are drawn."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_traces import by_the_second, people

import hanse as hs
from hanse.core.streams import Streams
from hanse.fleet import Population, Slotted, Trace, bernoulli, crashes, cyclic, diurnal, markov, slowdowns
from hanse.fleet.participation import chain, uniforms

DRAWN = [
    "bernoulli(uniform(0.2, 0.8), slot=3)",
    "markov(uniform(0.1, 0.9), on=0.3, slot=3)",
    "cyclic(uniform(0.1, 0.9), period=7, slot=3)",
    "diurnal(day=40, share=uniform(0.2, 0.8), slot=3)",
    "crashes(uniform(20, 40), 9, slot=3)",
    "slowdowns(0.4, factor=listed((1, 2, 4, 2, 8)), slot=3)",
]


def levels(trace: Slotted, population: Population, n: int, first: int = 0) -> torch.Tensor:
    """Levels of all clients in ``n`` slots."""
    clients = torch.arange(population.size)
    return trace.level(population, clients, torch.arange(first, first + n).expand(population.size, n))


def parsed(text: str) -> Slotted:
    trace = Trace.parse(text)
    assert isinstance(trace, Slotted)
    return trace


@given(st.integers(0, 5000), st.integers(1, 40))
def test_the_number_of_a_slot_is_the_same_in_any_stretch(first: int, n: int) -> None:
    clients, begin = torch.arange(3), torch.tensor([first, 0, first + 7])
    stretch = uniforms(people(3), "test", clients, begin[:, None] + torch.arange(n))
    for client in range(3):
        for k in {0, n // 2, n - 1}:
            slot = int(begin[client]) + k
            expected = Streams(0).uniform("test", torch.tensor([client]), slot // 4, n=4)[0, slot % 4]
            assert stretch[client, k] == expected


@pytest.mark.parametrize("text", DRAWN)
@given(first=st.integers(0, 300), order=st.permutations(range(5)), cut=st.integers(1, 5))
def test_a_level_is_the_same_whoever_is_asked_with_and_from_whichever_slot(
    text: str, first: int, order: list[int], cut: int
) -> None:
    trace, some = parsed(text), torch.tensor(order)[:cut]
    slots = torch.arange(first, first + 9).expand(cut, 9)
    assert torch.equal(trace.level(people(5), some, slots), levels(trace, people(5), 310)[some, first : first + 9])


@pytest.mark.parametrize("text", DRAWN)
def test_presence_and_the_end_of_work_follow_the_levels(text: str) -> None:
    trace, population, clients = parsed(text), people(5), torch.arange(5)
    table = levels(trace, population, 400)
    for now in (0, 4, 299):
        assert trace.online(population, clients, float(now), round=0).tolist() == (table[:, now // 3] > 0).tolist()
        at, broken = trace.finish(population, clients, torch.full((5,), float(now)).double(), torch.full((5,), 20.5).double())
        for client in range(5):
            row = table[client].tolist()
            expected = by_the_second(lambda t, row=row: row[t // 3], now, 20.5, trace.lost, horizon=1200)
            assert (at[client].item(), broken[client].item()) == expected


@pytest.mark.parametrize("text", ["bernoulli(0.3)", "markov(0.3)", "cyclic(0.3)"])
def test_participation_by_rounds_has_the_rate_asked_for(text: str) -> None:
    trace, population = parsed(text), people(4000)
    assert trace.counts_rounds
    for round in (0, 1, 250):
        there = trace.online(population, torch.arange(4000), 0.0, round)
        assert float(there.double().mean()) == pytest.approx(0.3, abs=0.03)


def test_bernoulli_rates_are_the_clients_own() -> None:
    population = people(3)
    shares = levels(bernoulli("listed((0, 0.25, 1))"), population, 4000).mean(1)
    assert shares[[0, 2]].tolist() == [0, 1] and float(shares[1]) == pytest.approx(0.25, abs=0.02)
    three = levels(bernoulli(0.5), population, 4000)
    assert float((torch.corrcoef(three) - torch.eye(3)).abs().max()) < 0.06  # clients do not depend on one another


RATES = st.sampled_from([0.0, 0.01, 0.2, 0.5, 0.8, 0.97, 1.0])


@given(come=RATES, stay=RATES, first=RATES, begin=st.integers(0, 200), n=st.integers(1, 40))
def test_a_chain_without_history_is_the_chain_with_history(come: float, stay: float, first: float, begin: int, n: int) -> None:
    """Bit for bit a simulation slot by slot from the same numbers, also where being there makes it less likely to stay."""
    population, clients = people(6), torch.arange(6)
    u = uniforms(population, "test", clients, torch.arange(begin + n).expand(6, begin + n))
    state, states = u[:, 0] < first, []
    for slot in range(begin + n):
        state = state if slot == 0 else u[:, slot] < torch.where(state, stay, come)
        states.append(state)
    rates = (torch.full((6,), rate, dtype=torch.float64) for rate in (come, stay, first))
    found = chain(population, "test", clients, torch.arange(begin, begin + n).expand(6, n), *rates)
    assert torch.equal(found, torch.stack(states[begin:], 1))


@pytest.mark.parametrize(
    ("p", "on", "comes", "leaves"),
    [
        (0.3, 0.05, 0.05, 0.05 * (1 / 0.3 - 1)),
        (0.9, 0.05, 0.05, 0.05 * (1 / 0.9 - 1)),
        (0.1, 0.5, 0.5 / (0.5 * 9), 1.0),  # on * (1/p - 1) would be 4.5
    ],
)
def test_markov_has_the_papers_transitions_and_share(p: float, on: float, comes: float, leaves: float) -> None:
    there = levels(markov(p, on=on), people(200), 3000) > 0
    before, after = there[:, :-1], there[:, 1:]
    assert float(after[~before].double().mean()) == pytest.approx(comes, rel=0.03)
    assert float((~after[before]).double().mean()) == pytest.approx(leaves, rel=0.03)
    assert float(there.double().mean()) == pytest.approx(p, rel=0.03)
    start = levels(markov(p, on=on), people(10_000), 1) > 0
    assert float(start.double().mean()) == pytest.approx(p, abs=0.015)


def test_markov_of_rate_0_and_1_never_changes() -> None:
    found = levels(markov("listed((0, 1))"), people(2), 500)
    assert found.mean(1).tolist() == [0, 1]


def test_cyclic_is_there_for_one_stretch_of_every_period() -> None:
    """round(L p) slots, at least one, and at least one absent; offsets differ."""
    found = levels(cyclic("listed((0, 0.26, 0.5, 1))", period=10), people(4), 40)
    assert torch.equal(found[:, :30], found[:, 10:])
    assert found[:, :10].sum(1).tolist() == [1, 3, 5, 9]
    assert ((found[:, 1:11] > found[:, :10]).sum(1) == 1).all()  # comes once a period
    offsets = levels(cyclic(0.1, period=10), people(5000), 10).mean(0)
    assert float((offsets - 0.1).abs().max()) < 0.02


def test_diurnal_is_there_for_the_same_hours_every_day() -> None:
    trace = diurnal(share="listed((0.25, 0.5, 1, 0))")
    found = levels(trace, people(4), 144 * 3)  # 144 slots of 600 s a day
    assert torch.equal(found[:, :-144], found[:, 144:])
    assert found[:, :144].sum(1).tolist() == [36, 72, 144, 0]
    assert ((found[:2, 1:145] > found[:2, :144]).sum(1) == 1).all()
    assert not trace.counts_rounds
    noon = diurnal().online(people(5000), torch.arange(5000), 43_200.0, 0)
    assert float(noon.double().mean()) == pytest.approx(0.5, abs=0.03)


def test_crashes_have_the_times_asked_for_and_everyone_is_there_at_first() -> None:
    found = levels(crashes(every=600, lasts=180, slot=60), people(300), 3000) > 0
    assert found[:, 0].all()
    before, after = found[:, :-1], found[:, 1:]
    assert float((~after[before]).double().mean()) == pytest.approx(60 / 600, rel=0.03)
    assert float(after[~before].double().mean()) == pytest.approx(60 / 180, rel=0.03)
    assert levels(crashes("inf", 180), people(3), 500).all()


def test_a_client_that_crashes_for_ever_never_comes_back() -> None:
    trace, population = crashes(every=600, lasts=math.inf), people(50)
    found = levels(trace, population, 500)
    assert (found[:, 1:] <= found[:, :-1]).all() and not found[:, -1].any()
    assert trace.back(population, torch.arange(50), 30_000.0).tolist() == [math.inf] * 50


def test_a_crash_loses_the_work_unless_told_otherwise() -> None:
    population, start = people(200), torch.zeros(200).double()
    work = torch.full((200,), 1200.0).double()
    lost, kept = (crashes(1200, 600, lost=lost).finish(population, torch.arange(200), start, work) for lost in (True, False))
    assert float(lost.broken.double().mean()) == pytest.approx(1 - 0.95**19, abs=0.1)  # 19 edges of slots within the work
    assert not kept.broken.any() and ((kept.at > 1200) == lost.broken).all()


def test_an_absence_shorter_than_a_slot_is_refused() -> None:
    with pytest.raises(hs.ConfigError, match=r"trace.crashes.lasts: 30, drawn .* it has to be at least a slot, 60 s"):
        crashes(600, 30).online(people(2), torch.arange(2), 0.0, 0)


def test_slowdowns_slow_some_slots_down_and_nobody_leaves() -> None:
    found = levels(slowdowns(0.2, factor="listed((1, 4))"), people(2), 4000)
    assert found[0].unique().tolist() == [1] and found[1].unique().tolist() == [0.25, 1]
    assert float((found[1] == 0.25).double().mean()) == pytest.approx(0.2, abs=0.02)


def test_rates_may_follow_the_labels() -> None:
    """FedAU: rare participation and rare labels go together."""
    classes = torch.eye(10).long() * 50
    population = Population(Streams(3), 10, classes)
    rates = bernoulli("by_labels(mean=0.3)").rate.draw(population, torch.arange(10), "trace.bernoulli.rate")
    shares = levels(bernoulli("by_labels(mean=0.3)"), population, 4000).mean(1)
    assert float((shares - rates).abs().max()) < 0.03 and float(rates.max()) > 10 * float(rates.min())


def test_a_rate_above_1_is_refused_when_drawn() -> None:
    with pytest.raises(hs.ConfigError, match=r"trace.markov.rate: 2, drawn from listed\(.*\) for client 1, is not allowed"):
        levels(markov("listed((0.5, 2))"), people(2), 4)


@pytest.mark.parametrize("text", ["bernoulli(0.1)", "markov(0.1, slot=60)", "cyclic(0.1)", "crashes(6000, 600)"])
def test_a_million_registered_clients_and_slots_cost_what_is_asked_about(text: str) -> None:
    population, far = people(1_000_000), torch.tensor([999_999])
    trace = Trace.parse(text)
    assert trace.online(population, far, 60e6, 1_000_000).shape == (1,)
    assert trace.back(population, far, 60e6).item() >= 60e6
