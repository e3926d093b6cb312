"""The event queue in virtual time: when things happen by formula, in which order, and that a snapshot loses nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_traces import people, written
from safetensors.torch import load, save

from hanse.core.errors import CheckpointError
from hanse.core.streams import Streams
from hanse.fleet import Fleet, Work, devices, ideal
from hanse.fleet.clock import NEVER, SECOND, Clock, Events, Jobs, nanoseconds

MS = SECOND // 1000


def clock(fleet: Fleet, clients: int = 4) -> Clock:
    return Clock(fleet, people(clients), Streams(0))


def send(c: Clock, who: Sequence[int], size: int = 0, steps: int = 1, flops: float = 0.0, patience: float = math.inf) -> Jobs:
    """Send a message of ``size`` bytes; every job has a key of its own."""
    ids = torch.tensor(who)
    keys = c.tickets + np.arange(len(ids))
    work = Work(torch.full((len(ids),), steps), torch.full((len(ids),), flops, dtype=torch.float64), 0.0)
    return c.send(ids, 0, keys, np.zeros(1, np.int64), torch.full((len(ids),), size), work, patience)


def wait(c: Clock, replies: int = 1, until: float = math.inf, up: int = 0, weighed: list[int] | None = None) -> Events:
    """Wait, replies having ``up`` bytes; ``weighed`` notes when the clock had to know that. Of what has arrived it is told then."""

    def weigh() -> None:
        due = c.out[(c.out["known"] == 0) & (c.out["arrives"] < NEVER)]
        c.weigh(due["ticket"], torch.full((len(due),), up))
        if weighed is not None:
            weighed.append(c.time)

    events = c.advance(replies, until, weigh)
    unknown = c.arrived["ticket"][c.arrived["known"] == 0]
    c.weigh(unknown, torch.full((len(unknown),), up))
    return events


def clients_of(jobs: Jobs) -> list[int]:
    found: list[int] = jobs["client"].tolist()
    return found


# ---- when


def test_times_by_formula() -> None:
    """latency + size / down; then job + step * steps + flops / speed; then latency + size / up."""
    fleet = devices(
        gflops="listed((2, inf))", step=0.1, job="listed((0.2, 0))", down=8, up="listed((4, inf))", latency="listed((0.25, 0))"
    )
    c = clock(fleet, 2)
    jobs = send(c, [0, 1], size=500_000, steps=3, flops=1e9)
    assert jobs["sent"].tolist() == [0, 0] and c.down == 1_000_000
    assert jobs["received"].tolist() == [750 * MS, 500 * MS]  # 8 Mbit/s are a megabyte a second
    assert jobs["computed"].tolist() == [1750 * MS, 800 * MS]  # 0.2 + 3 * 0.1 + 0.5, and 3 * 0.1
    events = wait(c, replies=2, up=250_000)
    assert events.arrived["arrives"].tolist() == [800 * MS, 2500 * MS] and clients_of(events.arrived) == [1, 0]
    assert c.time == 2500 * MS and c.now == 2.5 and c.up == 500_000


def test_a_later_job_begins_when_it_is_sent() -> None:
    c = clock(devices(job=1.5, latency=0.25))
    assert wait(c, until=10).due
    assert send(c, [0])["received"].tolist() == [10_250 * MS] and send(c, [1])["computed"].tolist() == [11_750 * MS]
    assert wait(c, 2).arrived["arrives"].tolist() == [12 * SECOND] * 2


def test_an_ideal_fleet_takes_no_time() -> None:
    c = clock(ideal())
    send(c, [2, 0, 1], size=10**9)
    events = wait(c, 3, up=10**9)
    assert clients_of(events.arrived) == [0, 1, 2] and c.time == 0 and (c.down, c.up) == (3 * 10**9, 3 * 10**9)


def test_times_add_without_rounding() -> None:
    """Ten times a tenth of a second is a second, which in floating point it is not."""
    c = clock(devices(job=0.1))
    for _ in range(10):
        send(c, [0])
        wait(c)
    assert c.time == SECOND and sum([0.1] * 10) != 1.0


@given(st.floats(0, 1e9))
def test_seconds_become_whole_nanoseconds(seconds: float) -> None:
    assert abs(int(nanoseconds(seconds)) - seconds * SECOND) <= 0.5
    assert int(nanoseconds(math.inf)) == int(nanoseconds(1e30)) == NEVER


def test_work_stands_still_while_the_client_is_away_and_is_lost_where_the_trace_says_so() -> None:
    """Client 0 is away in the second second; client 1 stays."""
    for lost in (False, True):
        c = clock(devices(job=1.5, trace=written(speeds=((1, 0, 1), (1, 1, 1)), slot=1.0, lost=lost)), 2)
        jobs = send(c, [0, 1])
        assert jobs["computed"].tolist() == [NEVER if lost else 2500 * MS, 1500 * MS]
        assert clients_of(wait(c, 2).arrived) == ([1] if lost else [1, 0])


# ---- in which order


def test_replies_of_one_instant_come_by_client() -> None:
    c = clock(devices(job=1))
    send(c, [3])
    send(c, [1, 2])
    send(c, [0])
    events = wait(c)
    assert clients_of(events.arrived) == [0, 1, 2, 3] == clients_of(c.arrived)


def test_what_happens_at_once_is_told_at_once() -> None:
    """At one second: client 1 replies, the job of client 0 is given up, and the rests of clients 2 and 3 are over."""
    c = clock(devices(job="listed((5, 1, 0, 0))"))
    send(c, [0], patience=1.0)
    send(c, [1])
    c.rest(torch.tensor([3, 2]), torch.tensor([1.0, 1.0]).double())
    events = wait(c, replies=9)
    assert clients_of(events.arrived) == [1] and clients_of(events.lost) == [0] and events.rested.tolist() == [2, 3]
    assert c.time == SECOND and not len(c.rests) and not len(c.live)


def test_a_reply_in_the_last_instant_is_not_given_up() -> None:
    c = clock(devices(job=1))
    send(c, [0], patience=1.0)
    events = wait(c)
    assert clients_of(events.arrived) == [0] and not len(events.lost) and c.lost == 0


def test_a_heavy_reply_lets_others_pass() -> None:
    """Client 0 has computed first, but its link is slow: the order is that of arrival."""
    c = clock(devices(job="listed((1, 2))", up="listed((0.8, inf))"), 2)
    send(c, [0, 1])
    assert [clients_of(wait(c, up=200_000).arrived) for _ in range(2)] == [[1], [0]]
    assert c.time == 3 * SECOND


@pytest.mark.parametrize(("up", "asked"), [(1, [900 * MS]), (math.inf, [])])
def test_sizes_are_asked_for_only_where_they_decide_what_arrives(up: float, asked: list[int]) -> None:
    c, weighed = clock(devices(job=1, up=up)), list[int]()
    send(c, [0, 1])
    wait(c, until=0.9, weighed=weighed)
    assert weighed == []
    wait(c, until=1.5, weighed=weighed)
    assert weighed == asked and len(c.arrived) == 2


# ---- what a wait ends with


def test_the_first_k_replies() -> None:
    c = clock(devices(job="listed((4, 1, 3, 2))"))
    send(c, [0, 1, 2, 3])
    events = wait(c, replies=2)
    assert clients_of(events.arrived) == [1, 3] and c.time == 2 * SECOND and not events.due
    assert clients_of(c.live) == [0, 2]
    assert clients_of(wait(c, replies=5).arrived) == [2, 0]  # more than can come: all of them
    assert c.time == 4 * SECOND


def test_until() -> None:
    c = clock(devices(job=1))
    send(c, [0])
    early = wait(c, until=0.25)
    assert early.due and not len(early.arrived) and c.time == 250 * MS
    past = wait(c, until=0.1)
    assert past.due and c.time == 250 * MS  # time does not go back
    both = wait(c, until=1.0)
    assert both.due and clients_of(both.arrived) == [0] and c.time == SECOND


def test_a_rest_ends_a_wait() -> None:
    c = clock(devices(job=9))
    send(c, [0])
    c.rest(torch.tensor([1, 2]), torch.tensor([3.0, 2.0]).double())
    assert [wait(c).rested.tolist() for _ in range(2)] == [[2], [1]]
    assert c.time == 3 * SECOND and clients_of(wait(c).arrived) == [0]


def test_a_new_job_ends_a_rest() -> None:
    c = clock(devices(job=1))
    c.rest(torch.tensor([0, 1]), torch.tensor([5.0, 6.0]).double())
    send(c, [0])
    assert clients_of(wait(c).arrived) == [0]
    assert wait(c).rested.tolist() == [1]


def test_where_nothing_can_happen_a_wait_is_over_at_once() -> None:
    c = clock(devices(job=1))
    events = wait(c)
    assert c.time == 0 and not len(events.arrived) and not len(events.lost) and not len(events.rested) and not events.due


# ---- what goes wrong


def test_a_hopeless_job_is_given_up_only_when_nothing_else_can_happen() -> None:
    """The reply of client 0 is lost. Nobody can know, so it is out for as long as there is something to wait for."""
    c = clock(devices(job="listed((1, 2, 0, 0))", loss="listed((1, 0, 0, 0))"))
    send(c, [0, 1])
    c.rest(torch.tensor([2]), torch.tensor([3.0]).double())
    assert wait(c, replies=2).due is False and clients_of(c.live) == [0] and c.time == 2 * SECOND  # its reply is all that can come
    assert wait(c, until=2.5).due and wait(c).rested.tolist() == [2] and clients_of(c.live) == [0]
    end = wait(c)
    assert clients_of(end.lost) == [0] and c.time == 3 * SECOND and c.lost == 1 and not len(c.live) and not len(c.out)


def test_with_the_last_reply_goes_the_hope_for_the_lost_ones() -> None:
    c = clock(devices(job=1, loss="listed((1, 0, 0, 0))"))
    send(c, [0, 1, 2])
    assert clients_of(wait(c, replies=2).arrived) == [1, 2] and clients_of(c.live) == [0]  # as many as asked for: nothing was lost
    send(c, [1])
    events = wait(c, replies=2)
    assert clients_of(events.arrived) == [1] and clients_of(events.lost) == [0]


def test_a_lost_reply_costs_no_bytes() -> None:
    c = clock(devices(job=1, loss="listed((1, 0, 0, 0))"))
    send(c, [0, 1], size=10)
    wait(c, 2, up=100)
    assert (c.down, c.up) == (20, 100)


def test_patience() -> None:
    """The server gives up after half a second; the reply that still comes costs bytes and is not delivered."""
    c = clock(devices(job=1))
    (job,) = send(c, [0], patience=0.5)
    events = wait(c, up=100)
    assert clients_of(events.lost) == [0] and c.time == 500 * MS and (c.lost, c.late, c.up) == (1, 0, 0)
    assert not len(c.live) and clients_of(c.out) == [0]  # its client is still at it
    later = wait(c, until=2.0, up=100)
    assert not len(later.arrived) and not len(c.arrived) and not len(c.out) and (c.late, c.up) == (1, 100)
    assert [(jobs["ticket"].tolist(), at, used) for jobs, at, used in c.ended if len(jobs)] == [([job["ticket"]], 500 * MS, False)]


def test_a_client_turns_to_a_new_job() -> None:
    """Only after the old one was given up; that then sends nothing any more."""
    c = clock(devices(job=1))
    send(c, [2, 0], patience=0.5)
    with pytest.raises(ValueError, match="client 2 is at work"):
        send(c, [1, 2])
    wait(c)
    send(c, [2])
    events = wait(c, up=100)
    assert clients_of(events.arrived) == [2] and events.arrived["sent"].tolist() == [500 * MS]
    assert c.late == 1 and c.up == 200  # of client 0, whose reply came in the meantime


def test_a_reply_that_comes_twice_is_delivered_once_and_paid_twice() -> None:
    c = clock(devices(job=1, duplicates="listed((1, 0, 0, 0))"))
    send(c, [0, 1])
    events = wait(c, 2, up=100)
    assert clients_of(events.arrived) == [0, 1] and c.duplicates == 1 and c.up == 300
    assert not len(wait(c, until=100).arrived)


def test_chance_follows_seed_client_and_key() -> None:
    """Not who else is asked, nor when; and a job's key decides alone."""
    fleet = devices(job=1, loss=0.5)

    def lost(who: list[int], keys: list[int]) -> dict[int, bool]:
        c = clock(fleet, 50)
        ids = torch.tensor(who)
        work = Work(torch.ones(len(ids)).long(), torch.zeros(len(ids)), 0.0)
        jobs = c.send(ids, 0, np.array(keys), np.zeros(1, np.int64), torch.zeros(len(ids)), work, math.inf)
        return {int(job["client"]): bool(job["arrives"] >= NEVER) for job in jobs}

    everyone = lost(list(range(50)), [3] * 50)
    assert lost([40, 7, 9], [3] * 3) == {i: everyone[i] for i in (40, 7, 9)}
    assert 10 < sum(everyone.values()) < 40 and lost(list(range(50)), [4] * 50) != everyone


def test_clients_that_are_called_off_send_nothing() -> None:
    c = clock(devices(job="listed((1, 2, 3, 4))"))
    jobs = send(c, [0, 1, 2, 3])
    wait(c, 2, up=100)
    c.call_off(jobs["ticket"][[1, 2]])  # one has arrived, the other is under way
    assert clients_of(c.arrived) == [0] and clients_of(c.live) == [3]
    assert clients_of(wait(c, 2, up=100).arrived) == [3] and c.up == 300 and c.lost == 0
    send(c, [2])


def test_replies_wait_until_they_are_taken() -> None:
    c = clock(devices(job="listed((3, 1, 2, 0))"))
    jobs = send(c, [0, 1, 2])
    wait(c, 3)
    assert clients_of(c.arrived) == [1, 2, 0]
    assert clients_of(c.take(jobs["ticket"][[0, 2]])) == [2, 0] and clients_of(c.arrived) == [1]  # in the order of arrival


def test_every_job_ends_once() -> None:
    """Used, thrown away, called off or given up, and when."""
    c = clock(devices(job="listed((1, 2, 9, 9))"))
    jobs = send(c, [0, 1, 3])
    send(c, [2], patience=4)
    wait(c)
    c.take(jobs["ticket"][:1])
    wait(c)
    c.call_off(jobs["ticket"][1:])
    wait(c)
    ends = {int(job["client"]): (at, used) for rows, at, used in c.ended for job in rows}
    assert ends == {0: (SECOND, True), 1: (2 * SECOND, False), 3: (2 * SECOND, False), 2: (4 * SECOND, False)}
    assert sum(len(rows) for rows, _, _ in c.ended) == 4


# ---- what it costs


def test_tables_grow_with_jobs_and_not_with_clients() -> None:
    for clients in (10, 1_000_000):
        c = clock(devices(job="exponential(1.0)", loss=0.1), clients)
        for _ in range(100):
            free = [i for i in range(10) if i not in c.live["client"]]
            send(c, free, patience=3.0)
            c.take(wait(c, 2).arrived["ticket"])
            assert len(c.out) <= 10 and len(c.arrived) == 0
        saved = c.snapshot()
        assert len(saved["out"]) == len(c.out) <= 10 and sum(t.nbytes for t in saved.values()) < 3000


# ---- saving


def test_a_snapshot_is_what_a_file_holds() -> None:
    c = clock(devices(job=1, latency="lognormal(0.1, 1.0)", up=5))
    send(c, [0, 1, 3], patience=0.7)
    c.rest(torch.tensor([2]), torch.tensor([0.1]).double())
    wait(c, up=1000)
    saved, fresh = load(save(c.snapshot())), clock(c.fleet)
    fresh.restore(saved)
    assert same(c, fresh) and fresh.now == c.now
    before = {n: t.clone() for n, t in saved.items()}
    wait(fresh, 3)
    assert all(torch.equal(saved[n], t) for n, t in before.items())


def same(one: Clock, other: Clock) -> bool:
    a, b = one.snapshot(), other.snapshot()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


amounts = st.sampled_from(["0", "0.5", "evenly(2.0, 0.2)", "exponential(0.5)", "lognormal(0.5, 1.0)"])
chances = st.sampled_from([0.0, 0.2, 0.7])
fleets = st.builds(
    "devices(job={}, latency={}, up={}, loss={}, duplicates={}, trace={})".format,
    amounts,
    amounts,
    st.sampled_from(["inf", "0.001", "exponential(0.001)"]),
    chances,
    chances,
    st.sampled_from(["always", "bernoulli(0.6, slot=0.5)", "crashes(every=2.0, lasts=1.0, slot=0.25)"]),
)
people_ = st.lists(st.integers(0, 5), min_size=1, unique=True)
doings = st.one_of(
    st.tuples(st.just("send"), people_, st.integers(0, 500), st.sampled_from([0.3, 2.0, math.inf])),
    st.tuples(st.just("wait"), st.integers(1, 4), st.sampled_from([0.2, 1.5, math.inf]), st.integers(0, 500)),
    st.tuples(st.just("rest"), people_, st.floats(0, 3)),
    st.tuples(st.just("take"), st.integers(0, 2)),
    st.tuples(st.just("call off"), st.integers(0, 2)),
)


def do(c: Clock, doing: tuple[Any, ...]) -> object:
    """One thing a schedule may do, and all that can be seen of it."""
    match doing:
        case "send", who, size, patience:
            free = [i for i in who if i not in c.live["client"]]
            return send(c, free, size, patience=patience).tolist() if free else None
        case "wait", replies, seconds, up:
            events = wait(c, replies, c.now + seconds, up)
            return events.arrived.tolist(), events.lost.tolist(), events.rested.tolist(), events.due
        case "rest", who, seconds:
            return c.rest(torch.tensor(who), torch.full((len(who),), seconds, dtype=torch.float64))
        case "take", n:
            return c.take(c.arrived["ticket"][:n]).tolist()
        case "call off", n:
            return c.call_off(c.live["ticket"][:n])
    raise AssertionError(doing)


@settings(max_examples=40)
@given(fleets, st.lists(doings, max_size=25), st.data())
def test_a_restored_clock_goes_on_identically(fleet: str, script: list[tuple[Any, ...]], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(script)))
    whole, fresh = (clock(Fleet.parse(fleet), 6) for _ in range(2))
    for doing in script[:cut]:
        do(whole, doing)
    fresh.restore(load(save(whole.snapshot())))
    for doing in script[cut:]:
        assert do(whole, doing) == do(fresh, doing)
        assert same(whole, fresh)


@settings(max_examples=40)
@given(fleets, st.lists(doings, max_size=25))
def test_whatever_happens_no_job_is_doubled_and_time_and_bytes_only_grow(fleet: str, script: list[tuple[Any, ...]]) -> None:
    c = clock(Fleet.parse(fleet), 6)
    counters = [0] * 7
    for doing in script:
        do(c, doing)
        now = c.snapshot()["counters"].tolist()
        assert all(a <= b for a, b in zip(counters, now, strict=True))
        counters = now
        there = np.concatenate([c.out["ticket"], c.arrived["ticket"]])
        assert len(np.unique(there)) == len(there) and len(np.unique(c.live["client"])) == len(c.live)
        ended = [int(t) for rows, _, _ in c.ended for t in rows["ticket"]]
        assert len(set(ended)) == len(ended)
        assert c.tickets == len(c.live) + len(c.arrived) + len(ended)  # every job is under way, has arrived, or has ended
        assert bool((c.arrived["arrives"] <= c.time).all()) and bool((c.live["arrives"] >= c.time).all())


BAD = [
    (n, wrong) for n in ("counters", "rests", "out", "arrived") for wrong in ("missing", "fractions", "a column less", "a number")
]
BAD += [(n, "no such client") for n in ("rests", "out", "arrived")]


@pytest.mark.parametrize(("name", "wrong"), BAD)
def test_bad_snapshots_are_refused(name: str, wrong: str) -> None:
    c = clock(devices(job="listed((1, 2, 3, 4))"))
    send(c, [0, 1])
    c.rest(torch.tensor([2]), torch.tensor([9.0]).double())
    wait(c)
    saved = c.snapshot()
    match wrong:
        case "missing":
            del saved[name]
        case "fractions":
            saved[name] = saved[name].double()
        case "a column less":
            saved[name] = saved[name][..., :-1]
        case "a number":
            saved[name] = torch.tensor(3)
        case "no such client":
            saved[name][0, 0 if name == "rests" else 1] = 4
    before = c.snapshot()
    with pytest.raises(CheckpointError, match=f"clock.{name}"):
        c.restore(saved)
    assert all(torch.equal(before[n], t) for n, t in c.snapshot().items())  # nothing was taken from it


def test_a_trace_is_asked_from_the_moment_the_message_is_there() -> None:
    """A second of download: the client that goes away in the first second has nothing to lose yet."""
    trace = written(speeds=((0, 1),), slot=1.0, lost=True)
    c = clock(devices(job=0.5, down=8, trace=trace), 1)
    assert send(c, [0], size=1_000_000)["computed"].tolist() == [1500 * MS]


def test_an_exchange_where_nothing_takes_time_is_sending_weighing_waiting_and_taking() -> None:
    """The short way ends in the same time, traffic and number of jobs as the long one, and with nothing under way."""
    short, long = clock(ideal()), clock(ideal())
    assert short.still and not clock(devices(job=1)).still
    sizes = torch.arange(1, 5) * 1000
    short.exchange(torch.full((4,), 7), sizes)
    jobs = send(long, [0, 1, 2, 3], size=7)
    assert not long.still
    long.weigh(jobs["ticket"], sizes)
    while len(long.out):
        wait(long, 4)
    long.take(jobs["ticket"])
    assert long.still
    assert all(torch.equal(one, short.snapshot()[name]) for name, one in long.snapshot().items())


@pytest.mark.parametrize("busy", ["at work", "arrived", "resting"])
def test_time_is_not_still_while_anything_is_under_way(busy: str) -> None:
    c = clock(ideal())
    if busy == "resting":
        c.rest(torch.tensor([0]), torch.tensor([1.0]).double())
    else:
        send(c, [0])
    if busy == "arrived":
        wait(c)
    assert not c.still
