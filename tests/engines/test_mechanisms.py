"""Privacy in a run: nothing changes where it should not, sums are exact, noise and its cost are what was asked for."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import ask, network, normed, rounds, same
from torch import Tensor

import hanse as hs
from hanse.core.errors import HanseError, PrivacyError
from hanse.core.messages import Reply, Tensors
from hanse.engines.mechanisms import INTEGERS
from hanse.engines.simulation import Simulation
from hanse.privacy import differential, secure
from hanse.privacy.protocol import aggregate
from hanse.privacy.secure import Fixed
from hanse.track.folder import Folder
from hanse.track.run import Record, Run

ENGINE = hs.engines.local("stacked", 4, 1, 1, shortcuts=False)
UNIFORM = hs.methods.FedAvg(weights="uniform", epochs=2)
BERNOULLI = hs.schedules.synchronous(3, draw="bernoulli")
LOSSY = hs.fleet.devices(job="exponential(1.0)", loss=0.3)


def go(
    federation: hs.Federation,
    *privacy: hs.privacy.Privacy,
    rule: hs.methods.Method = UNIFORM,
    schedule: hs.schedules.Schedule | None = None,
    **options: Any,
) -> Run:
    schedule = schedule or hs.schedules.synchronous(5)
    return hs.run(federation, rule, schedule, privacy=privacy, **{"rounds": 3, "engine": ENGINE, "evaluate": 0, **options})


def model(run: Run) -> Tensor:
    return torch.cat([t.flatten() for t in run.weights.values()])


def net_of(federation: hs.Federation, *privacy: hs.privacy.Privacy, rule: hs.methods.Method = UNIFORM, **engine: Any) -> Any:
    how = {"path": "loop", "chunk": 4, "workers": 1, "threads": 1, **engine}
    return Simulation(
        federation,
        rule,
        hs.engines.local(**how),
        hs.codecs.identity(),
        seed=0,
        rounds=100,
        privacy=privacy,
        schedule=hs.schedules.synchronous(12),
    )


# ---- what changes nothing


@pytest.mark.parametrize(
    "rule", [UNIFORM, hs.methods.Scaffold(), hs.methods.FedSpeed(), hs.methods.FedAdam(weights="uniform")], ids=str
)
def test_a_bound_that_nobody_reaches_and_no_noise_change_no_bit(ragged: hs.Federation, rule: hs.methods.Method) -> None:
    plain, clipped = go(ragged, rule=rule), go(ragged, differential(clip=1e9, noise=0), rule=rule)
    assert same(clipped.weights, plain.weights)
    assert [{**r, "epsilon": 0} for r in plain.history] == [{**r, "epsilon": 0} for r in clipped.history]
    assert [r["epsilon"] for r in clipped.history] == [math.inf] * 3


def test_without_privacy_nothing_is_kept_or_said_of_it(ragged: hs.Federation) -> None:
    run = go(ragged)
    assert "privacy" not in run.settings and not any(n.startswith("privacy") for n in run.state)
    assert not any("epsilon" in record for record in run.history)


# ---- secure


@pytest.mark.parametrize(("bits", "unit"), [(32, 2.0**-24), (64, 2.0**-50)])
@pytest.mark.parametrize("rule", [hs.methods.FedAvg(epochs=2), hs.methods.Scaffold()], ids=str)
def test_secure_sums_are_the_plain_ones_to_their_resolution(
    ragged: hs.Federation, rule: hs.methods.Method, bits: int, unit: float
) -> None:
    """Twelve clients, each rounded to half a unit of the heaviest weight; float64 adds its own last bits."""
    message = rule.message(rule.init(ragged.problem))
    plain = ask(network(ragged, rule), torch.arange(12), message)
    private = ask(net_of(ragged, secure(bits=bits), rule=rule), torch.arange(12), message)
    heaviest = float(plain.weight.max())
    assert plain.sums.keys() == private.sums.keys()
    for name, values in plain.sums.items():
        limit = 12 * heaviest * unit / 2 + 1e-12
        torch.testing.assert_close(private.sums[name], values, rtol=0, atol=limit)
        assert bits == 64 or bool((private.sums[name] != values).any())
        torch.testing.assert_close(private.mean(name), plain.mean(name), rtol=0, atol=1e-6 if bits == 32 else 1e-12)


def test_no_reply_shows_a_client_s_own_weight_or_loss(ragged: hs.Federation) -> None:
    plain = ask(network(ragged, hs.methods.FedAvg()), torch.arange(12))
    private = ask(net_of(ragged, secure(), rule=hs.methods.FedAvg()), torch.arange(12))
    assert len(plain.weight.unique()) > 1 and len(plain.loss.unique()) > 1
    assert len(private.weight.unique()) == 1 and len(private.loss.unique()) == 1
    assert float(private.weight.sum()) == pytest.approx(float(plain.weight.sum()), rel=1e-6)
    mean = float(plain.loss @ plain.weight / plain.weight.sum())
    assert float(private.loss[0]) == pytest.approx(mean, rel=1e-5)


def test_a_loss_beyond_the_range_of_integers_is_only_reported_smaller(even: hs.Federation) -> None:
    """Training itself is not stopped: here no loss fits, and all other values do."""
    rule = hs.methods.FedAvg(lr=0.001, steps=1)
    assert float(ask(net_of(even, secure(clip=0.5), rule=rule), torch.arange(12)).loss[0]) == pytest.approx(0.5, abs=1e-6)
    assert float(ask(network(even, rule), torch.arange(12)).loss.min()) > 0.5


@pytest.mark.parametrize("way", [{"chunk": 1}, {"chunk": 12}, {"chunk": 5, "workers": 2}, {"chunk": 2, "workers": 3}], ids=str)
def test_integers_add_to_the_same_bits_however_they_are_grouped(ragged: hs.Federation, way: dict[str, int]) -> None:
    """One client at a time, so that only the order of the additions differs, which in floats changes the last bits."""
    rule = hs.methods.Scaffold()
    assert same(
        rounds(net_of(ragged, secure(), rule=rule, **way), 2, 12), rounds(net_of(ragged, secure(), rule=rule, chunk=3), 2, 12)
    )
    torch.set_num_threads(1)


class Seen:
    """What clients encode and the integers that the server adds them up to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.vectors: list[Any] = []
        encode = Fixed.encode

        def listening(fixed: Fixed, *args: Any) -> Any:
            self.vectors.append(encode(fixed, *args))
            return self.vectors[-1]

        monkeypatch.setattr(Fixed, "encode", listening)


@pytest.mark.parametrize("parts", [(secure(),), (secure(threshold=0.6, bits=64, neighbours=8), differential(clip=0.1))], ids=str)
def test_the_real_protocol_gives_the_same_integers(
    ragged: hs.Federation, parts: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys, shares and masks, among twelve clients of whom two leave before they send: the engine's sum, bit for bit."""
    net, seen = net_of(ragged, *parts, chunk=12), Seen(monkeypatch)
    totals: list[Tensor] = []
    reply = net.privacy.reply
    net.privacy.reply = lambda found, round: (totals.append(found.sums[INTEGERS].clone()), reply(found, round))[1]
    seen.vectors.clear()
    ask(net, torch.arange(12))
    (vectors,) = seen.vectors
    mask = parts[0]
    total, included = aggregate(mask, dict(enumerate(vectors)))
    assert included == set(range(12))
    assert np.array_equal(total, totals[0].numpy().astype(mask.dtype))
    some, who = aggregate(mask, dict(enumerate(vectors)), gone=((), (), (3, 7), ()))
    stayed = [u for u in range(12) if u not in (3, 7)]
    assert who == set(stayed) and np.array_equal(some, vectors[stayed].astype("int64").sum(0).astype(mask.dtype))


def test_bytes_are_those_of_the_protocol(even: hs.Federation) -> None:
    """Masked integers instead of the message, and keys and shares beside it; a message says the sum of P + 2 numbers."""
    part, size = secure(), even.problem.shared
    plain, private = go(even), go(even, part)
    down, up = part.traffic(5, size + 2)
    assert private.history[-1]["bytes_up"] == 3 * 5 * up
    assert private.history[-1]["bytes_down"] == plain.history[-1]["bytes_down"] + 3 * 5 * down
    assert up > 4 * size  # of 32 bits each


def test_an_estimate_knows_them(even: hs.Federation) -> None:
    from hanse.engines.estimate import estimate

    for parts in ((secure(),), (differential(),), (secure(), differential(adaptive=True, bit_noise=2.0))):
        run, net = go(even, *parts, schedule=hs.schedules.synchronous(12)), net_of(even, *parts)
        found = estimate(net, hs.schedules.synchronous(12))
        assert (found.down / 100, found.up / 100) == (run.history[-1]["bytes_down"] / 3, run.history[-1]["bytes_up"] / 3)
        assert net.privacy.bound == (1.0 if net.privacy.noise else 0.0)


def lossy() -> hs.Federation:
    return hs.Federation(hs.tasks.digits(hidden=8), clients=12, partition=hs.dirichlet(0.3), fleet=LOSSY, dtype="float64")


def test_who_does_not_reply_has_dropped_out() -> None:
    federation, rule = lossy(), hs.methods.FedAvg()
    options: dict[str, Any] = {"rule": rule, "schedule": hs.schedules.synchronous(8), "rounds": 4}
    plain, private = go(federation, **options), go(federation, secure(threshold=0.51, bits=64), **options)
    assert any(len(r["cohort"]) < 8 for r in plain.history)
    assert [r["cohort"] for r in plain.history] == [r["cohort"] for r in private.history]
    torch.testing.assert_close(model(private), model(plain), rtol=0, atol=1e-10)


def test_too_few_are_an_error_and_the_last_good_round_is_saved(tmp_path: Path) -> None:
    """The checkpoint is that of a run that ended before; what clients keep was left alone; going on fails in the same way."""
    federation, rule, part = lossy(), hs.methods.Scaffold(), secure(threshold=0.6)
    options: dict[str, Any] = {"rule": rule, "schedule": hs.schedules.synchronous(8)}
    with pytest.raises(
        PrivacyError, match=r"only \d of 8 clients sent masked values, needed are 5; nothing was revealed"
    ) as caught:
        go(federation, part, rounds=20, out=tmp_path, **options)
    run, saved = Folder(tmp_path).read(), Folder(tmp_path).load()
    assert saved is not None and int(saved["counters"][0]) == len(run.history) > 0
    shorter = go(federation, part, rounds=len(run.history), **options)
    assert same({n: t for n, t in saved.items() if not n.startswith("weights.")}, shorter.state)
    with pytest.raises(PrivacyError) as again:
        hs.resume(tmp_path, federation)
    assert str(again.value) == str(caught.value)


SOME = {"over": "synchronous(cohort=4, over=1.0)", "deadline": "synchronous(cohort=6, deadline=1.5)"}


@pytest.mark.parametrize("some", SOME)
def test_who_is_too_late_has_dropped_out(some: str) -> None:
    federation = hs.Federation(
        hs.tasks.digits(hidden=8), clients=12, fleet=hs.fleet.devices(job="exponential(1.0)"), dtype="float64"
    )
    schedule = hs.schedules.Schedule.parse(SOME[some])
    options: dict[str, Any] = {"rule": hs.methods.Scaffold(), "schedule": schedule, "rounds": 3}
    plain = go(federation, **options)
    asked = {"over": 8, "deadline": 6}[some]
    assert all(len(r["cohort"]) < asked for r in plain.history)
    with pytest.raises(PrivacyError, match=rf"only \d of {asked} clients"):
        go(federation, secure(threshold=1), **options)
    part = secure.model_construct(**{**dict(secure(bits=64)), "threshold": 0.2})  # any two, so that the sums can be compared
    torch.testing.assert_close(model(go(federation, part, **options)), model(plain), rtol=0, atol=1e-10)


def test_a_round_that_is_thrown_away_is_not_unmasked(ragged: hs.Federation) -> None:
    """``least`` gives up before the threshold would have to: the model stays, and the run goes on."""
    federation = lossy()
    schedule = hs.schedules.synchronous(8, least=7)
    run = go(federation, secure(threshold=0.8), schedule=schedule, rounds=6)
    assert 0 < sum(bool(r["cohort"]) for r in run.history) < 6


def test_averaged_statistics_are_sums_as_well() -> None:
    federation = hs.Federation(normed(hidden=8), clients=6, dtype="float64")
    options: dict[str, Any] = {"rule": hs.methods.FedAvg(), "engine": hs.engines.local("loop", 3, 1, 1)}
    plain, private = go(federation, **options), go(federation, secure(bits=64, clip=64.0), **options)
    assert private.weights["1.running_var"].std() > 0
    torch.testing.assert_close(model(private), model(plain), rtol=0, atol=1e-9)
    with pytest.raises(PrivacyError, match=r"secure.clip: buffers has a value of magnitude .*, at most 0.05"):
        go(federation, secure(clip=0.05), **options)


# ---- differential


def last_step(federation: hs.Federation, *parts: Any, **options: Any) -> Tensor:
    return model(go(federation, *parts, rounds=1, **options))


@pytest.mark.parametrize("hidden", [(), (secure(bits=64),)], ids=["in the open", "masked"])
def test_the_model_gets_the_noise_that_was_asked_for(even: hs.Federation, hidden: tuple[Any, ...]) -> None:
    """On the mean its deviation is z S / m; clipping to 0.3 is what the noise hides."""
    quiet = last_step(even, differential(clip=0.3, noise=0), *hidden)
    loud = last_step(even, differential(clip=0.3, noise=2.0), *hidden)
    noise = (loud - quiet) / (2.0 * 0.3 / 5)
    n = len(noise)
    assert abs(float(noise.mean())) < 4 / math.sqrt(n) and abs(float(noise.std()) - 1) < 4 / math.sqrt(2 * n)
    assert torch.equal(last_step(even, differential(clip=0.3, noise=2.0), *hidden), loud)


def test_nobody_moves_the_model_further_than_the_bound(even: hs.Federation) -> None:
    """Five clients whose changes are far longer than the bound, averaged by five."""
    start = torch.cat([t.flatten() for t in even.problem.layout.views(even.problem.start).values()])
    free, held = (float((last_step(even, *p) - start).norm()) for p in ((), (differential(clip=0.01, noise=0),)))
    assert 0.005 < held <= 0.01 < 0.1 < free


def test_both_are_the_noise_upon_the_secure_sum_of_what_was_clipped(even: hs.Federation) -> None:
    noise = differential(clip=0.3, noise=1.0)
    one, both = go(even, noise), go(even, secure(bits=64), noise)
    torch.testing.assert_close(model(both), model(one), rtol=0, atol=1e-10)
    assert [r["epsilon"] for r in one.history] == [r["epsilon"] for r in both.history]
    assert both.settings["privacy"] == f"{secure(bits=64).full()}, {noise.full()}"


@pytest.mark.parametrize("draw", ["fixed", "bernoulli"])
def test_every_round_says_what_all_have_cost(even: hs.Federation, draw: Any) -> None:
    part = differential(noise=1.5, delta=1e-4)
    run = go(even, part, schedule=hs.schedules.synchronous(3, draw=draw), rounds=4)
    assert [r["epsilon"] for r in run.history] == [part.epsilon(t, 3, 12, draw) for t in (1, 2, 3, 4)]


@pytest.mark.parametrize("rule", [UNIFORM, hs.methods.FedSpeed(), hs.methods.FedAU(), hs.methods.MIFA()], ids=str)
def test_a_round_of_nobody_is_released_as_well(even: hs.Federation, rule: hs.methods.Method) -> None:
    """The noise alone moves the model, and who is drawn is as it would be without."""
    models: list[Tensor] = []

    class Watch:
        net: Any = None

        def start(self, net: Simulation) -> None:
            self.net = net
            models.append(net.problem.start)

        def write(self, record: Record) -> None:
            models.append(self.net.state["x"])

        def close(self) -> None:
            pass

    watch = Watch()
    schedule = hs.schedules.synchronous(1, draw="bernoulli")
    run = go(even, differential(clip=0.5), schedule=schedule, rule=rule, rounds=8, writers=[watch], on_start=watch.start)
    empty = [t for t, record in enumerate(run.history) if not record["cohort"]]
    assert 1 < len(empty) < 8
    steps = torch.stack([models[t + 1] - models[t] for t in empty])
    assert bool(steps.isfinite().all()) and float(steps.std(1).min()) > 0.01
    assert not torch.allclose(steps[0], steps[1], atol=0.01)  # each round has noise of its own
    plain = go(even, schedule=schedule, rule=rule, rounds=8)
    assert [r["cohort"] for r in plain.history] == [r["cohort"] for r in run.history]


def test_a_sum_is_divided_by_the_expected_number_of_clients(even: hs.Federation) -> None:
    part, everyone = differential(clip=1e9, noise=0), torch.arange(12)
    net, plain = net_of(even, part), network(even, UNIFORM)  # the schedule's cohort is 12
    for cohort in (everyone[:5], everyone):
        private, open_ = ask(net, cohort), ask(plain, cohort)
        torch.testing.assert_close(private.mean("delta"), open_.sums["delta"] / 12, rtol=1e-12, atol=0)
        assert private.counts
    nobody: Reply = ask(net, everyone[:0])
    assert nobody.counts and len(nobody) == 0 and not nobody.mean("delta").any()
    assert not replace(nobody, noised=False).counts


class Stop:
    """Asks the network to stop after a round."""

    def __init__(self, after: int) -> None:
        self.after, self.net = after, None

    net: Any

    def start(self, net: Simulation) -> None:
        self.net = net

    def write(self, record: Record) -> None:
        self.net.stopping |= record["round"] == self.after

    def close(self) -> None:
        pass


ADAPTIVE = differential(clip=0.05, noise=0.8, adaptive=True, bit_noise=1.0, rate=0.5)
RESUMED = {
    "adaptive": ((ADAPTIVE,), hs.methods.Scaffold()),
    "masked": ((secure(),), hs.methods.Scaffold()),
    "both": ((ADAPTIVE, secure()), UNIFORM),
}


@pytest.mark.parametrize("which", RESUMED)
def test_a_stopped_run_goes_on_to_the_same_end(tmp_path: Path, which: str) -> None:
    """The bound is part of the state: history, weights and the whole checkpoint, whenever the run was stopped."""
    parts, rule = RESUMED[which]
    federation = hs.Federation(hs.tasks.digits(hidden=4), clients=12, partition=hs.dirichlet(0.5))
    options: dict[str, Any] = {"rule": rule, "rounds": 6}
    expected = go(federation, *parts, **options)
    for after in (1, 4):
        stop, out = Stop(after), tmp_path / str(after)
        assert len(go(federation, *parts, **options, out=out, writers=[stop], on_start=stop.start).history) == after
        again = hs.resume(out)
        assert again.history == expected.history and again.settings == expected.settings
        assert same(again.weights, expected.weights) and same(again.state, expected.state)
    if ADAPTIVE in parts:
        assert float(expected.state["privacy.bound"]) != ADAPTIVE.clip


def test_a_round_that_fails_leaves_the_bound_as_it_was(even: hs.Federation) -> None:
    net = net_of(even, ADAPTIVE)
    state, _ = net.begin(UNIFORM.init(net.problem))
    ask(net, torch.arange(12), UNIFORM.message(state))
    assert net.privacy.bound != ADAPTIVE.clip
    net.take_back()
    assert net.privacy.bound == ADAPTIVE.clip


def test_a_checkpoint_of_another_privacy_is_refused(even: hs.Federation) -> None:
    private, plain = go(even, ADAPTIVE), go(even)
    for parts, saved in (((ADAPTIVE,), plain.state), ((secure(), ADAPTIVE), {**private.state, "privacy.more": torch.zeros(1)})):
        net = net_of(even, *parts)
        with pytest.raises(hs.CheckpointError, match="another privacy"):
            net.restore(saved)


def test_a_model_that_diverges_is_told_by_its_loss() -> None:
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=12)
    with pytest.raises(hs.DivergedError, match="training loss of client"):
        go(federation, differential(), rule=hs.methods.FedAvg(weights="uniform", lr=1e30, epochs=3))


# ---- what is refused, before any work


class Rows(hs.methods.FedAvg):
    """Sends every client's displacement by itself."""

    abstract = True

    def train(self, ctx: Any) -> Any:
        return ctx.upload(self.weigh(ctx), rows={"delta": ctx.displacement(self.direction)})


class Opening(hs.methods.FedAvg):
    """Has work for all clients before round 0."""

    abstract = True
    opens = True


BOUND, MASK = (differential(),), (secure(),)
REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "two of a kind": ((secure(), secure(bits=64)), {}, r"privacy: .* is not allowed: at most one of a kind"),
    "weights": (BOUND, {"rule": hs.methods.FedAvg()}, r"clients weigh differently.*use FedAvg\(weights='uniform'\)"),
    "rows": (BOUND, {"rule": Rows(weights="uniform")}, "differential: the rule sends 'delta' to be seen client by client"),
    "masked rows": (MASK, {"rule": Rows()}, "secure: the rule sends 'delta' to be seen client by client"),
    "senders": (MASK, {"rule": hs.methods.FedAMD()}, "secure: the rule sends '.*' to be seen client by client"),
    "opening": (BOUND, {"rule": Opening(weights="uniform")}, "every client sends before round 0"),
    "bounded codec": (BOUND, {"codec": hs.codecs.topk(0.5)}, r"codec: topk.* with differential: what arrives may exceed the bound"),
    "masked codec": (MASK, {"codec": hs.codecs.cast()}, r"codec: cast.* with secure: encoded vectors cannot be added"),
    "little noise": ((differential(adaptive=True),), {}, r"differential.noise: 1.0 is not allowed: with a cohort of 5"),
}
for name in ("fedasync", "fedbuff", "fedfix", "fedcompass", "anarchic"):
    REFUSED[f"{name}, bounded"] = (BOUND, {"schedule": hs.schedules.Schedule.parse(name)}, f"schedule: {name}.*nothing but chance")
    REFUSED[f"{name}, masked"] = (MASK, {"schedule": hs.schedules.Schedule.parse(name)}, f"schedule: {name}.*wait for each other")
for name in ("cyclic", "synchronous(over=0.5)", "synchronous(deadline=3)", "synchronous(least=2)"):
    REFUSED[name] = (BOUND, {"schedule": hs.schedules.Schedule.parse(name)}, "with differential: epsilon is known only where")


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_break_a_promise_is_refused_before_any_work(ragged: hs.Federation, what: str, tmp_path: Path) -> None:
    parts, options, message = REFUSED[what]
    with pytest.raises(HanseError, match=message) as caught:
        go(ragged, *parts, **options, out=tmp_path / "run")
    assert isinstance(caught.value, hs.ConfigError | PrivacyError) and not (tmp_path / "run").exists()


def test_statistics_that_cannot_be_kept_private_are_refused() -> None:
    engine = hs.engines.local("loop", 3, 1, 1)
    shared = hs.Federation(normed(hidden=8), clients=6)
    with pytest.raises(hs.ConfigError, match=r"buffers: 'average' is not allowed with differential: .*'private'"):
        go(shared, differential(), engine=engine)
    domains = hs.Federation(normed(hidden=8), clients=6, partition=hs.feature_shift(), buffers="domain")
    with pytest.raises(hs.ConfigError, match="buffers: 'domain' is not allowed with secure"):
        go(domains, secure(), engine=engine)
    own = hs.Federation(normed(hidden=8), clients=6, buffers="private")
    assert len(go(own, differential(), secure(), engine=engine, rounds=1).history) == 1


def test_a_fixed_cohort_of_those_who_happen_to_be_there_is_refused() -> None:
    """With half of the clients away, each of the others is drawn twice as often; draws of single clients do not care."""
    federation = hs.Federation(hs.tasks.digits(4), clients=12, fleet=hs.fleet.devices(trace="bernoulli(0.5)"))
    with pytest.raises(hs.ConfigError, match=r"fleet: bernoulli\(.*use synchronous\(draw='bernoulli'\)"):
        go(federation, differential())
    assert go(federation, differential(), schedule=BERNOULLI).history[-1]["epsilon"] > 0


def test_private_parameters_and_what_clients_keep_stay_with_them() -> None:
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=6, private=("2.*",), dtype="float64")
    rule = hs.methods.Scaffold()
    plain, private = go(federation, rule=rule), go(federation, differential(clip=1e9, noise=0), rule=rule)
    assert same(private.weights, plain.weights)
    kept: Tensors = {n: t for n, t in plain.state.items() if n.startswith("kept")}
    assert len(kept) > 1 and same({n: private.state[n] for n in kept}, kept)
