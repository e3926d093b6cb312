"""Liars in a run, and rules that withstand them: what is asked of the engine, whatever the attack and the rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from small_networks import at_once, network
from small_runs import stop_after
from torch import Tensor

import hanse as hs
from hanse.attacks import Attack, Cohort
from hanse.core.errors import ConfigError
from hanse.core.messages import Reply
from hanse.engines.estimate import drive
from hanse.engines.simulation import Simulation
from hanse.methods import FedAvg, Method, Scaffold
from hanse.schedules import Schedule, fedbuff, synchronous


@pytest.fixture(scope="module")
def federation() -> hs.Federation:
    return hs.Federation(hs.tasks.digits(hidden=4), clients=8, partition=hs.dirichlet(0.5), dtype="float64")


def engine(chunk: int = 8, workers: int = 1) -> hs.engines.local:
    return hs.engines.local("stacked", chunk, workers, 1, shortcuts=False)


def go(fed: hs.Federation, rule: Method, attack: str | None = None, **more: Any) -> hs.Run:
    more = {"rounds": 2, "evaluate": 0, "engine": engine(), "schedule": synchronous(8), **more}
    return hs.run(fed, rule, attack=None if attack is None else Attack.parse(attack), **more)


def model(run: hs.Run) -> Tensor:
    return run.state["state.x"]


def deltas(fed: hs.Federation, rule: Method | None = None) -> Tensor:
    """What every client would honestly send in round 0, ``[8, P]``."""
    net = network(fed, rule or FedAvg(), path="stacked", chunk=8)
    return in_order(at_once(net.work(torch.arange(8), "train", {"x": fed.problem.start.expand(8, -1)})))


def in_order(reply: Reply) -> Tensor:
    """A row a client."""
    return reply.each["delta"][reply.clients.argsort()]


def test_without_liars_nothing_changes(federation: hs.Federation) -> None:
    assert torch.equal(model(go(federation, FedAvg(), "sign_flip(share=0)")), model(go(federation, FedAvg())))


def test_what_liars_send_is_what_arrives(federation: hs.Federation) -> None:
    run = go(federation, FedAvg(weights="uniform"), "sign_flip(share=0.25, scale=3)", rounds=1)
    lies, each = run.clients["liars"], deltas(federation)
    sent = torch.where(lies[:, None], -3 * each, each)
    assert int(lies.sum()) == 2
    torch.testing.assert_close(model(run) - federation.problem.start, sent.mean(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("attack", ["alie(share=0.4, z=1)", "ipm(share=0.4, eps=3)", "mimic(share=0.4)", "random(share=0.4)"])
@pytest.mark.parametrize("rule", [FedAvg(), Scaffold(), FedAvg(aggregate="median"), hs.methods.FedSpeed(aggregate="krum(1)")])
def test_liars_know_their_whole_cohort_however_it_is_cut_into_batches(federation: hs.Federation, rule: Method, attack: str) -> None:
    whole, cut = (model(go(federation, rule, attack, engine=engine(*how))) for how in ((8, 1), (3, 2)))
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-10)


def test_data_are_poisoned_for_liars_alone(federation: hs.Federation) -> None:
    attack = Attack.parse("label_flip(share=0.25)")
    net = network(federation, FedAvg(), path="stacked", chunk=8)
    bad = type(net)(federation, FedAvg(), engine(), net.codec, seed=0, rounds=1, attack=attack)
    assert bad.adversaries is not None
    start = {"x": federation.problem.start.expand(8, -1)}
    honest, poisoned = (in_order(at_once(n.work(torch.arange(8), "train", start))) for n in (net, bad))
    assert ((honest != poisoned).any(1) == bad.adversaries.liars).all() and bad.adversaries.liars.any()
    assert not torch.equal(bad.samples.y, federation.split.train.y) and torch.equal(net.samples.y, federation.split.train.y)


@pytest.mark.parametrize("schedule", [synchronous(4), fedbuff(buffer=3, cohort=5)])
def test_a_robust_rule_is_the_aggregator_of_the_rows(federation: hs.Federation, schedule: Schedule) -> None:
    """An aggregator that takes the weighted mean by hand comes to what the declared sums do."""
    by_rows, by_sums = (go(federation, FedAvg(aggregate=a), schedule=schedule) for a in ("clipping(1e9) | mean", "mean"))
    assert by_rows.history[-1]["loss"] == pytest.approx(by_sums.history[-1]["loss"], abs=1e-9)
    uniform = [go(federation, FedAvg(aggregate=a, weights="uniform"), schedule=schedule) for a in ("trimmed_mean(0)", "mean")]
    torch.testing.assert_close(model(uniform[0]), model(uniform[1]), rtol=0, atol=1e-12)


def test_the_median_by_hand(federation: hs.Federation) -> None:
    run = go(federation, FedAvg(aggregate="median"), rounds=1)
    each = deltas(federation).sort(0).values
    torch.testing.assert_close(model(run) - federation.problem.start, (each[3] + each[4]) / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["FedAvg", "FedProx", "FedAvgM", "FedSAM", "OPWA", "FedAU", "FedVARP", "FedSpeed"])
def test_any_rule_that_averages_takes_one(federation: hs.Federation, rule: str) -> None:
    robust, plain = (
        go(federation, Method.parse(f"{rule}(aggregate={a})"), "sign_flip(share=0.25, scale=20)", rounds=3)
        for a in ("median", "mean")
    )
    start = federation.problem.start
    assert (model(robust) - start).norm() < 0.5 * (model(plain) - start).norm()


@pytest.mark.parametrize("rule", ["FedAsync", "StaleInversion", "FirstOrder"])
def test_rules_whose_formulas_need_the_mean_say_so(rule: str) -> None:
    with pytest.raises(ConfigError, match=rf"{rule}.aggregate: .* is not allowed: this rule's formulas hold for the mean"):
        Method.parse(f"{rule}(aggregate=median)")


def test_privacy_does_not_go_with_looking_at_single_clients(federation: hs.Federation) -> None:
    with pytest.raises(ConfigError, match="aggregate: median is not allowed with privacy"):
        go(federation, FedAvg(aggregate="median", weights="uniform"), privacy=[hs.privacy.secure()])


def test_too_few_rows_are_refused_with_what_is_needed(federation: hs.Federation) -> None:
    with pytest.raises(ConfigError, match="krum"):
        go(federation, FedAvg(aggregate="krum(3)"))


def test_lies_are_encoded_like_everything_else(federation: hs.Federation) -> None:
    codec = hs.codecs.Codec.parse("topk(0.1)")
    honest, lied = (go(federation, FedAvg(), attack, codec=codec) for attack in (None, "scaled(share=0.5, scale=3)"))
    assert lied.history[-1]["bytes_up"] == honest.history[-1]["bytes_up"]
    assert not torch.equal(model(lied), model(honest))


def test_a_run_with_liars_goes_on_as_it_would_have(federation: hs.Federation, tmp_path: Path) -> None:
    rule, attack = FedAvg(aggregate="nnm(2) | trimmed_mean(2)"), "random(share=0.25)"
    whole = go(federation, rule, attack, rounds=4)

    go(federation, rule, attack, rounds=4, out=tmp_path, on_start=stop_after(2))
    again = hs.resume(tmp_path)
    assert again.settings["attack"] == Attack.parse(attack).full()
    assert again.history == whole.history and torch.equal(model(again), model(whole))


def test_the_success_of_a_back_door_is_measured(federation: hs.Federation) -> None:
    attack = "backdoor(share=0.5, target=3)"
    run = go(federation, FedAvg(lr=0.5), attack, rounds=20)
    part, split, net = Attack.parse(attack), federation.split, federation.problem
    aim = part.probe(split.test_x, split.test_y)
    assert aim is not None
    expected = net.evaluate(model(run), net.start_buffers, *aim)["accuracy"]
    assert run.history[-1]["metrics"]["attack_accuracy"] == pytest.approx(expected) and expected > 0.5


CODECS = ["topk(0.2)", "layers | uniform(8)", "sign", "feedback(topk(0.1) | uniform(8))", "huffman", "zstd"]


@pytest.mark.parametrize("schedule", [synchronous(8), fedbuff(buffer=8, cohort=8)])
@pytest.mark.parametrize("codec", CODECS)
def test_a_message_that_cannot_be_read_is_refused_and_the_round_goes_on(
    federation: hs.Federation, codec: str, schedule: Schedule, caplog: pytest.LogCaptureFixture
) -> None:
    """The model moves as if those clients had stayed away, but for the bytes, which have travelled."""
    part = hs.codecs.Codec.parse(codec)
    run, honest = (go(federation, FedAvg(), a, rounds=1, codec=part, schedule=schedule) for a in ("damaged(share=0.25)", None))
    liars = run.clients["liars"].nonzero()[:, 0].tolist()
    assert run.history[0]["cohort"] and not set(run.history[0]["cohort"]) & set(liars)
    assert run.history[0]["bytes_up"] == honest.history[0]["bytes_up"]
    assert sorted(r.args for r in caplog.records) == [(0, client) for client in liars]
    torch.testing.assert_close(model(run), without(federation, liars, part), rtol=0, atol=1e-12)


def without(fed: hs.Federation, liars: list[int], codec: hs.codecs.Codec) -> Tensor:
    """The model after a round of the others."""
    ids = torch.tensor([i for i in range(8) if i not in liars])
    net = network(fed, FedAvg(), codec, path="stacked", chunk=8, shortcuts=False)
    net.begin(net.method.init(fed.problem))
    return net.method.step(net.state, at_once(net.ask(ids, "train", {"x": fed.problem.start})), 0)["x"]


def test_a_vote_that_is_no_ranking_is_not_counted(federation: hs.Federation) -> None:
    run = go(federation, hs.methods.FRL(), "damaged(share=0.25)", rounds=3)
    liars = set(run.clients["liars"].nonzero()[:, 0].tolist())
    assert [set(r["cohort"]) for r in run.history] == [set(range(8)) - liars] * 3


class nothing_but_nan(Attack):
    """What is left of a mean after one of these."""

    abstract: ClassVar[bool] = True

    def forged(self, cohort: Cohort) -> Tensor:
        return torch.full_like(cohort.own, torch.nan)


@pytest.mark.parametrize("aggregate", ["mean", "median"])
@pytest.mark.parametrize("schedule", [synchronous(8), fedbuff(buffer=4, cohort=8)])
def test_what_is_not_finite_is_refused_too(federation: hs.Federation, schedule: Schedule, aggregate: str) -> None:
    rule = FedAvg(aggregate=aggregate)
    net = Simulation(
        federation, rule, engine(), hs.codecs.identity(), seed=0, rounds=3, attack=nothing_but_nan(share=0.25), schedule=schedule
    )
    drive(schedule.run(net, rule))
    assert net.adversaries is not None and net.round == 3
    assert torch.isfinite(net.state["x"]).all() and not net.taken[net.adversaries.liars].any() and net.updates > 0


def test_a_round_of_liars_alone_moves_nothing(federation: hs.Federation) -> None:
    codec = hs.codecs.Codec.parse("topk(0.5)")
    run = go(federation, FedAvg(), "damaged(share=0.9)", rounds=30, codec=codec, schedule=synchronous(1))
    honest = int((~run.clients["liars"]).nonzero())
    assert {tuple(r["cohort"]) for r in run.history} == {(), (honest,)} and run.history[-1]["updates"] == run.clients["rounds"][
        honest
    ]


def test_refusals_survive_a_stop(tmp_path: Path) -> None:
    attack = "damaged(share=0.4)"
    more: dict[str, Any] = {"codec": hs.codecs.Codec.parse("topk(0.2)"), "schedule": fedbuff(buffer=3, cohort=6), "rounds": 6}
    fed = hs.Federation(hs.tasks.digits(hidden=4), clients=8, fleet=hs.fleet.phones(), dtype="float64")
    whole = go(fed, FedAvg(), attack, **more)

    go(fed, FedAvg(), attack, out=tmp_path, on_start=stop_after(2), **more)
    again = hs.resume(tmp_path)
    assert again.history == whole.history and torch.equal(model(again), model(whole))


def test_nobody_forges_what_it_does_not_send(federation: hs.Federation) -> None:
    """In rounds of miners alone FedAMD's v has no senders, and stays as it is."""
    states: list[Tensor] = []

    def follow(net: Simulation) -> None:
        commit = net.on_commit
        net.on_commit = lambda n: (states.append(n.state["v"]), commit(n))  # type: ignore[assignment]

    go(federation, hs.methods.FedAMD(period=3), "random(share=0.5)", rounds=3, on_start=follow)
    assert torch.equal(states[1], states[0]) and torch.equal(states[2], states[0])


def test_who_is_refused_counts_as_zeros_under_differential_privacy(federation: hs.Federation) -> None:
    noise = hs.privacy.differential(clip=0.5, noise=1e-6, delta=1e-2)
    rule = FedAvg(weights="uniform")
    net = Simulation(
        federation,
        rule,
        engine(),
        hs.codecs.identity(),
        seed=0,
        rounds=2,
        attack=nothing_but_nan(share=0.25),
        schedule=synchronous(8),
        privacy=[noise],
    )
    drive(synchronous(8).run(net, rule))
    assert net.round == 2 and torch.isfinite(net.state["x"]).all()
    assert not torch.equal(net.state["x"], federation.problem.start)
