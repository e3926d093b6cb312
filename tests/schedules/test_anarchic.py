"""Workers that come when they like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import Seen, Tally, bowls, done, watch

import hanse as hs
from hanse.methods import AFA_CS
from hanse.schedules import anarchic

HABITS = anarchic(m=2, steps=(1, 4), pause="evenly(2.0, 0.1)")
"""Workers of ten kinds, from rare to frequent."""


def jobs_of(federation: hs.Federation, schedule: anarchic, rounds: int) -> np.ndarray:
    """All jobs that the server collected."""
    found: list[Any] = []

    def listen(net: Any) -> None:
        collect = net.collect

        def listening(jobs: Any, *args: Any) -> Any:
            found.append(jobs)
            return collect(jobs, *args)

        net.collect = listening

    engine = hs.engines.local(path="vmap", chunk=10, workers=1, threads=1)
    hs.run(federation, Tally(), schedule, rounds=rounds, evaluate=0, engine=engine, on_start=listen)
    return np.concatenate(found)


# ---- when the server steps


def test_a_step_is_made_of_m_distinct_workers_and_of_all_that_came_meanwhile() -> None:
    """Job times from 0.2 to 1 s: by the time half of the workers have contributed, some have twice."""
    seen = watch(bowls(), anarchic(m=5), rounds=20)
    assert all(len(set(cohort)) == 5 for cohort in seen.cohorts)
    assert any(len(cohort) > 5 for cohort in seen.cohorts)
    assert done(seen) == seen.net.taken.tolist()


@pytest.mark.parametrize(("clients", "m"), [(4, 1), (10, 1), (30, 3)])
def test_by_default_a_tenth_of_the_workers_makes_a_step(clients: int, m: int) -> None:
    seen = watch(bowls(clients, job="exponential(1)"), anarchic(), rounds=10)
    assert all(len(set(cohort)) == m for cohort in seen.cohorts)


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(hs.ConfigError, match=r"anarchic.m: 11 is not allowed: at most the number of clients, 10"):
        watch(bowls(), anarchic(m=11))


def test_nobody_waits_for_anybody() -> None:
    """A worker that needs a hundred seconds holds nobody up, and its contribution counts when it comes."""
    slow = bowls(job="listed((100, 1, 1, 1, 1, 1, 1, 1, 1, 1))")
    seen = watch(slow, anarchic(m=9), rounds=105)
    assert seen.seconds[:99] == pytest.approx(range(1, 100))
    assert seen.net.taken[0] == 1
    late = next(r for r in seen.replies if 0 in r.clients)
    assert int(late.versions[late.clients == 0]) == 0


def test_workers_start_from_the_newest_model_there_is() -> None:
    """Equal workers that all contribute at once are never late."""
    seen = watch(bowls(job="1"), anarchic(m=10), rounds=5)
    assert [r.versions.unique().tolist() for r in seen.replies] == [[0], [1], [2], [3], [4]]
    assert seen.seconds == pytest.approx([1, 2, 3, 4, 5])


# ---- what workers choose


def test_steps_are_drawn_anew_for_every_job_and_take_their_time() -> None:
    federation = hs.Federation(hs.tasks.quadratics(), 10, hs.natural(), hs.fleet.devices(step=0.5), dtype="float64")
    jobs = jobs_of(federation, anarchic(m=10, steps=(2, 5)), 30)
    counts = np.bincount(jobs["steps"])
    assert counts[:2].sum() == 0 and len(counts) == 6
    assert counts[2:] == pytest.approx(len(jobs) / 4, rel=0.25)
    assert all(len(set(jobs["steps"][jobs["client"] == i])) == 4 for i in range(10))
    assert np.array_equal(jobs["arrives"] - jobs["sent"], jobs["steps"] * 500_000_000)


def test_without_steps_the_rule_decides() -> None:
    assert set(jobs_of(bowls(), anarchic(m=10), 2)["steps"]) == {1}


def test_the_fewest_steps_come_first() -> None:
    with pytest.raises(hs.ConfigError, match=r"anarchic.steps: \(5, 2\) is not allowed: the fewest come first"):
        anarchic(steps=(5, 2))


def test_pauses_are_exponential_with_a_mean_of_each_worker() -> None:
    jobs = jobs_of(bowls(3, job="0.1"), anarchic(m=1, pause="listed((0.5, 1, 2))"), 200)
    for i, mean in enumerate((0.5, 1, 2)):
        pauses = np.diff(np.sort(jobs["sent"][jobs["client"] == i])) / 1e9 - 0.1
        assert len(pauses) > 25
        assert pauses.mean() == pytest.approx(mean, abs=4 * mean / len(pauses) ** 0.5)
        assert pauses.std() == pytest.approx(mean, rel=0.5)
        assert pauses.min() < 0.2 * mean


# ---- staleness


def test_what_is_older_than_allowed_moves_nothing_and_stays_in_the_books() -> None:
    seen = watch(bowls(), anarchic(m=2, oldest=3), rounds=40)
    scales = []
    for round, reply in zip(seen.rounds, seen.replies, strict=True):
        assert reply.scale is not None
        scales += reply.scale.tolist()
        assert reply.scale.tolist() == [float(round - v <= 3) for v in reply.versions.tolist()]
        torch.testing.assert_close(reply.sums["delta"], torch.full_like(reply.sums["delta"], len(reply)))
    assert 0.0 in scales and 1.0 in scales
    assert all(r.scale is None for r in watch(bowls(), anarchic(m=2), rounds=10).replies)


# ---- workers that are away or lost


def test_who_is_there_steps_where_presence_counts_rounds() -> None:
    """Fewer than m are there in most rounds: each contributes once, and in a round of nobody the model stays."""
    seen = watch(bowls(job="0", trace="bernoulli(0.15)"), anarchic(m=5), rounds=60)
    sizes = [len(cohort) for cohort in seen.cohorts]
    assert all(len(set(cohort)) == len(cohort) for cohort in seen.cohorts)
    assert {0, 1, 2} <= set(sizes) and sum(sizes) == pytest.approx(60 * 1.5, abs=4 * (60 * 10 * 0.15 * 0.85) ** 0.5)
    for t in range(1, 60):
        assert torch.equal(seen.models[t], seen.models[t - 1]) is (sizes[t] == 0)


def test_whoever_comes_back_starts_again() -> None:
    seen = watch(bowls(job="0.5", trace="cyclic(rate=0.3, period=20, slot=1)"), anarchic(m=3), rounds=40)
    assert min(done(seen)) >= 3 and seen.seconds[-1] > 20


def test_a_worker_that_nobody_replaces_is_waited_for() -> None:
    """There for a tenth of the time: no step without it, and none while it is away."""
    seen = watch(bowls(1, job="0.5", trace="cyclic(rate=0.1, period=20, slot=1)"), anarchic(), rounds=6)
    assert seen.cohorts == [[0]] * 6
    assert seen.seconds == pytest.approx([18.5, 19.0, 19.5, 20.0, 38.5, 39.0])


def test_a_worker_that_needs_no_time_contributes_once_a_step() -> None:
    seen = watch(bowls(job="listed((0, 1, 1, 1, 1, 1, 1, 1, 1, 1))"), anarchic(m=10), rounds=5)
    assert seen.cohorts == [list(range(10))] * 5
    assert seen.seconds == pytest.approx([1, 2, 3, 4, 5])


@pytest.mark.parametrize(
    ("schedule", "how"),
    [
        (anarchic(m=10, patience=1.5), {"loss": 0.3}),
        (anarchic(m=10, patience=0.5), {}),  # some jobs take longer than that
        (anarchic(m=10, pause=0.1), {"trace": "crashes(every=2, lasts=inf, slot=0.25)"}),
        (anarchic(m=3, patience=1), {"loss": 1.0}),
        (anarchic(m=10), {"job": "listed((1e9, 0, 1, 1, 1, 1, 1, 1, 1, 1))"}),
    ],
    ids=["lost", "too slow", "gone", "nothing", "an instant"],
)
def test_the_server_goes_on_with_fewer_where_not_everybody_can_contribute(schedule: anarchic, how: dict[str, Any]) -> None:
    seen = watch(bowls(**how), schedule, rounds=6)
    assert len(seen.records) == 6
    assert all(len(cohort) <= 10 * 10 + 10 for cohort in seen.cohorts)
    assert done(seen) == seen.net.taken.tolist()


# ---- repeating and resuming


def test_the_same_again_is_the_same_bit_for_bit() -> None:
    one, other = (watch(bowls(loss=0.1), HABITS.model_copy(update={"patience": 3.0}), AFA_CS(), 20) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.models, other.models, strict=True))
    assert one.records == other.records


@pytest.mark.parametrize("after", [1, 7])
def test_a_run_that_was_stopped_goes_on_identically(tmp_path: Path, after: int) -> None:
    """With workers at work, pausing and away."""
    federation = bowls(job="evenly(1.0, 0.2)", loss=0.1, trace="bernoulli(0.7, slot=0.5)")
    schedule = anarchic(m=2, steps=(1, 4), pause="evenly(2.0, 0.1)", patience=3, oldest=4)
    engine = hs.engines.local(path="vmap", chunk=10, workers=1, threads=1)

    class Stopped(Seen):
        def write(self, record: Any) -> None:
            super().write(record)
            self.net.stopping |= record["round"] == after

    def go(**how: Any) -> hs.Run:
        return hs.run(federation, AFA_CS(), schedule, rounds=14, evaluate=0, engine=engine, **how)

    stop = Stopped()
    assert len(go(out=tmp_path, writers=[stop], on_start=stop.start).history) == after
    assert bool(stop.net.notes["pausing"].any()) and len(stop.net.out)
    expected, resumed = go(), hs.resume(tmp_path, federation)
    assert resumed.history == expected.history
    assert all(torch.equal(t, resumed.weights[n]) for n, t in expected.weights.items())
