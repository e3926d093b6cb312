"""Gossip without rounds: nodes that train and average at times of their own."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import stop_after
from torch import Tensor

import hanse as hs
from hanse.aggregators.merging import average, variance_corrected
from hanse.core.errors import ConfigError
from hanse.core.wire import wire_size
from hanse.engines.programs import LocalNode
from hanse.methods import FedAvg, FedSAM, Scaffold
from hanse.schedules import async_gossip, gossip
from hanse.topologies import complete, random_neighbours, ring

ENGINE = hs.engines.local("stacked", 8, 1, 1, shortcuts=False)
IN_STEP = (10.0, 10.0)
IDLE = FedAvg(lr=1e-12, steps=1)
"""Training that changes nothing."""


def federation(clients: int = 8, **more: Any) -> hs.Federation:
    return hs.Federation(hs.tasks.digits(hidden=4), clients, hs.dirichlet(0.5), dtype="float64", **more)


def played(fed: hs.Federation, rule: FedAvg, schedule: hs.schedules.Schedule, rounds: int = 3, **more: Any) -> hs.Run:
    return hs.run(fed, rule, schedule, rounds=rounds, evaluate=0, engine=ENGINE, **more)


def models(run: hs.Run) -> Tensor:
    return run.state["state.x"]


def starts(fed: hs.Federation) -> Tensor:
    return torch.stack([fed.start(i) for i in range(fed.clients)])


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[float]]:
    """When each node begins to train, seconds, of the runs of a test."""
    found: dict[int, list[float]] = defaultdict(list)
    train = LocalNode.train

    async def timed(node: LocalNode, x: Tensor, round: int) -> Tensor:
        found[node.id].append(node.now)
        return await train(node, x, round)

    monkeypatch.setattr(LocalNode, "train", timed)
    return found


# ---- averaging, by hand


def test_two_nodes_in_step() -> None:
    """What they hold at the end of a round is what they have trained; the averages show in the next."""
    fed = federation(2)
    schedule = async_gossip(topology=complete(), every=IN_STEP, own=0.75, start="own")
    a, b = starts(fed)
    first, second, third = (models(played(fed, IDLE, schedule, rounds=n)) for n in (1, 2, 3))
    close(first, torch.stack([a, b]))
    close(second, torch.stack([0.75 * a + 0.25 * b, 0.75 * b + 0.25 * a]))
    close(third, torch.stack([0.625 * a + 0.375 * b, 0.625 * b + 0.375 * a]))


def test_three_nodes_in_step_average_what_all_had_before() -> None:
    fed = federation(3)
    x = starts(fed)
    w = torch.full((3, 3), 0.25, dtype=torch.float64).fill_diagonal_(0.5)
    for rounds in (1, 2, 4):
        run = played(fed, IDLE, async_gossip(every=IN_STEP, start="own"), rounds=rounds)
        close(models(run), torch.linalg.matrix_power(w, rounds - 1) @ x)


@pytest.mark.parametrize("merge", [average(), variance_corrected()])
def test_in_step_it_is_gossip(merge: Any) -> None:
    """From one start; what nodes hold at the end of a round is what they have trained, and not yet averaged."""
    fed, rule = federation(), FedSAM(lr=0.3, steps=3)
    run = played(fed, rule, async_gossip(topology=ring(4), every=IN_STEP, merge=merge))
    rounds = played(fed, rule, gossip(topology=ring(4), own=0.5, order="mix", merge=merge))
    close(models(run), models(rounds))
    assert run.history[-1]["seconds"] == 30.0


@pytest.mark.parametrize(("buffer", "merged"), [(None, 1), (2, 1), (4, 2)])
def test_averaging_begins_when_the_buffer_is_full(buffer: int | None, merged: int) -> None:
    """Two neighbours bring two models a round, so four take two rounds."""
    fed = federation(3)
    x, w = starts(fed), torch.full((3, 3), 0.25, dtype=torch.float64).fill_diagonal_(0.5)
    schedule = async_gossip(every=IN_STEP, start="own", buffer=buffer)
    before, after = (models(played(fed, IDLE, schedule, rounds=n)) for n in (merged, merged + 1))
    close(before, x)
    close(after, w @ x)


def test_a_buffer_of_one_averages_with_every_model_that_comes() -> None:
    """Nodes 0 and 2 send to node 1 in this order: twice a half of what it had."""
    fed = federation(3)
    x = starts(fed)
    run = played(fed, IDLE, async_gossip(every=IN_STEP, start="own", buffer=1), rounds=2)
    close(models(run)[1], 0.25 * x[1] + 0.25 * x[0] + 0.5 * x[2])


def test_nodes_begin_alike_or_each_for_itself() -> None:
    fed = federation(4)
    each: dict[Literal["same", "own"], Tensor] = {"same": fed.problem.start.expand(4, -1), "own": starts(fed)}
    for start, wanted in each.items():
        close(models(played(fed, IDLE, async_gossip(every=IN_STEP, start=start), rounds=1)), wanted)


# ---- times


def test_everybody_trains_every_8_to_12_seconds_anew(times: dict[int, list[float]]) -> None:
    played(federation(), IDLE, async_gossip(), rounds=20)
    gaps = torch.cat([torch.tensor([0.0, *at], dtype=torch.float64).diff() for at in times.values()])
    assert len(times) == 8 and len(gaps) == 8 * 20
    assert 8 <= float(gaps.min()) < 8.2 and 11.8 < float(gaps.max()) <= 12 + 1e-9
    assert float(gaps.mean()) == pytest.approx(10, abs=0.3)
    assert len(torch.unique(gaps)) == len(gaps)


@settings(max_examples=5)
@given(low=st.floats(0.5, 5), width=st.floats(0, 5), seed=st.integers(0, 9))
def test_rounds_are_as_many_trainings_as_nodes(low: float, width: float, seed: int) -> None:
    run = played(federation(4, seed=seed), IDLE, async_gossip(every=(low, low + width)), rounds=6)
    assert int(run.clients["rounds"].sum()) == 6 * 4
    assert 6 * low <= run.history[-1]["seconds"] * (1 + 1e-9) and run.history[-1]["seconds"] <= 6 * (low + width) + 1e-6


def test_the_interval_begins_when_training_ends(times: dict[int, list[float]]) -> None:
    fed = federation(2, fleet=hs.fleet.devices(job="listed((1.0, 5.0))", latency=0.0))
    played(fed, IDLE, async_gossip(topology=complete(), every=IN_STEP), rounds=2)
    assert times[0][:2] == pytest.approx([10.0, 21.0]) and times[1][:2] == pytest.approx([10.0, 25.0])


def test_what_arrives_while_a_node_trains_waits_until_it_has() -> None:
    """Node 1 trains from 10 to 15 seconds; node 0's model arrives at 11 and is averaged in after 15, before the training at 25."""
    fed = federation(2, fleet=hs.fleet.devices(job="listed((1.0, 5.0))", up=1e6, down=1e6, latency=0.0))
    x = starts(fed)
    run = played(fed, IDLE, async_gossip(topology=complete(), every=IN_STEP, start="own"), rounds=1)
    close(models(run), x)
    run = played(fed, IDLE, async_gossip(topology=complete(), every=IN_STEP, start="own"), rounds=2)
    close(models(run)[1], 0.5 * x[1] + 0.5 * x[0])


# ---- bytes


@pytest.mark.parametrize("merge", [average(), variance_corrected()])
def test_every_training_sends_the_model_to_every_neighbour(merge: Any) -> None:
    fed = federation()
    run = played(fed, IDLE, async_gossip(topology=ring(4), merge=merge), rounds=5)
    size = wire_size({"model.x": fed.problem.start})
    assert [record["bytes_up"] for record in run.history] == [n * 8 * 4 * size for n in range(1, 6)]
    assert run.clients["sent"].tolist() == [int(n) * 4 * size for n in run.clients["rounds"]]
    assert 0 < int(run.clients["received"].sum()) <= int(run.clients["sent"].sum())


# ---- chance, interruptions


def test_a_run_repeats_and_another_seed_does_not() -> None:
    one, again, other = (played(federation(seed=seed), FedAvg(), async_gossip(topology=ring(4))) for seed in (0, 0, 1))
    assert one.history == again.history and torch.equal(models(one), models(again))
    assert one.history[-1]["seconds"] != other.history[-1]["seconds"]


def test_a_resumed_run_is_played_again_and_comes_to_the_same(tmp_path: Path) -> None:
    fed, schedule = federation(fleet=hs.fleet.phones()), async_gossip(topology=ring(4), start="own", merge=variance_corrected())
    whole = played(fed, FedAvg(lr=0.3), schedule, rounds=4)

    stopped = played(fed, FedAvg(lr=0.3), schedule, rounds=4, out=tmp_path, on_start=stop_after(2))
    assert len(stopped.history) == 2
    again = hs.resume(tmp_path)
    assert again.history == whole.history and torch.equal(models(again), models(whole))
    assert torch.equal(again.clients["sent"], whole.clients["sent"])


def trace(folder: Path, *rows: str) -> str:
    file = folder / f"{len(rows)}.csv"
    file.write_text("\n".join(["client,time,online,speed", *rows]) + "\n")
    return f"recorded({str(file)!r})"


def test_who_goes_neither_trains_nor_hears_and_comes_back_with_what_it_had_trained(
    tmp_path: Path, times: dict[int, list[float]]
) -> None:
    """Node 0 is away from 25 to 47 seconds: it has trained at 10 and 20 and trains again ten seconds after it is back."""
    fed = federation(3, fleet=hs.fleet.ideal(trace=trace(tmp_path, "0,25,0,0", "0,47,1,1")))
    run = played(fed, IDLE, async_gossip(every=IN_STEP, start="own"), rounds=5)
    assert times[0] == [10.0, 20.0, 57.0] and times[1] == times[2] == [10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
    size = wire_size({"model.x": fed.problem.start})
    assert run.clients["sent"].tolist() == [3 * 2 * size, 6 * 2 * size, 6 * 2 * size]
    assert run.clients["received"].tolist() == [4 * 2 * size, 9 * size, 9 * size]  # node 0: of 10, 20, 50 and 60


def test_who_comes_back_goes_on_from_its_own_model(tmp_path: Path) -> None:
    """All others are away for good: nothing but its own training moves node 0."""
    gone = [f"{i},5,0,0" for i in (1, 2)]
    fed = federation(3, fleet=hs.fleet.ideal(trace=trace(tmp_path, *gone, "0,25,0,0", "0,47,1,1")))
    alone = federation(3, fleet=hs.fleet.ideal(trace=trace(tmp_path, *gone)))
    one, other = (played(f, FedAvg(steps=1), async_gossip(every=IN_STEP), rounds=1) for f in (fed, alone))
    assert torch.equal(models(one), models(other)) and not torch.equal(models(one)[0], fed.problem.start)
    assert torch.equal(models(one)[1], fed.problem.start)
    assert (one.history[-1]["seconds"], other.history[-1]["seconds"]) == (57.0, 30.0)


def test_who_is_late_begins_then(tmp_path: Path, times: dict[int, list[float]]) -> None:
    fed = federation(3, fleet=hs.fleet.ideal(trace=trace(tmp_path, "0,0,0,0", "0,35,1,1")))
    played(fed, IDLE, async_gossip(every=IN_STEP), rounds=4)
    assert times[0][0] == 45.0 and times[1][0] == 10.0


# ---- what is refused


def test_the_shorter_time_comes_first() -> None:
    with pytest.raises(ConfigError, match=r"async_gossip.every: \(12.0, 8.0\) is not allowed: the shorter time comes first"):
        async_gossip(every=(12.0, 8.0))


def test_graphs_that_change_by_rounds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"async_gossip.topology: .* is not allowed: it changes by rounds"):
        async_gossip(topology=random_neighbours(3))


@pytest.mark.parametrize("rule", [Scaffold(), hs.methods.FedAMD(), hs.methods.FedAdam()])
def test_rules_with_a_server_are_refused(rule: FedAvg) -> None:
    with pytest.raises(ConfigError, match=r"method: .* is not allowed with async_gossip"):
        played(federation(), rule, async_gossip())


def test_a_run_cut_by_its_seconds_has_a_last_round_that_is_evaluated() -> None:
    fed = federation(fleet=hs.fleet.devices(job=5))
    run = hs.run(fed, FedAvg(), async_gossip(), rounds=1000, seconds=2, evaluate=0)
    assert [r["seconds"] for r in run.history] == [2.0] and run.history[0]["metrics"]["accuracy"] >= 0
    longer = hs.run(fed, FedAvg(), async_gossip(), rounds=1000, seconds=40, evaluate=0)
    assert longer.history[-1]["seconds"] == 40.0 and longer.history[-1]["metrics"] and longer.history[-1]["staleness"] == 0
