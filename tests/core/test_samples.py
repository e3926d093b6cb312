"""Which samples a client sees, and when."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hanse.core.samples import Plan, Samples
from hanse.core.streams import Streams

Counts = list[int]
some_counts = st.lists(st.integers(1, 12), min_size=1, max_size=5)


def numbered(counts: Counts, index: bool = False) -> Samples:
    """Every sample's ``x`` is its number; with ``index`` the data lie in another order."""
    x = torch.arange(sum(counts), dtype=torch.float64)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    if not index:
        return Samples(x, x.long(), offsets)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return Samples(x[order], x[order].long(), offsets, order.argsort())


def walk(plan: Plan, samples: Samples, ids: Tensor | None = None, round: int = 4) -> dict[int, list[list[int]]]:
    """The batches of every client, as lists of sample numbers without padding; checks weights and labels on the way."""
    if ids is None:
        ids = (-plan.lengths(samples.counts())).argsort(stable=True)
    seen: dict[int, list[list[int]]] = {int(i): [] for i in ids}
    rounds, steps = torch.full_like(ids, round), plan.lengths(samples.counts(ids))
    for k, (active, batch) in enumerate(plan.batches(samples, ids, Streams(1), rounds, steps)):
        assert (batch.step, batch.seed) == (k, 1)
        assert torch.equal(batch.ids, ids[:active]) and torch.equal(batch.rounds, rounds[:active]) and len(batch.x) == active
        assert torch.equal(batch.x.long(), batch.y)
        for i, client in enumerate(batch.ids.tolist()):
            x = batch.x[i]
            if batch.weight is not None:
                real = batch.weight[i] > 0
                assert bool((real.long().diff() <= 0).all())  # padding comes last
                torch.testing.assert_close(batch.weight[i][real], torch.full((int(real.sum()),), 1 / float(real.sum())).double())
                x = x[real]
            seen[client].append([int(v) for v in x])
    return seen


def own(samples: Samples, client: int) -> set[int]:
    return set(range(int(samples.offsets[client]), int(samples.offsets[client + 1])))


@given(some_counts, st.integers(1, 8), st.integers(1, 3), st.booleans(), st.booleans())
def test_every_sample_exactly_once_per_pass(counts: Counts, batch: int, epochs: int, shuffle: bool, index: bool) -> None:
    samples, plan = numbered(counts, index), Plan(batch, epochs, None, shuffle)
    for client, batches in walk(plan, samples).items():
        passes = -(-counts[client] // batch)
        assert len(batches) == epochs * passes == int(plan.lengths(samples.counts())[client])
        assert sum(map(len, batches)) == int(plan.seen(samples.counts(), plan.lengths(samples.counts()))[client])
        for e in range(epochs):
            once = [v for b in batches[e * passes : (e + 1) * passes] for v in b]
            assert len(once) == counts[client] and set(once) == own(samples, client)
            assert [len(b) for b in batches[e * passes : (e + 1) * passes]] == [batch] * (counts[client] // batch) + (
                [counts[client] % batch] if counts[client] % batch else []
            )


@given(some_counts, st.integers(1, 8), st.integers(1, 9), st.booleans())
def test_steps_wrap_around_at_the_end_of_the_data(counts: Counts, batch: int, steps: int, shuffle: bool) -> None:
    samples, plan = numbered(counts), Plan(batch, 7, steps, shuffle)
    assert plan.lengths(samples.counts()).tolist() == [steps] * len(counts)
    for client, batches in walk(plan, samples).items():
        assert len(batches) == steps
        passes = -(-counts[client] // batch)
        for begin in range(0, steps, passes):
            some = [v for b in batches[begin : begin + passes] for v in b]
            assert len(set(some)) == len(some) and set(some) <= own(samples, client)
            if begin + passes <= steps:
                assert set(some) == own(samples, client)


@given(st.lists(st.integers(1, 12), min_size=2, max_size=5), st.integers(1, 6), st.sampled_from([None, 3, 7]), st.data())
def test_a_client_sees_the_same_batches_whoever_else_is_there(
    counts: Counts, batch: int, steps: int | None, data: st.DataObject
) -> None:
    samples, plan = numbered(counts), Plan(batch, 2, steps)
    together = walk(plan, samples)
    some = data.draw(st.lists(st.sampled_from(range(len(counts))), min_size=1, unique=True))
    ids = torch.tensor(some)
    ids = ids[(-plan.lengths(samples.counts(ids))).argsort(stable=True)]
    assert walk(plan, samples, ids) == {i: together[i] for i in ids.tolist()}


@given(some_counts, st.integers(1, 8), st.data())
def test_seen_counts_the_samples_of_any_number_of_steps(counts: Counts, batch: int, data: st.DataObject) -> None:
    """Also where it is neither the plan's own number nor whole passes."""
    samples, plan = numbered(counts), Plan(batch)
    steps = data.draw(st.lists(st.integers(0, 9), min_size=len(counts), max_size=len(counts)).map(lambda s: sorted(s)[::-1]))
    ids, zeros, lengths = torch.arange(len(counts)), torch.zeros(len(counts)).long(), torch.tensor(steps)
    seen = torch.zeros(len(counts)).long()
    for active, batch_ in plan.batches(samples, ids, Streams(0), zeros, lengths):
        width = batch_.x.shape[1] if batch_.weight is None else (batch_.weight > 0).sum(1)
        seen[:active] += width
    assert torch.equal(plan.seen(samples.counts(), lengths), seen)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(1, 6), st.booleans(), st.data())
def test_rounds_and_steps_of_their_own_give_each_client_the_batches_it_has_alone(
    counts: Counts, batch: int, shuffle: bool, data: st.DataObject
) -> None:
    samples, plan, streams, n = numbered(counts), Plan(batch, shuffle=shuffle), Streams(1), len(counts)
    steps = torch.tensor(data.draw(st.lists(st.integers(1, 7), min_size=n, max_size=n).map(lambda s: sorted(s)[::-1])))
    rounds = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)))
    together = list(plan.batches(samples, torch.arange(n), streams, rounds, steps))
    assert [active for active, _ in together] == [int((steps > k).sum()) for k in range(int(steps[0]))]
    for i in range(n):
        alone = list(plan.batches(samples, torch.tensor([i]), streams, rounds[i : i + 1], steps[i : i + 1]))
        assert len(alone) == steps[i]
        for (_, one), (_, all_) in zip(alone, together, strict=False):
            real = one.x.shape[1]
            assert torch.equal(all_.x[i, :real], one.x[0]) and all_.rounds[i] == one.rounds[0]
            assert all_.weight is None or bool((all_.weight[i, real:] == 0).all())


def test_those_still_at_work_come_first() -> None:
    samples, plan = numbered([9, 5, 2]), Plan(batch=2)
    ids, zeros = torch.arange(3), torch.zeros(3).long()
    active = [n for n, _ in plan.batches(samples, ids, Streams(0), zeros, plan.lengths(samples.counts()))]
    assert active == [3, 2, 2, 1, 1]


def test_order_is_new_in_every_pass_round_and_client_and_stored_without_shuffle() -> None:
    samples = numbered([12, 12])
    first = walk(Plan(batch=12, epochs=2), samples)
    orders = [[v % 12 for v in b] for batches in first.values() for b in batches]
    orders += [[v % 12 for v in b] for batches in walk(Plan(batch=12), samples, round=5).values() for b in batches]
    assert len({tuple(o) for o in orders}) == len(orders) == 6
    assert walk(Plan(batch=12, shuffle=False), samples) == {0: [list(range(12))], 1: [list(range(12, 24))]}


def test_orders_are_uniform() -> None:
    """Each of the six orders of three samples comes up equally often."""
    samples = numbered([3] * 3000)
    batches = [tuple(v - 3 * c for v in b[0]) for c, b in walk(Plan(batch=3), samples).items()]
    often = [batches.count(o) for o in set(batches)]
    assert len(often) == 6 and max(abs(n - 500) for n in often) < 4 * (3000 * 5 / 36) ** 0.5


def test_unequal_batches_are_padded_with_weight_zero() -> None:
    samples = numbered([3, 2])
    zeros, ones = torch.zeros(2).long(), torch.ones(2).long()
    ((active, batch),) = Plan(batch=4, shuffle=False).batches(samples, torch.arange(2), Streams(0), zeros, ones)
    assert active == 2 and batch.weight is not None
    torch.testing.assert_close(batch.weight, torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1 / 2, 1 / 2, 0]], dtype=torch.float64))


def test_no_clients_no_batches() -> None:
    none = torch.arange(0)
    assert list(Plan().batches(numbered([3]), none, Streams(0), none, none)) == []


@pytest.mark.parametrize("index", [False, True])
def test_samples_of_one_client(index: bool) -> None:
    samples = numbered([2, 3, 1], index)
    assert (
        samples.clients == 3 and samples.counts().tolist() == [2, 3, 1] and samples.counts(torch.tensor([2, 0])).tolist() == [1, 2]
    )
    assert [samples.of(i)[1].tolist() for i in range(3)] == [[0, 1], [2, 3, 4], [5]]
    assert samples.to("cpu", torch.float32).x.dtype == torch.float32 and samples.to("cpu", torch.float32).y.dtype == torch.int64
