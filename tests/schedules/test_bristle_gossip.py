"""Bristle's conversation: who is tried, what of it is integrated, what it costs, and that it goes on after a stop."""

from __future__ import annotations

import math
from pathlib import Path

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from small_runs import stop_after
from torch import Tensor, nn

import hanse as hs
from hanse.core.streams import Streams
from hanse.engines.estimate import estimate
from hanse.engines.simulation import Simulation
from hanse.methods import Bristle
from hanse.schedules.bristle import apportioned, bristle, filled
from hanse.topologies import Mixing, Topology, complete, consensus_distance, random_neighbours, ring

ENGINE = hs.engines.local("vmap", 20, 1, 1)
HEAD = ("0.*", "2.bias")


def federation(clients: int = 6, hidden: int = 12, **more: object) -> hs.Federation:
    more = {"partition": hs.neighbouring(each=10, test=0.5), "frozen": HEAD, "dtype": "float64", **more}
    return hs.Federation(hs.tasks.digits(hidden=hidden), clients, **more)  # type: ignore[arg-type]


def played(fed: hs.Federation, rule: Bristle, schedule: bristle, rounds: int = 3, **more: object) -> hs.Run:
    return hs.run(fed, rule, schedule, rounds=rounds, evaluate=0, engine=ENGINE, **more)  # type: ignore[arg-type]


class nobody(Topology):
    """No edges."""

    abstract = True

    def graph(self, nodes: int, streams: Streams, round: int) -> nx.Graph:
        return nx.empty_graph(nodes)


def test_quotas_sum_to_the_budget_and_the_nearer_of_equal_remainders_comes_first() -> None:
    """The rounded ones would be 4 + 5 + 2."""
    assert apportioned((0.6**2, 2 * 0.4 * 0.6, 0.4**2), 10).tolist() == [4, 5, 1]
    assert apportioned((0.6, 0.4), 25).tolist() == [15, 10]
    assert apportioned((1.0, 0.0, 0.0), 7).tolist() == [7, 0, 0]


@given(st.floats(0, 1), st.integers(1, 60))
def test_quotas_are_less_than_one_from_their_shares(a: float, k: int) -> None:
    shares = ((1 - a) ** 2, 2 * a * (1 - a), a**2)
    quotas = apportioned(shares, k)
    assert int(quotas.sum()) == k
    assert all(abs(q - k * share) < 1 + 1e-6 for q, share in zip(quotas.tolist(), shares, strict=True))


def test_what_a_group_lacks_comes_from_the_nearest_that_has_more() -> None:
    sizes = torch.tensor([[9, 9, 9], [1, 9, 9], [1, 5, 9], [9, 2, 9], [9, 9, 0], [1, 1, 1], [0, 0, 0]])
    taken = [[4, 5, 1], [1, 8, 1], [1, 5, 4], [7, 2, 1], [4, 6, 0], [1, 1, 1], [0, 0, 0]]
    assert filled(torch.tensor([4, 5, 1]), sizes).tolist() == taken


def chosen(schedule: bristle, distances: list[float], round: int = 0) -> list[int]:
    """Whom node 0 tries if it knows nodes that are so far from it; all others know nobody but node 0."""
    nodes = len(distances) + 1
    received = torch.tensor([[0.0], *([d] for d in distances)], dtype=torch.float64)
    star = Mixing.into_one(nodes - 1, 0.5)
    peers, valid = schedule.choose(torch.zeros(nodes, 1, dtype=torch.float64), received, star, Streams(0), round)
    assert not valid[1:].any()
    return peers[0][valid[0]].tolist()


def test_candidates_come_from_three_groups_by_distance() -> None:
    distances = [(7 * i) % 18 + 1.0 for i in range(18)]  # node i + 1 is the so-manieth
    groups = torch.zeros(3)
    for round in range(200):
        found = chosen(bristle(), distances, round)
        ranks = torch.tensor([distances[node - 1] for node in found])
        assert len(set(found)) == 10
        assert torch.bincount(((ranks - 1) // 6).long(), minlength=3).tolist() == [4, 5, 1]
        groups += torch.bincount((ranks.long() - 1) % 3, minlength=3)
    assert (groups / groups.sum() - 1 / 3).abs().max() < 0.03  # no place in a group is favoured


def test_the_nearest_and_others_or_anybody() -> None:
    distances = [float(20 - i) for i in range(20)]  # node 20 is the nearest
    nearest = bristle(prioritiser="nearest+random", budget=5, explore=0.2)
    anybody = bristle(prioritiser="random", budget=5)
    rest, all_of_them = torch.zeros(21), torch.zeros(21)
    for round in range(300):
        found = chosen(nearest, distances, round)
        assert set(found) >= {20, 19, 18, 17} and len(set(found)) == 5
        rest[found] += 1
        drawn = chosen(anybody, distances, round)
        assert len(set(drawn)) == 5
        all_of_them[drawn] += 1
    assert rest[1:17].min() > 5 and rest[1:17].max() < 40  # 300 / 16 each
    assert all_of_them[1:].min() > 45 and all_of_them[1:].max() < 110  # 300 / 4 each


@pytest.mark.parametrize("prioritiser", ["groups", "nearest+random", "random"])
def test_fewer_than_three_are_all_tried_and_the_budget_is_used_up(prioritiser: str) -> None:
    schedule = bristle(prioritiser=prioritiser, budget=1)
    assert sorted(chosen(schedule, [2.0, 1.0])) == [1, 2] and chosen(schedule, [3.0]) == [1] and chosen(schedule, []) == []
    assert len(chosen(schedule, [3.0, 1.0, 2.0])) == 1
    assert sorted(chosen(bristle(prioritiser=prioritiser, budget=9), [3.0, 1.0, 2.0, 5.0])) == [1, 2, 3, 4]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 14), st.integers(1, 12), st.floats(0, 1), st.integers(0, 5))
def test_candidates_are_neighbours_once_each_and_no_more_than_the_budget(nodes: int, k: int, a: float, seed: int) -> None:
    models = torch.randn(nodes, 3, generator=torch.Generator().manual_seed(seed))
    graph = Mixing.metropolis(complete().graph(nodes, Streams(seed), 0))
    peers, valid = bristle(budget=k, explore=a).choose(models, models, graph, Streams(seed), 0)
    for i in range(nodes):
        mine = peers[i][valid[i]].tolist()
        assert len(set(mine)) == len(mine) == (nodes - 1 if nodes - 1 < 3 else min(k, nodes - 1))
        assert i not in mine


def test_what_is_not_finite_is_dropped() -> None:
    own = torch.zeros(4, 2)
    received = torch.tensor([[0.0, 0], [1, math.nan], [math.inf, 0], [1, 1]])
    state = {"x": own, "familiar": torch.tensor([[1.0, 1, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])}
    graph = Mixing.metropolis(complete().graph(4, Streams(0), 0))
    nodes, message = bristle()._candidates(state, received, graph, Streams(0), 0)
    assert nodes.tolist() == [0, 1, 2, 3]
    assert message["valid"].sum(1).tolist() == [1, 2, 2, 1]
    assert message["candidates"].isfinite().all() and message["candidates"][0, 0].tolist() == [1, 1]
    assert message["common"][0, 0] == 2 and (message["common"] * message["valid"])[1].sum() == 2


def test_without_peers_it_is_local_training_of_a_linear_head_on_frozen_features() -> None:
    """Adam with L2, whose memory lasts, on all of its samples; columns of foreign classes stay at zero."""
    fed, rule = federation(1), Bristle(batch=1000, lr=0.02)
    w = played(fed, rule, bristle(), rounds=6).state["state.x"].view(10, 12)
    x, y = fed.split.train.of(0)
    fixed = fed.problem.fixed
    features = (x @ fixed["0.weight"].T + fixed["0.bias"]).relu()
    head, m, v = torch.zeros(3, 4, 12, dtype=torch.float64)
    for t in range(1, 7):
        outputs = features @ torch.cat([head, torch.zeros(6, 12, dtype=torch.float64)]).T + fixed["2.bias"]
        error = (outputs.softmax(1) - nn.functional.one_hot(y, 10)) / len(y)
        g = (error.T @ features)[:4] + 5e-3 * head
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        head = head - 0.02 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    torch.testing.assert_close(w[:4], head, rtol=0, atol=1e-9)
    assert torch.equal(w[4:], torch.zeros(6, 12, dtype=torch.float64))


def test_peers_without_common_classes_change_nothing_but_the_means() -> None:
    """Two peers, whose classes are 0 to 3 and 4 to 7: what remains of the other is that the mean of each column is taken off."""
    data = hs.neighbouring(each=10, test=0.5, classes=1)
    fed = federation(2, partition=data)
    together, alone = (
        played(fed, Bristle(), bristle(topology=graph), rounds=1).state["state.x"] for graph in (complete(), nobody())
    )
    each = alone.view(2, 10, 12)
    assert torch.equal(together, (each - each.mean(2, keepdim=True)).view(2, -1))


def test_columns_sum_to_zero_after_a_round_and_foreign_ones_come_from_others() -> None:
    fed = federation()
    w = played(fed, Bristle(lr=0.02), bristle(), rounds=20).state["state.x"].view(6, 10, 12)
    torch.testing.assert_close(w.sum(2), torch.zeros(6, 10, dtype=torch.float64), rtol=0, atol=1e-6)
    assert (w[0, 4:].abs().sum(1) > 0).any() and consensus_distance(w.flatten(1)) > 1e-6
    assert torch.equal(w[:, 9], torch.zeros(6, 12, dtype=torch.float64))  # six peers, whose last class is 8


def test_the_frozen_part_keeps_its_bits_and_a_message_is_the_columns() -> None:
    fed = federation(dtype="float32")
    before = {name: t.clone() for name, t in fed.problem.fixed.items()}
    run = played(fed, Bristle(), bristle(topology=ring()), rounds=3)
    assert all(torch.equal(fed.problem.fixed[name], t) for name, t in before.items())
    message = save({"x": torch.zeros(10 * 12)})
    size = 4 * 10 * 12 + 8 + int.from_bytes(message[:8], "little")  # safetensors: the header's length, the header, the data
    assert size == len(message)
    assert run.clients["sent"].tolist() == run.clients["received"].tolist() == [3 * 2 * size] * 6


def test_integrating_takes_the_time_of_training_and_is_no_update() -> None:
    fed = federation(4, fleet=hs.fleet.devices(job=2.0))
    run = played(fed, Bristle(), bristle(), rounds=3)
    assert run.history[-1]["seconds"] == 3 * (2 + 2) and run.history[-1]["updates"] == 3 * 4
    assert run.clients["rounds"].tolist() == [3] * 4 and run.history[-1]["loss"] > 1


def test_the_estimate_knows_the_bytes_and_the_time() -> None:
    fed, schedule = federation(4, fleet=hs.fleet.devices(job=2.0)), bristle()
    net = Simulation(fed, Bristle(), ENGINE, hs.codecs.identity(), seed=0, rounds=3, schedule=schedule)
    run = played(fed, Bristle(), schedule, rounds=3)
    expected = estimate(net, schedule)
    assert expected.up == run.history[-1]["bytes_up"] and expected.virtual == run.history[-1]["seconds"]


def test_nodes_that_are_away_keep_their_columns() -> None:
    fed = federation(8, fleet=hs.fleet.ideal(trace="bernoulli(0.5)"))
    run = played(fed, Bristle(), bristle(), rounds=1)
    moved = run.clients["rounds"] > 0
    assert 0 < int(moved.sum()) < 8
    x = run.state["state.x"]
    assert not x[~moved].any() and x[moved].abs().sum(1).min() > 0 and not run.clients["sent"][~moved].any()


def test_a_stopped_run_goes_on_identically(tmp_path: Path) -> None:
    fed, schedule = federation(fleet=hs.fleet.phones()), bristle(topology=random_neighbours(3), budget=2)
    whole = played(fed, Bristle(lr=0.02), schedule, rounds=5)

    played(fed, Bristle(lr=0.02), schedule, rounds=5, out=tmp_path, on_start=stop_after(2))
    again = hs.resume(tmp_path)
    assert again.history == whole.history
    assert all(torch.equal(again.state[name], t) for name, t in whole.state.items())


def test_batches_and_threads_do_not_matter() -> None:
    fed = federation()
    one, two = (
        hs.run(fed, Bristle(), bristle(), rounds=3, evaluate=0, engine=hs.engines.local("vmap", chunk, workers, 1)).state["state.x"]
        for chunk, workers in ((6, 1), (2, 2))
    )
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attack", [hs.attacks.label_flip(share=0.34), hs.attacks.random(share=0.34)])
def test_honest_peers_learn_among_liars(attack: hs.attacks.Attack) -> None:
    def known(w: Tensor) -> float:
        split, problem = fed.split, fed.problem
        each = [problem.evaluate(row, problem.start_buffers, split.test_x, split.test_y)["accuracy"] for row in w[honest]]
        return sum(each) / len(each)

    fed = federation(9, hidden=64, partition=hs.neighbouring(each=12, test=0.5))
    run = played(fed, Bristle(lr=0.05), bristle(), rounds=30, attack=attack)
    honest = ~run.clients["liars"]
    alone = played(fed, Bristle(lr=0.05), bristle(topology=nobody()), rounds=30)
    assert known(run.state["state.x"]) > known(alone.state["state.x"])
