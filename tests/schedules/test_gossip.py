"""Gossip: rounds of training and averaging with neighbours, without a server."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import stop_after
from torch import Tensor

import hanse as hs
from hanse.core.errors import ConfigError
from hanse.core.wire import wire_size
from hanse.methods import FedAvg, FedSAM, Scaffold
from hanse.schedules import gossip, synchronous
from hanse.topologies import Mixing, Topology, complete, consensus_distance, random_neighbours, ring

ENGINE = hs.engines.local("stacked", 8, 1, 1, shortcuts=False)


def federation(clients: int = 8, **more: object) -> hs.Federation:
    more = {"partition": hs.dirichlet(0.5), "dtype": "float64", **more}
    return hs.Federation(hs.tasks.digits(hidden=4), clients=clients, **more)  # type: ignore[arg-type]


def played(fed: hs.Federation, rule: FedAvg, schedule: gossip, rounds: int = 2, **more: object) -> hs.Run:
    return hs.run(fed, rule, schedule, rounds=rounds, evaluate=0, engine=ENGINE, **more)  # type: ignore[arg-type]


def models(run: hs.Run) -> Tensor:
    return run.state["state.x"]


def mean_model(run: hs.Run) -> Tensor:
    return torch.cat([t.flatten() for t in run.weights.values()])


def test_rho_0_is_d_fed_avg_bit_for_bit() -> None:
    fed = federation()
    assert torch.equal(models(played(fed, FedSAM(rho=0), gossip())), models(played(fed, FedAvg(), gossip())))
    assert not torch.equal(models(played(fed, FedSAM(), gossip())), models(played(fed, FedAvg(), gossip())))


def test_one_step_and_one_exchange_is_d_psgd() -> None:
    """``X <- W (X - lr grad(X))`` with the batches that the plan deals out."""
    fed, rule = federation(), FedAvg(steps=1, batch=1000, shuffle=False, lr=0.3)
    start = fed.problem.start.expand(8, -1)
    gradients = torch.stack([gradient(fed, start[i], i) for i in range(8)])
    w = Mixing.metropolis(ring().graph(8, fed.streams, 0)).matrix()
    torch.testing.assert_close(models(played(fed, rule, gossip(), rounds=1)), w @ (start - 0.3 * gradients), rtol=0, atol=1e-12)


def gradient(fed: hs.Federation, w: Tensor, client: int) -> Tensor:
    x, y = fed.split.train.of(client)
    w = w.clone().requires_grad_()
    fed.problem.loss(fed.problem.output(w, fed.problem.start_buffers, x), y).mean().backward()
    assert w.grad is not None
    return w.grad


def test_among_neighbours_of_everybody_all_are_equal_after_an_exchange_and_fed_avg() -> None:
    fed = federation()
    run = played(fed, FedAvg(weights="uniform"), gossip(topology=complete()))
    server = hs.run(fed, FedAvg(weights="uniform"), synchronous(cohort=8), rounds=2, evaluate=0, engine=ENGINE)
    assert consensus_distance(models(run)) < 1e-20
    torch.testing.assert_close(mean_model(run), mean_model(server), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mixes", [1, 3])
def test_exchanges_shrink_the_distance_as_lambda_says_and_keep_the_mean(mixes: int) -> None:
    fed = federation(16)
    run = played(fed, FedAvg(lr=1e-12), gossip(start="own", mixes=mixes), rounds=1)
    start = torch.stack([fed.start(i) for i in range(16)])
    mixing = Mixing.metropolis(ring().graph(16, fed.streams, 0))
    assert mixing.second == pytest.approx((1 + 2 * math.cos(2 * math.pi / 16)) / 3)
    assert consensus_distance(models(run)) <= mixing.second ** (2 * mixes) * consensus_distance(start) + 1e-9
    torch.testing.assert_close(models(run).mean(0), start.mean(0), rtol=0, atol=1e-9)
    assert run.notes["spectral gap"].startswith(f"{mixing.gap:.4g},")


@pytest.mark.parametrize("mixes", [1, 2])
def test_bytes_are_models_to_every_neighbour(mixes: int) -> None:
    fed = federation()
    size = wire_size({"x": fed.problem.start})
    run = played(fed, FedSAM(), gossip(topology=ring(4), mixes=mixes), rounds=3)
    assert run.clients["sent"].tolist() == run.clients["received"].tolist() == [3 * mixes * 4 * size] * 8
    assert run.history[-1]["bytes_up"] == 8 * 3 * mixes * 4 * size and run.history[-1]["bytes_down"] == 0


def test_a_codec_writes_the_models() -> None:
    fed = federation()
    run = played(fed, FedAvg(), gossip(), codec=hs.codecs.Codec.parse("uniform(8)"))
    plain = played(fed, FedAvg(), gossip())
    assert run.clients["sent"][0] < plain.clients["sent"][0] / 4
    assert 0 < (models(run) - models(plain)).abs().max() < 0.05


@pytest.mark.parametrize("codec", ["topk(0.1)", "feedback(sign)"])
def test_what_leaves_entries_out_is_refused(codec: str) -> None:
    with pytest.raises(ConfigError, match=r"codec: .* is not allowed between peers"):
        played(federation(), FedAvg(), gossip(), codec=hs.codecs.Codec.parse(codec))


@pytest.mark.parametrize("rule", [Scaffold(), hs.methods.FedAMD(), hs.methods.MIFA()])
def test_rules_that_need_a_server_are_refused(rule: FedAvg) -> None:
    with pytest.raises(ConfigError, match=r"method: .* is not allowed with gossip"):
        played(federation(), rule, gossip())


def test_momentum_and_adaptive_steps_are_every_nodes_own() -> None:
    """A server optimiser becomes the node's: with momentum 0 it is plain, else not."""
    fed = federation()
    plain = models(played(fed, FedAvg(), gossip()))
    assert torch.equal(models(played(fed, FedAvg(server=hs.methods.base.sgd(momentum=0)), gossip())), plain)
    run = played(fed, hs.methods.FedAvgM(), gossip())
    assert run.state["state.server.momentum"].shape == plain.shape and not torch.equal(models(run), plain)


def test_a_run_that_is_resumed_comes_to_the_same(tmp_path: Path) -> None:
    fed, schedule = federation(fleet=hs.fleet.phones()), gossip(topology=random_neighbours(3), mixes=2)
    whole = played(fed, FedSAM(lr=0.3), schedule, rounds=4)

    hs.run(fed, FedSAM(lr=0.3), schedule, rounds=4, evaluate=0, engine=ENGINE, out=tmp_path, on_start=stop_after(2))
    again = hs.resume(tmp_path)
    assert again.history == whole.history and torch.equal(models(again), models(whole))
    assert torch.equal(again.clients["sent"], whole.clients["sent"])


class everybody_knows_everybody(Topology):
    """The complete graph, and in odd rounds nobody."""

    varying = True  # type: ignore[misc]

    def graph(self, nodes: int, streams: hs.core.streams.Streams, round: int) -> object:  # type: ignore[name-defined, override]
        import networkx as nx

        return nx.empty_graph(nodes) if round % 2 else nx.complete_graph(nodes)


def test_a_graph_may_differ_by_round_and_isolated_nodes_keep_their_models() -> None:
    fed = federation()
    first, second = (models(played(fed, FedAvg(), gossip(topology=everybody_knows_everybody()), rounds=n)) for n in (1, 2))
    assert consensus_distance(first) < 1e-20 < 1e-6 < consensus_distance(second)


def test_nodes_that_are_away_keep_their_models_and_the_mean_of_the_others_stays() -> None:
    fed = federation(fleet=hs.fleet.ideal(trace="bernoulli(0.5)"))
    run = played(fed, FedAvg(lr=0.2), gossip(start="own"), rounds=1)
    start = torch.stack([fed.start(i) for i in range(8)])
    moved = run.clients["rounds"] > 0
    assert 0 < int(moved.sum()) < 8
    assert torch.equal(models(run)[~moved], start[~moved]) and not torch.equal(models(run)[moved], start[moved])
    assert (run.clients["sent"][~moved] == 0).all()


def test_time_is_the_slowest_nodes_work_and_the_slowest_message() -> None:
    fed = federation(4, fleet=hs.fleet.devices(job=2.0, up=1.0, down=4.0, latency=0.1))
    size = wire_size({"x": fed.problem.start})
    run = played(fed, FedAvg(), gossip(mixes=2), rounds=1)
    exchange = 2 * size * 8 / 1e6 + 0.1 + 2 * size * 8 / 4e6 + 0.1
    assert run.history[-1]["seconds"] == pytest.approx(2.0 + 2 * exchange, abs=1e-6)


def test_who_takes_too_long_keeps_its_model() -> None:
    fed = federation(4, fleet=hs.fleet.devices(job="listed((1.0, 1.0, 9.0, 1.0))"))
    run = played(fed, FedAvg(), gossip(patience=2.0), rounds=2)
    assert run.clients["rounds"].tolist() == [2, 2, 0, 2] and run.history[-1]["seconds"] == 4.0
    assert torch.equal(models(run)[2], fed.problem.start)


def test_a_message_that_is_lost_weighs_nothing() -> None:
    fed = federation(fleet=hs.fleet.devices(loss=0.5))
    lost = played(fed, FedAvg(lr=1e-12), gossip(start="own"), rounds=1)
    start = torch.stack([fed.start(i) for i in range(8)])
    w = torch.linalg.lstsq(start.T, models(lost).T).solution.T  # the weights that were used
    torch.testing.assert_close(w.sum(1), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-8)
    used = (w.abs() > 1e-6).sum() - 8
    assert 0 < used < 16


@pytest.mark.parametrize(("schedule", "weights"), [(gossip(own=0.5), "leaning"), (gossip(weights="samples"), "proportional")])
def test_other_weights(schedule: gossip, weights: str) -> None:
    fed = federation()
    graph, counts = ring().graph(8, fed.streams, 0), fed.split.train.counts()
    mixing = Mixing.leaning(graph, 0.5) if weights == "leaning" else Mixing.proportional(graph, counts)
    start = torch.stack([fed.start(i) for i in range(8)])
    run = played(fed, FedAvg(lr=1e-12), schedule.model_copy(update={"start": "own"}), rounds=1)
    torch.testing.assert_close(models(run), mixing.matrix() @ start, rtol=0, atol=1e-9)


def test_averaging_first() -> None:
    fed = federation()
    run = played(fed, FedAvg(lr=1e-12), gossip(order="mix", start="own"), rounds=1)
    start = torch.stack([fed.start(i) for i in range(8)])
    w = Mixing.metropolis(ring().graph(8, fed.streams, 0)).matrix()
    torch.testing.assert_close(models(run), w @ start, rtol=0, atol=1e-9)


def test_two_weightings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"gossip.own: 0.5 is not allowed with weights='samples'"):
        gossip(own=0.5, weights="samples")


def test_batch_norm_statistics_cannot_be_averaged() -> None:
    fed = hs.Federation(hs.tasks.digits(hidden=4), clients=4)
    fed.problem.shares_buffers = True
    with pytest.raises(ConfigError, match="buffers: 'average' is not allowed with gossip"):
        played(fed, FedAvg(), gossip())


def test_what_is_evaluated() -> None:
    """The mean of the models on all samples, and every node's own on all samples, with their distance."""
    fed = federation()
    run = hs.run(fed, FedAvg(lr=0.3), gossip(), rounds=5, evaluate=5, engine=ENGINE)
    found, x = run.history[-1]["metrics"], models(run)
    split, problem = fed.split, fed.problem
    each = torch.tensor([problem.evaluate(w, problem.start_buffers, split.test_x, split.test_y)["accuracy"] for w in x])
    assert found["node_accuracy"] == pytest.approx(float(each.double().mean()))
    assert found["node_accuracy_worst10"] == pytest.approx(float(each.min()))
    assert found["consensus"] == pytest.approx(consensus_distance(x))
    whole = problem.evaluate(x.mean(0), problem.start_buffers, split.test_x, split.test_y)["accuracy"]
    assert found["accuracy"] == pytest.approx(whole)
    torch.testing.assert_close(mean_model(run), x.mean(0))


def test_liars_lie_to_their_neighbours() -> None:
    """A ring in which node 0's neighbours hear the opposite of what it has learned."""
    fed = federation()
    attack = hs.attacks.sign_flip(share=0.125)
    run = played(fed, FedAvg(), gossip(), rounds=1, attack=attack)
    honest = played(fed, FedAvg(), gossip(), rounds=1)
    liar = int(run.clients["liars"].nonzero())
    start, w = fed.problem.start, 1 / 3
    trained = models(played(fed, FedAvg(), gossip(topology=everybody_knows_nobody()), rounds=1))
    expected = models(honest).clone()
    for i in ((liar - 1) % 8, (liar + 1) % 8):
        expected[i] -= w * 2 * (trained[liar] - start)
    torch.testing.assert_close(models(run), expected, rtol=0, atol=1e-12)


class everybody_knows_nobody(Topology):
    """No edges."""

    def graph(self, nodes: int, streams: hs.core.streams.Streams, round: int) -> object:  # type: ignore[name-defined, override]
        import networkx as nx

        return nx.empty_graph(nodes)


@pytest.mark.parametrize(
    ("rule", "more", "why"),
    [
        ("FedSpeed", {}, "it asks for the sums of all replies"),
        ("StaleInversion", {}, "it needs a server"),
        ("FirstOrder", {}, "it needs a server"),
        ("FedAvg(aggregate=median)", {}, r"aggregate: median is not allowed between peers: use merge=robust"),
        ("FedAvg", {"down": "int8"}, "down: int8 is not allowed between peers"),
        ("FedAvg", {"attack": "damaged"}, "attack: damaged is not allowed between peers"),
        ("FedAvg", {"attack": "random(share=0.9)", "clients": 3}, "none of them would be honest"),
    ],
)
def test_what_means_a_server_or_nobody_is_refused(rule: str, more: dict[str, Any], why: str) -> None:
    fed = federation(more.pop("clients", 8))
    parts = {"down": hs.codecs.Codec, "attack": hs.attacks.Attack}
    with pytest.raises(ConfigError, match=why):
        played(fed, hs.methods.Method.parse(rule), gossip(), **{n: parts[n].parse(v) for n, v in more.items()})  # type: ignore[arg-type]


def test_who_averages_first_has_nothing_to_lie_about_yet() -> None:
    with pytest.raises(ConfigError, match=r"attack: .* is not allowed here"):
        played(federation(), FedAvg(), gossip(order="mix"), attack=hs.attacks.sign_flip())


def test_models_that_are_not_finite_weigh_nothing() -> None:
    fed = federation(dtype="float32")
    run = played(fed, FedAvg(), gossip(topology=complete()), attack=hs.attacks.scaled(share=0.25, scale=1e39), rounds=3)
    assert torch.isfinite(models(run)).all()


def test_time_goes_on_when_everybody_breaks_off() -> None:
    fed = federation(4, fleet=hs.fleet.devices(job=100.0, trace="crashes(100, 100)"))
    run = played(fed, FedAvg(), gossip(), rounds=60)
    assert run.history[-1]["seconds"] > 1000 and run.history[-1]["updates"] > 10
