"""The local engine: the same result however the work is cut, exact bytes, and what stays on the client."""

import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from small_networks import ask, dropping, network, normed, rounds, same, traffic
from torch import nn

import hanse as hs
from hanse.core.errors import CheckpointError, ConfigError, DivergedError
from hanse.core.messages import Tensors
from hanse.core.optim import sgd
from hanse.core.streams import Streams
from hanse.data.task import Dataset
from hanse.engines.rounds import FORMAT
from hanse.fleet.profiles import Work

RULES = {"FedAvg": hs.methods.FedAvg(epochs=2), "Scaffold": hs.methods.Scaffold(epochs=2)}
P = 64 * 8 + 8 + 8 * 10 + 10
FIXED = hs.engines.local("stacked", 4, 1, 1)


def close(one: Tensors, other: Tensors, tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance)


# ---- the same result


@pytest.mark.parametrize("rule", RULES)
def test_a_run_repeats_bit_for_bit(ragged: hs.Federation, rule: str) -> None:
    """With the arrangement left open: the first run chooses, the second one remembers."""
    first, second = (hs.run(ragged, RULES[rule], hs.schedules.synchronous(5), rounds=4) for _ in range(2))
    assert same(first.weights, second.weights) and same(first.clients, second.clients)
    assert first.history == second.history and first.notes == second.notes
    other = hs.run(ragged, RULES[rule], hs.schedules.synchronous(5), rounds=4, seed=1)
    assert [r["cohort"] for r in other.history] != [r["cohort"] for r in first.history]


WAYS = [
    {"path": "loop", "chunk": 1},
    {"path": "loop", "chunk": 3, "workers": 2},
    {"path": "vmap", "chunk": 12},
    {"path": "vmap", "chunk": 2, "workers": 3},
    {"path": "stacked", "chunk": 12, "threads": 2},
    {"path": "stacked", "chunk": 5, "workers": 2},
    {"path": "stacked", "chunk": 12, "shortcuts": False},
    {"path": "stacked", "chunk": 1, "workers": 4, "shortcuts": False},
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("draw", ["ragged", "even"])
def test_grouping_changes_nothing(rule: str, draw: str, request: pytest.FixtureRequest) -> None:
    federation = request.getfixturevalue(draw)
    reference = network(federation, RULES[rule], chunk=1)
    expected = rounds(reference, 3, cohort=12)
    for way in WAYS:
        net = network(federation, RULES[rule], **way)
        close(rounds(net, 3, cohort=12), expected, 1e-12)
        close(net.kept.read(torch.arange(12)), reference.kept.read(torch.arange(12)), 1e-10)
        assert traffic(net) == traffic(reference)
    torch.set_num_threads(1)


@pytest.mark.parametrize("rule", RULES)
@given(order=st.permutations(range(12)))
@settings(max_examples=10)
def test_the_order_of_the_cohort_is_irrelevant(ragged: hs.Federation, rule: str, order: list[int]) -> None:
    one, other = network(ragged, RULES[rule]), network(ragged, RULES[rule])
    first, second = ask(one, torch.arange(12)), ask(other, torch.tensor(order))
    close(first.sums, second.sums, 1e-12)
    assert torch.equal(first.weight[first.clients.argsort()], second.weight[second.clients.argsort()])
    close(one.kept.read(torch.arange(12)), other.kept.read(torch.arange(12)), 1e-12)


def test_shortcuts_change_the_last_bits_only(ragged: hs.Federation) -> None:
    rule = hs.methods.FedAvg(epochs=3, batch=8)
    fast, slow = (rounds(network(ragged, rule, path="stacked", chunk=12, shortcuts=on), 3, 12) for on in (True, False))
    close(fast, slow, 1e-10)
    assert not same(fast, slow)


PER_CLIENT = {
    "clipping": (hs.methods.FedAvg(clip=0.5), hs.codecs.identity()),
    "momentum": (hs.methods.FedAvg(local=sgd(momentum=0.9)), hs.codecs.identity()),
    "a direction of its own": (hs.methods.FedProx(mu=1.0, epochs=2), hs.codecs.identity()),
    "client state": (hs.methods.Scaffold(), hs.codecs.identity()),
    "a codec": (hs.methods.FedAvg(), hs.codecs.topk(0.5)),
}


@pytest.mark.parametrize("why", PER_CLIENT)
def test_whatever_touches_single_clients_switches_shortcuts_off(ragged: hs.Federation, why: str) -> None:
    rule, codec = PER_CLIENT[why]
    fast, slow = (rounds(network(ragged, rule, codec, path="stacked", chunk=12, shortcuts=on), 2, 12) for on in (True, False))
    assert same(fast, slow)


@pytest.mark.parametrize("path", ["vmap", "loop"])
def test_workers_do_not_disturb_each_other(path: str) -> None:
    """Many small batches in several threads on one model, with dropout masks that must follow their client."""
    federation = hs.Federation(dropping(), clients=40, dtype="float64")
    expected = rounds(network(federation, path=path, chunk=40), 3, cohort=40)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(3):
            close(rounds(network(federation, path=path, chunk=4, workers=4), 3, cohort=40), expected, 1e-12)
    finally:
        sys.setswitchinterval(interval)


def test_dropout_follows_the_seed() -> None:
    federation = hs.Federation(dropping(), clients=4, dtype="float64")
    rule = hs.methods.FedAvg(shuffle=False)
    first, again, other = (ask(network(federation, rule, seed=seed), torch.arange(4)).sums["delta"] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other)


@pytest.mark.parametrize("rule", [*RULES.values(), hs.methods.FedAvgM(), hs.methods.FedSpeed()], ids=str)
@pytest.mark.parametrize("path", ["loop", "stacked"])
def test_training_leaves_the_model_handed_out_alone(ragged: hs.Federation, rule: hs.methods.Method, path: str) -> None:
    """Round 1 must not hand out live state: neither the initial weights nor the message change while clients work."""
    net, start = network(ragged, rule, path=path), ragged.problem.start.clone()
    state, _ = net.begin(rule.init(net.problem))
    message = rule.message(state)
    before = {n: t.clone() for n, t in {**state, **{f"message.{n}": t for n, t in message.items()}}.items()}
    reply = ask(net, torch.arange(12), message)
    new = rule.step(state, reply, 0)
    assert same({**state, **{f"message.{n}": t for n, t in message.items()}}, before)
    assert torch.equal(ragged.problem.start, start) and not torch.equal(new["x"], state["x"])


# ---- bytes


@pytest.mark.parametrize(("rule", "down", "up"), [("FedAvg", ["x"], ["delta"]), ("Scaffold", ["x", "c"], ["delta", "change"])])
def test_bytes_by_formula(ragged: hs.Federation, rule: str, down: list[str], up: list[str]) -> None:
    run = hs.run(ragged, RULES[rule], hs.schedules.synchronous(5), rounds=3, engine=FIXED)
    vector, scalar = torch.zeros(P, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    sent = len(save({n: vector.clone() for n in down}))
    received = len(save({n: vector.clone() for n in up} | {"weight": scalar.clone(), "loss": scalar.clone()}))
    for t, record in enumerate(run.history, 1):
        assert (record["bytes_down"], record["bytes_up"]) == (t * 5 * sent, t * 5 * received)


def test_bytes_of_encoded_messages(ragged: hs.Federation) -> None:
    """A message is one file that holds the encoded vector and the two scalars."""
    codec = hs.codecs.topk(0.1)
    run = hs.run(ragged, RULES["FedAvg"], hs.schedules.synchronous(5), rounds=2, codec=codec, engine=FIXED)
    coded = torch.zeros(len(codec.encode(torch.randn(P, dtype=torch.float64))), dtype=torch.uint8)
    scalar = torch.zeros(1, dtype=torch.float64)
    assert run.history[-1]["bytes_up"] == 2 * 5 * len(save({"delta": coded, "weight": scalar, "loss": scalar.clone()}))


def test_what_arrives_went_through_the_codec(ragged: hs.Federation) -> None:
    codec, everyone = hs.codecs.topk(0.05), torch.arange(12)
    rule = hs.methods.Scaffold()
    message = rule.message(rule.init(ragged.problem))
    expected = dict.fromkeys(("delta", "change"), torch.zeros(P, dtype=torch.float64))
    for i in everyone:
        one = ask(network(ragged, rule), i[None], message)
        expected = {n: v + one.weight[0] * codec.decode(codec.encode(one.sums[n] / one.weight[0])) for n, v in expected.items()}
    close(ask(network(ragged, rule, codec), everyone, message).sums, expected, 1e-12)


def test_batch_statistics_do_not_pass_through_a_lossy_codec() -> None:
    """A variance that is not among the largest entries must not arrive as zero."""
    federation = hs.Federation(normed(), clients=4, partition=hs.iid(), dtype="float64")
    state = rounds(network(federation, codec=hs.codecs.topk(0.1)), 1, cohort=4)
    plain = rounds(network(federation), 1, cohort=4)
    torch.testing.assert_close(state["buffers"], plain["buffers"])


# ---- what stays on the client


def test_private_parameters_stay_on_the_client() -> None:
    everything, private = (
        hs.Federation(hs.tasks.digits(hidden=8), clients=6, partition=hs.dirichlet(0.5), dtype="float64", private=own)
        for own in ((), ("2.*",))
    )
    head = 8 * 10 + 10
    runs = [hs.run(f, hs.methods.FedAvg(), hs.schedules.synchronous(3), rounds=2, engine=FIXED) for f in (everything, private)]
    vectors = [torch.zeros(n, dtype=torch.float64) for n in (P, P - head)]
    for run, v in zip(runs, vectors, strict=True):
        assert run.history[-1]["bytes_down"] == 6 * len(save({"x": v}))
        scalar = torch.zeros(1, dtype=torch.float64)
        assert run.history[-1]["bytes_up"] == 6 * len(save({"delta": v, "weight": scalar, "loss": scalar.clone()}))
    net = network(private)
    state = rounds(net, 1, cohort=3)
    assert state["x"].shape == (P - head,)
    trained = net.taken.bool()
    kept = net.kept.read(torch.arange(6))["private"]
    start = private.problem.start[-head:]
    assert torch.equal(kept[~trained], start.expand(3, -1))
    assert len({tuple(row.tolist()) for row in kept[trained]}) == 3 and not bool((kept[trained] == start).all(1).any())


def test_frozen_parameters_never_move() -> None:
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=6, dtype="float64", frozen=("0.*",))
    model = federation.problem.model
    before = {n: p.clone() for n, p in model.named_parameters()}
    run = hs.run(federation, hs.methods.FedAvg(), hs.schedules.synchronous(3), rounds=3)
    assert set(run.weights) == {"2.weight", "2.bias"}
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n.startswith("0."))
    assert not torch.equal(run.weights["2.bias"], before["2.bias"])
    assert run.history[-1]["bytes_down"] == 9 * len(save({"x": torch.zeros(90, dtype=torch.float64)}))


@pytest.mark.parametrize("buffers", ["average", "private"])
def test_batch_norm_statistics_by_policy(buffers: str) -> None:
    federation = hs.Federation(normed(), clients=6, partition=hs.dirichlet(1.0), dtype="float64", buffers=buffers)  # type: ignore[arg-type]
    net = network(federation)
    state = rounds(net, 2, cohort=6)
    assert ("buffers" in state) == (buffers == "average")
    if buffers == "average":
        one = network(federation)
        message = one.method.message(one.begin(one.method.init(one.problem))[0])
        reply = ask(one, torch.arange(6), message)
        assert set(reply.sums) == {"delta", "buffers"}
        assert not torch.equal(reply.mean("buffers"), federation.problem.start_buffers)
    else:
        kept = net.kept.read(torch.arange(6))["buffers"]
        assert len({tuple(row.tolist()) for row in kept}) == 6


class crowd(hs.tasks.digits):
    """A million clients with one sample each."""

    abstract: ClassVar[bool] = True

    def data(self, streams: Streams) -> Dataset:
        x, y = torch.rand(1_000_000, 1).expand(-1, 64), torch.zeros(1_000_000, dtype=torch.long)
        return Dataset(x, y, x[:2], y[:2], y, ("one",))


def test_a_million_clients_cost_what_takes_part() -> None:
    federation = hs.Federation(crowd(hidden=8), clients=1_000_000, partition=hs.iid(test=0))
    net = network(federation, hs.methods.Scaffold(), path="stacked")
    rounds(net, 1, cohort=3)
    assert int(net.taken.sum()) == 3 and net.kept.used == 3
    assert sum(t.nbytes for t in net.kept.rows.values()) <= 2 * 3 * P * 4
    assert net.kept.slot.nbytes + net.taken.nbytes + net.keys.nbytes == 12_000_000


def test_rows_on_disk_equal_rows_in_memory(ragged: hs.Federation) -> None:
    rule = RULES["Scaffold"]
    nets = [network(ragged, rule, kept=where) for where in ("memory", "disk")]
    one, other = (rounds(net, 4) for net in nets)
    assert same(one, other) and same(nets[0].snapshot(), nets[1].snapshot())


# ---- snapshots


@pytest.mark.parametrize("rule", [*RULES.values(), hs.methods.FedAdam()], ids=str)
def test_a_snapshot_goes_on_identically(ragged: hs.Federation, rule: hs.methods.Method) -> None:
    net = network(ragged, rule)
    rounds(net, 3)
    saved = net.snapshot()
    copy = {n: t.clone() for n, t in saved.items()}
    expected, sent = rounds(net, 3), traffic(net)
    assert same(saved, copy)  # going on left it alone
    fresh = network(ragged, rule)
    fresh.restore(saved)
    assert same(rounds(fresh, 3), expected) and traffic(fresh) == sent and fresh.round == 6
    assert torch.equal(fresh.taken, net.taken) and same(fresh.snapshot(), net.snapshot()) and same(saved, copy)


INDISPENSABLE = ("taken", "keys", "loss", "counters", "state.x", "clock.counters", "clock.out", "clock.arrived", "pending.next")


def test_a_snapshot_of_something_else_is_refused(ragged: hs.Federation) -> None:
    def saved(rule: hs.methods.Method, federation: hs.Federation = ragged) -> Tensors:
        net = network(federation, rule)
        rounds(net, 1)
        return net.snapshot()

    avg = hs.methods.FedAvg()
    wide = hs.Federation(hs.tasks.digits(hidden=9), clients=12, dtype="float64")
    many = hs.Federation(hs.tasks.digits(hidden=8), clients=13, dtype="float64")
    short = hs.Federation(hs.tasks.digits(hidden=8), clients=12)
    own = saved(avg)
    cases = {
        "wider model": (avg, saved(avg, wide)),
        "more clients": (avg, saved(avg, many)),
        "other type": (avg, saved(avg, short)),
        "another rule's state": (avg, saved(hs.methods.Scaffold())),
        "no client rows": (hs.methods.Scaffold(), own),
        "no server memory": (hs.methods.FedAdam(), own),
        "nothing": (avg, {}),
        **{f"no {n}": (avg, {k: t for k, t in own.items() if k != n}) for n in INDISPENSABLE},
        "short counters": (avg, own | {"counters": own["counters"][:1]}),
    }
    for name, (rule, found) in cases.items():
        net = network(ragged, rule)
        with pytest.raises(CheckpointError, match="checkpoint"):
            net.restore(found)
            net.begin(rule.init(net.problem))
            pytest.fail(name)


# ---- settings and failures


def test_the_fleet_follows_the_federation_and_the_cohorts_the_run() -> None:
    """One fleet and one split under several seeds, as ``split_seed`` asks for."""
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=5, fleet=hs.fleet.phones(), seed=7)
    everyone = hs.schedules.synchronous(5)
    seconds = [
        hs.run(federation, hs.methods.FedAvg(), everyone, rounds=1, seed=seed, engine=FIXED).history[0]["seconds"]
        for seed in (1, 2)
    ]
    assert seconds[0] == seconds[1] > 0
    profile = federation.fleet.profile(federation.population, torch.arange(5))
    assert profile is not None
    counts = federation.split.train.counts()
    work = Work(-(-counts // 32), federation.problem.sample_flops(federation.split.train.x[:1]) * counts, 0.0)
    down = len(save({"x": torch.zeros(P)}))
    up = len(save({"delta": torch.zeros(P), "weight": torch.zeros(1), "loss": torch.zeros(1)}))
    each = 2 * profile.latency + down / profile.down + profile.compute(work) + up / profile.up
    assert seconds[0] == pytest.approx(float(each.max()))


@pytest.mark.parametrize("rule", [hs.methods.FedSpeed, hs.methods.FedAvg_M_VR, hs.methods.Scaffold_M_VR])
def test_a_rule_with_two_gradients_a_step_computes_twice_as_long(rule: type[hs.methods.FedAvg]) -> None:
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=5, fleet=hs.fleet.devices(gflops=0.001))
    everyone = hs.schedules.synchronous(5)
    once, twice = (
        hs.run(federation, r, everyone, rounds=1, engine=FIXED).history[0]["seconds"]
        for r in (hs.methods.FedAvg(steps=4), rule(steps=4))
    )
    assert once > 0 and twice == pytest.approx(2 * once, rel=1e-6)


def test_clipping_reaches_the_clients(ragged: hs.Federation) -> None:
    moved = [ask(network(ragged, hs.methods.FedAvg(clip=clip, steps=1)), torch.tensor([3])).mean("delta") for clip in (None, 1e-3)]
    assert float(moved[1].norm()) == pytest.approx(1e-3 * 0.1, rel=1e-9)
    torch.testing.assert_close(moved[1] / moved[1].norm(), moved[0] / moved[0].norm())


def test_a_path_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"local.path: 'stacked' is not allowed for this model: loop, vmap"):
        network(hs.Federation(dropping(), clients=4), path="stacked")


def test_divergence_names_client_and_round(ragged: hs.Federation) -> None:
    net = network(ragged, hs.methods.FedAvg(lr=1e200, epochs=3))
    before = net.kept.snapshot()
    with pytest.raises(DivergedError, match=r"client \d+ in round 1 is not finite; lower lr \(1e\+200\)") as caught:
        ask(net, torch.arange(12))
    client = int(str(caught.value).split("client ")[1].split()[0])
    alone = network(ragged, hs.methods.FedAvg(lr=1e200, epochs=3))
    with pytest.raises(DivergedError, match=f"client {client} "):
        ask(alone, torch.tensor([client]))
    assert same(net.kept.snapshot(), before) and traffic(net)[1] == 0 and not bool(net.taken.any())


def test_virtual_files_go_with_the_network(ragged: hs.Federation) -> None:
    net = network(ragged, RULES["Scaffold"], kept="disk")
    rounds(net, 1)
    folder = net.kept.folder
    assert isinstance(folder, Path) and list(folder.iterdir())
    del net
    assert not folder.exists()


class attentive(hs.tasks.digits):
    """A model whose dropout draws from torch's global generator."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Unflatten(1, (8, 8)), nn.TransformerEncoderLayer(8, 2, 16), nn.Flatten(), nn.Linear(64, 10))


def test_dropout_that_cannot_repeat_is_refused() -> None:
    with pytest.raises(hs.ConfigError, match=r"dropout of 1.self_attn is not allowed"):
        hs.run(hs.Federation(attentive(), clients=4), hs.methods.FedAvg(), rounds=1)


def test_one_number_a_client_is_summed_too() -> None:
    seen = []

    class Counts(hs.methods.FedAvg):
        """FedAvg that also sums the clients' steps."""

        def train(self, ctx):  # type: ignore[no-untyped-def]
            return ctx.upload(self.weigh(ctx), delta=ctx.displacement(self.direction), steps=ctx.steps.to(ctx.loss.dtype))

        def step(self, state, reply, round):  # type: ignore[no-untyped-def]
            seen.append((reply.sums["steps"], reply.weight))
            return super().step(state, reply, round)

    hs.run(hs.Federation(hs.tasks.digits(), clients=6), Counts(steps=3, weights="uniform"), hs.schedules.synchronous(6), rounds=1)
    ((total, weight),) = seen
    assert total.tolist() == [18.0] and weight.sum() == 6


def test_a_checkpoint_of_another_format_is_refused(even: hs.Federation) -> None:
    net, other = network(even), network(even)
    rounds(net, 1)
    with pytest.raises(CheckpointError, match=f"has format {FORMAT + 1}; this version of hanse reads format {FORMAT}"):
        other.restore({**net.snapshot(), "format": torch.tensor([FORMAT + 1])})
