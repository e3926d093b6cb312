"""Work under way in the local engine: executed together, held only as long as needed, and the same as without any of this."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from small_networks import ask, at_once, network, same, traffic
from torch import Tensor

import hanse as hs
from hanse.core.errors import CheckpointError
from hanse.core.messages import Reply, Tensors
from hanse.core.wire import wire_size
from hanse.engines.execution import Executor, Lane, Orders
from hanse.engines.simulation import Simulation
from hanse.fleet.clock import Events, Jobs
from hanse.track.folder import Folder

CLIENTS = 12


def unequal(**fleet: Any) -> hs.Federation:
    """Ragged digits, of which client i needs 1 + i seconds for a job."""
    devices = hs.fleet.devices(**{"job": f"evenly(1.0, {CLIENTS})", **fleet})
    return hs.Federation(hs.tasks.digits(hidden=8), CLIENTS, hs.dirichlet(0.3), devices, dtype="float64")


@pytest.fixture(scope="module")
def uneven() -> hs.Federation:
    return unequal()


def started(federation: hs.Federation, rule: hs.methods.Method | None = None, *rest: Any, **engine: Any) -> Simulation:
    """A network whose conversation has begun."""
    net = network(federation, rule, *rest, **engine)
    net.begin(net.method.init(net.problem))
    return net


def send(net: Simulation, *clients: int, patience: float = math.inf) -> None:
    """Have clients train from the current model."""
    net.send(torch.tensor(clients), "train", net.method.message(net.state), patience=patience)


def wait(net: Simulation, replies: int = 1, until: float = math.inf) -> Events:
    return at_once(net.wait(replies, until))


def jobs_of(jobs: Jobs, *clients: int) -> Jobs:
    found: Jobs = jobs[np.isin(jobs["client"], clients)]
    return found


def collect(net: Simulation, *clients: int, **how: Any) -> Reply:
    """Take the replies of some clients."""
    return net.collect(jobs_of(net.arrived, *clients), **how)


def step(net: Simulation, reply: Reply | None = None) -> None:
    """Commit a round, in which the model moves if there is a reply."""
    at_once(net.commit(net.state if reply is None else net.method.step(net.state, reply, net.round)))


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[Orders]:
    """The orders of every execution."""
    calls: list[Orders] = []
    run = Executor.run

    def counting(self: Executor, orders: Orders, *rest: Any, **options: Any) -> list[Lane]:
        calls.append(orders)
        return run(self, orders, *rest, **options)

    monkeypatch.setattr(Executor, "run", counting)
    return calls


# ---- together


def test_nothing_is_executed_before_a_result_is_needed(uneven: hs.Federation, executed: list[Orders]) -> None:
    net = started(uneven)
    send(net, 3, 4)
    assert wait(net, until=3.9).due and executed == []
    assert wait(net).arrived["client"].tolist() == [3] and executed == []
    collect(net, 3)
    assert [orders.clients.tolist() for orders in executed] == [[3, 4]]


def test_work_is_executed_when_its_size_decides_when_it_arrives(executed: list[Orders]) -> None:
    net = started(unequal(up=1.0))
    send(net, 3, 4)
    assert wait(net, until=3.9).due and executed == []
    assert wait(net).arrived["client"].tolist() == [3] and len(executed) == 1


def test_work_of_several_versions_is_executed_at_once(uneven: hs.Federation, executed: list[Orders]) -> None:
    """Clients 0 and 1 reply to version 0; 8 and 9 are still at it when five more start from versions 1 and 2."""
    net = started(uneven)
    send(net, 0, 1)
    wait(net, 2)
    reply = collect(net, 0, 1)
    send(net, 8, 9)
    step(net, reply)
    send(net, 5, 6, 7)
    step(net)
    net.state = {**net.state, "x": net.state["x"] + 1}
    send(net, 0, 1)
    executed.clear()
    wait(net)
    net.execute_all()  # as the first to be collected would have it
    (orders,) = executed
    versions = dict(zip(orders.clients.tolist(), orders.versions.tolist(), strict=True))
    assert versions == {8: 0, 9: 0, 5: 1, 6: 1, 7: 1, 0: 2, 1: 2} and len(orders.messages) == 3
    for n in range(6):
        assert len(wait(net).arrived) == 1, n
    assert len(executed) == 1 and not len(net.out)
    send(net, 0, 2)
    wait(net, 2)
    collect(net, 0)
    assert [len(o) for o in executed] == [7, 2]


def test_work_whose_reply_is_lost_is_not_executed(executed: list[Orders]) -> None:
    net = started(unequal(loss=f"listed({(1,) + (0,) * (CLIENTS - 1)})"))
    send(net, 0, 1, 2)
    assert wait(net, 3).lost["client"].tolist() == [0]
    collect(net, 1, 2)
    assert [sorted(orders.clients.tolist()) for orders in executed] == [[1, 2]]


RULES = {
    "FedAvg": hs.methods.FedAvg(epochs=2, lr="exponential(0.1, 0.5)"),
    "FedProx": hs.methods.FedProx(mu=0.5),
    "Scaffold": hs.methods.Scaffold(lr="exponential(0.1, 0.5)"),
    "FedSpeed": hs.methods.FedSpeed(lam=1.0),
    "FedAvg_M": hs.methods.FedAvg_M(steps=4),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_job_brings_what_it_would_bring_alone(uneven: hs.Federation, executed: list[Orders], rule: str) -> None:
    """In one batch with jobs of other versions, rounds and rates: what the client does with the same model and key by itself."""
    net = started(uneven, RULES[rule], path="stacked", chunk=12)
    states = [net.state]
    send(net, 0, 1, 2)
    wait(net, 3)
    reply = collect(net, 0, 1, 2)
    send(net, 10, 11)
    step(net, reply)
    kept = net.kept.snapshot()
    states.append(net.state)
    send(net, 0, 2, 5)
    states.append({**net.state, "x": net.state["x"] + 0.1 * torch.randn_like(net.state["x"])})
    at_once(net.commit(states[2]))
    send(net, 7)
    executed.clear()
    wait(net, 6)
    net.execute_all()  # as the first to be collected would have it
    assert [len(orders) for orders in executed] == [6]
    starts = {0: 1, 2: 1, 5: 1, 7: 2, 10: 0, 11: 0}
    for client, version in starts.items():
        alone = network(uneven, RULES[rule], path="stacked", chunk=1)
        alone.kept.restore(kept)
        alone.round = version
        expected = ask(alone, torch.tensor([client]), alone.method.message(states[version]))
        found = collect(net, client)
        assert found.clients.tolist() == [client] and found.versions.tolist() == [version]
        assert found.sums.keys() == expected.sums.keys()
        for name, values in expected.sums.items():
            torch.testing.assert_close(found.sums[name], values, rtol=1e-12, atol=1e-12)
        mine, other = (n.kept.read(torch.tensor([client])) for n in (net, alone))
        assert mine.keys() == other.keys()
        for name, rows in mine.items():
            torch.testing.assert_close(rows, other[name], rtol=1e-12, atol=1e-12)


# ---- the same as the sums of a barrier


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("chunk", [1, 4, 12])
@pytest.mark.parametrize("rule", ["FedAvg", "Scaffold"])
def test_rows_equal_running_sums_bit_for_bit(ragged: hs.Federation, rule: str, chunk: int, workers: int) -> None:
    """``ask`` adds up while clients work; ``collect`` adds up rows that were kept, in the same order."""
    how = {"path": "stacked", "chunk": chunk, "workers": workers, "shortcuts": False}
    summing, rowed = (started(ragged, RULES[rule], **how) for _ in range(2))
    for _ in range(2):
        everyone = torch.arange(CLIENTS)
        expected = ask(summing, everyone, summing.method.message(summing.state))
        send(rowed, *everyone.tolist())
        wait(rowed, CLIENTS)
        found = rowed.collect(rowed.arrived)
        assert same(found.sums, expected.sums) and torch.equal(found.clients, expected.clients)
        assert torch.equal(found.loss, expected.loss) and torch.equal(found.weight, expected.weight)
        assert rowed.loss == summing.loss and traffic(rowed) == traffic(summing)
        step(summing, expected)
        step(rowed, found)
        assert same(rowed.state, summing.state) and same(rowed.kept.snapshot(), summing.kept.snapshot())
    assert rowed.pending.results == [] == summing.pending.results
    torch.set_num_threads(1)


@pytest.mark.parametrize("workers", [1, 2])
def test_scales_find_their_clients(uneven: hs.Federation, workers: int) -> None:
    """Replies executed at different times, by different workers, collected together: every share is its own client's."""
    net = started(uneven, path="stacked", chunk=2, workers=workers)
    send(net, 0, 1, 2, 3, 4)
    wait(net, 5)
    send(net, 5, 6, 7, 8, 9)
    wait(net, 5)
    jobs = net.arrived[::-1]
    one = {int(c): ask(network(uneven, path="stacked"), torch.tensor([c])) for c in jobs["client"]}
    reply = net.collect(jobs, scale=torch.from_numpy(1.0 + jobs["client"]), total=7.0)
    assert sorted(reply.clients.tolist()) == list(range(10))
    torch.testing.assert_close(reply.shares, reply.weight * (1.0 + reply.clients) / 7.0)
    expected = torch.stack([(1.0 + c) * r.sums["delta"] / 7.0 for c, r in one.items()]).sum(0)
    torch.testing.assert_close(reply.mean("delta"), expected, rtol=1e-10, atol=1e-12)
    plain = torch.stack([r.sums["delta"] for r in one.values()]).sum(0)
    torch.testing.assert_close(reply.sums["delta"], plain, rtol=1e-10, atol=1e-12)
    torch.set_num_threads(1)


def test_a_reply_knows_where_each_client_started(uneven: hs.Federation) -> None:
    net = started(uneven)
    first = net.state["x"]
    send(net, 0, 4)
    wait(net)
    step(net, collect(net, 0))
    send(net, 1)
    wait(net, 2)
    reply = net.collect(net.arrived)
    assert dict(zip(reply.clients.tolist(), reply.versions.tolist(), strict=True)) == {1: 1, 4: 0}
    assert set(reply.starts) == {0, 1} and net.staleness == 0.5
    assert torch.equal(reply.starts[0]["x"], first) and torch.equal(reply.starts[1]["x"], net.state["x"])


def test_an_empty_reply() -> None:
    net = started(unequal())
    reply = net.collect(net.arrived)
    assert len(reply) == 0 and reply.sums == {} and net.updates == 0 and not bool(net.taken.any())


# ---- only as long as needed


def test_messages_stay_while_a_job_refers_to_them(uneven: hs.Federation) -> None:
    net = started(uneven)
    send(net, 0, 11)
    send(net, 1)  # the same message again
    assert len(net.pending.messages) == 1
    for _ in range(4):
        wait(net)
        step(net, net.collect(net.arrived))
        send(net, 0)
        assert len(net.pending.messages) == 2  # that of client 11, and the newest
    while len(net.out):
        wait(net, 9)
        step(net, net.collect(net.arrived))
    assert net.pending.messages == {}


@pytest.mark.parametrize("end", ["collected", "called off"])
def test_results_stay_until_they_are_collected_or_called_off(uneven: hs.Federation, end: str) -> None:
    net = started(uneven, path="stacked", chunk=12)
    send(net, *range(CLIENTS))
    wait(net)
    net.execute_all()  # as the first to be collected would have it
    (result,) = net.pending.results
    assert len(result.batch.tickets) == CLIENTS  # all were under way

    def take(*clients: int) -> None:
        if end == "collected":
            wait(net, len(clients))
            collect(net, *clients)
        else:
            net.call_off(jobs_of(np.concatenate([net.out, net.arrived]), *clients))

    take(*range(10))
    held = [len(r.batch.upload.sums["delta"]) for r in net.pending.results]
    assert held == [2]  # the two slowest do not hold the rows of the other ten
    take(10)
    take(11)
    assert net.pending.results == []


def test_results_of_jobs_given_up_go_with_the_round(uneven: hs.Federation) -> None:
    net = started(uneven)
    send(net, 0)
    send(net, 5, patience=2.0)
    assert wait(net).arrived["client"].tolist() == [0] and wait(net).lost["client"].tolist() == [5]
    collect(net, 0)
    send(net, 5)  # it turns to a new job, so nothing comes of the old one
    step(net)
    assert sum(len(r.batch.tickets) for r in net.pending.results) == 0


# ---- what clients keep


def test_a_client_writes_when_its_reply_is_collected_or_at_its_next_job(uneven: hs.Federation) -> None:
    net = started(uneven, hs.methods.Scaffold())

    def written(client: int) -> bool:
        return bool(net.kept.read(torch.tensor([client]))["c"].any())

    send(net, 0, 1, 2)
    send(net, 3, patience=3.5)
    wait(net, 3)
    assert len(net.arrived) == 3 and net.kept.used == 0  # nobody has yet
    collect(net, 0)
    assert written(0) and not written(1)
    send(net, 1)
    assert written(1) and not written(2)
    net.call_off(jobs_of(net.arrived, 2))
    assert wait(net, until=3.6).lost["client"].tolist() == [3]
    wait(net, until=5.0)
    assert [written(i) for i in range(4)] == [True, True, False, False]


def test_the_next_job_goes_on_from_what_was_kept(uneven: hs.Federation) -> None:
    """Whether the first reply was collected before it or not; work that was called off leaves no trace."""
    ends = []
    for order in ("collected", "sent first", "called off"):
        net = started(uneven, hs.methods.Scaffold())
        if order == "called off":
            send(net, 0)
            wait(net, until=0.5)
            net.call_off(net.out)
            net.keys[:] = -1  # the same chance once more
        send(net, 0)
        wait(net)
        first = net.arrived.copy()
        if order != "sent first":
            net.collect(first)
        send(net, 0)
        wait(net)
        second = net.arrived[net.arrived["ticket"] != first["ticket"][0]]
        ends.append(net.collect(second).sums | net.kept.read(torch.tensor([0])))
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])


def test_a_client_never_draws_the_same_twice(uneven: hs.Federation) -> None:
    """Two jobs of one version are different work: its key is the round, or the next one that is free."""
    net = started(uneven)
    moved = []
    for _ in range(3):
        send(net, 0)
        wait(net)
        moved.append(collect(net, 0).mean("delta"))
    assert not torch.equal(moved[0], moved[1]) and not torch.equal(moved[1], moved[2])
    alone = network(uneven)
    alone.round = 2
    torch.testing.assert_close(ask(alone, torch.tensor([0])).mean("delta"), moved[2], rtol=1e-12, atol=1e-14)


# ---- bytes


@pytest.mark.parametrize("codec", [hs.codecs.identity(), hs.codecs.topk(0.1)], ids=str)
@pytest.mark.parametrize("rule", ["FedAvg", "Scaffold"])
def test_every_job_costs_its_messages(uneven: hs.Federation, rule: str, codec: hs.codecs.Codec) -> None:
    net = started(uneven, RULES[rule], codec)
    message = net.method.message(net.state)
    scalars = {n: torch.zeros(1, dtype=torch.float64) for n in ("weight", "loss")}
    names = ["delta"] if rule == "FedAvg" else ["delta", "change"]
    vector = torch.randn(net.problem.shared, dtype=torch.float64)
    if codec == hs.codecs.identity():
        up = len(save({n: vector.clone() for n in names} | scalars))
    else:
        up = len(save({n: torch.zeros(len(codec.encode(vector)), dtype=torch.uint8) for n in names} | scalars))
    send(net, 0, 1, 5)
    assert traffic(net) == (3 * len(save({n: t.clone() for n, t in message.items()})), 0) == (3 * wire_size(message), 0)
    wait(net, 2)
    net.execute_all()
    assert net.arrived["up"].tolist() == [up, up] and traffic(net)[1] == 2 * up
    net.call_off(net.out)
    wait(net, until=100)
    assert traffic(net)[1] == 2 * up


def test_replies_pass_through_the_codec(uneven: hs.Federation) -> None:
    codec = hs.codecs.topk(0.05)
    net, plain = started(uneven, None, codec), started(uneven)
    for each in (net, plain):
        send(each, 0, 3)
        wait(each)
    exact = collect(plain, 0).mean("delta")
    torch.testing.assert_close(collect(net, 0).mean("delta"), codec.decode(codec.encode(exact)), rtol=1e-12, atol=1e-14)


# ---- saving


def in_flight(rule: hs.methods.Method, codec: hs.codecs.Codec, **engine: Any) -> Simulation:
    """A network with work of three versions: under way and not executed, executed, arrived, and given up."""
    net = started(unequal(loss=f"listed({(0,) * (CLIENTS - 1) + (1,)})"), rule, codec, path="stacked", chunk=3, **engine)
    send(net, 0, 8, 9, 10, 11)
    wait(net)
    step(net, net.collect(net.arrived))
    send(net, 0, 1, 2)
    send(net, 7, patience=1.2)
    wait(net, 2)
    step(net)
    send(net, 4, 5)
    return net


def finish(net: Simulation) -> tuple[Tensors, list[Any]]:
    """The rest: everything that comes is collected, in twos."""
    seen: list[Any] = []
    while len(net.out) or len(net.arrived):
        seen.append([rows.tolist() for rows in wait(net, 2)[:2]])
        reply = net.collect(net.arrived, scale=torch.ones(len(net.arrived)), total=9.0)
        step(net, reply if len(reply) else None)
        if net.round == 4:
            send(net, *net.sample(3).tolist())
    return net.state, seen


@pytest.mark.parametrize("codec", [hs.codecs.identity(), hs.codecs.topk(0.3)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_work_under_way_survives_a_file(tmp_path: Path, rule: str, codec: hs.codecs.Codec) -> None:
    net = in_flight(RULES[rule], codec)
    Folder(tmp_path).checkpoint(net.snapshot(), {})
    saved = Folder(tmp_path).load()
    assert saved is not None and same(saved, net.snapshot())
    fresh = network(net.federation, RULES[rule], codec, path="stacked", chunk=3)
    fresh.restore(saved)
    assert same(fresh.snapshot(), saved)
    fresh.begin(fresh.method.init(fresh.problem))
    (expected, seen), (found, again) = finish(net), finish(fresh)
    assert len(seen) > 3 and again == seen and same(found, expected)
    assert same(fresh.snapshot(), net.snapshot())  # traffic, participation, client state and all


def test_a_resumed_run_sends_the_same_message_again(uneven: hs.Federation, executed: list[Orders]) -> None:
    """The model has not moved since, so that new work is executed with the old as work on one message, as it would have been."""
    net, fresh = (network(uneven) for _ in range(2))
    state, _ = net.begin(net.method.init(net.problem))
    send(net, 3)
    step(net)
    fresh.restore({n: t.clone() for n, t in net.snapshot().items()})
    for each in (net, fresh):
        each.begin(state)
        send(each, 4)
        wait(each)
        each.execute_all()
    assert same(net.snapshot(), fresh.snapshot()) and len(net.pending.messages) == 1
    assert [len(orders.messages) for orders in executed] == [1, 1]


DAMAGE: dict[str, Callable[[str], bool]] = {
    "a message": lambda n: n.startswith("pending.message.0."),
    "a result": lambda n: n.startswith("pending.result.0."),
    "whose a result is": lambda n: n.startswith("pending.result.0.job.tickets"),
    "the number of messages": lambda n: n == "pending.next",
    "the jobs": lambda n: n == "clock.out",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_snapshot_that_lacks_work_under_way_is_refused(what: str) -> None:
    net = in_flight(RULES["Scaffold"], hs.codecs.identity())
    saved = {n: t for n, t in net.snapshot().items() if not DAMAGE[what](n)}
    assert len(saved) < len(net.snapshot())
    with pytest.raises(CheckpointError, match="checkpoint"):
        network(net.federation, RULES["Scaffold"], path="stacked", chunk=3).restore(saved)


def test_a_round_that_failed_is_taken_back(uneven: hs.Federation) -> None:
    """So that what is saved is the last commit, and not half a round."""
    net = started(uneven, hs.methods.Scaffold())
    send(net, 0, 1, 9)
    wait(net, 2)
    step(net, net.collect(net.arrived))
    before = net.snapshot()
    send(net, 0, 2, 5)
    wait(net, 2)
    assert not same(net.snapshot(), before)
    assert net.take_back() and same(net.snapshot(), before)


def test_a_round_that_has_used_replies_of_earlier_ones_cannot_be_taken_back(uneven: hs.Federation) -> None:
    net = started(uneven)
    send(net, 0, 1)
    wait(net, 2)
    net.execute_all()
    step(net)
    collect(net, 0)
    assert not net.take_back()


def test_who_is_there(uneven: hs.Federation) -> None:
    """Clients at work are not drawn, and of the others no more than there are."""
    net = started(uneven)
    send(net, 1, 4)
    assert net.sample(99).tolist() == [i for i in range(CLIENTS) if i not in (1, 4)]
    drawn: Tensor = torch.cat([net.sample(3) for _ in range(50)])
    assert set(drawn.tolist()) == set(range(CLIENTS)) - {1, 4}
