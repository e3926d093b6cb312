"""Peers' programs: virtual time, and what becomes of messages, trainings and nodes in it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import hanse as hs
from hanse.core.errors import ConfigError, DivergedError, StalledError
from hanse.core.streams import Streams
from hanse.core.wire import wire_size
from hanse.engines import programs as engine
from hanse.engines.programs import Outcome, Programs, VirtualLoop
from hanse.fleet.clock import Clock
from hanse.fleet.profiles import Work
from hanse.methods import FedAvg
from hanse.schedules import Node

Program = Callable[[Node], Coroutine[Any, Any, None]]


class Played:
    """Programs on a fleet without a rule: training adds the node's number plus one, and is noted down."""

    def __init__(self, fleet: str = "ideal", nodes: int = 3, codec: str = "identity", seed: int = 0) -> None:
        self.federation = hs.Federation(
            hs.tasks.quadratics(count=nodes), nodes, hs.natural(), hs.fleet.Fleet.parse(fleet), dtype="float64", seed=seed
        )
        self.streams, population = Streams(seed), self.federation.population
        self.clock = Clock(self.federation.fleet, population, self.streams)
        self.traffic = torch.zeros(nodes, 2, dtype=torch.int64)
        self.batches: list[list[tuple[int, int]]] = []
        self.finished: list[int] = []
        self.committed: list[Tensor] = []
        self.log: list[tuple[Any, ...]] = []
        self.rounds = 10**9
        self.programs = Programs(
            self.federation,
            self.clock,
            self.streams,
            hs.codecs.Codec.parse(codec),
            self.traffic,
            lambda who: Work(torch.ones_like(who), torch.zeros(1), 0.0),
            self.train,
            lambda node, outcome: self.finished.append(node),
            self.commit,
            torch.zeros(10, dtype=torch.float64),
        )

    def train(self, nodes: Tensor, models: Tensor, rounds: Tensor) -> list[Outcome]:
        self.batches.append(list(zip(nodes.tolist(), rounds.tolist(), strict=True)))
        return [Outcome(x + int(i) + 1, None, {}, 0.0, 1.0) for i, x in zip(nodes, models, strict=True)]

    def commit(self, x: Tensor) -> bool:
        self.committed.append(x)
        return len(self.committed) < self.rounds

    def note(self, node: Node, *what: Any) -> None:
        self.log.append((node.id, round(node.now, 6), *what))

    def play(self, program: Program, seconds: float = 100.0) -> Played:
        self.programs.play(program, seconds)
        return self


def one() -> Tensor:
    return torch.ones(10, dtype=torch.float64)


# ---- time


def test_sleeping_takes_virtual_time_alone() -> None:
    played = Played(nodes=2)

    async def program(node: Node) -> None:
        await asyncio.sleep(3600.0 * (1 + node.id))
        played.note(node)

    played.play(program, seconds=1e6)
    assert played.log == [(0, 3600.0), (1, 7200.0)]


def test_time_outs_come_when_they_should() -> None:
    played = Played(nodes=1)

    async def program(node: Node) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.5):
                await node.receive()
        played.note(node, "gave up")
        async with asyncio.timeout_at(10):
            await asyncio.sleep(1)
        played.note(node, "in time")

    assert played.play(program).log == [(0, 2.5, "gave up"), (0, 3.5, "in time")]


def test_what_is_due_at_the_same_time_runs_in_the_order_in_which_it_was_asked_for() -> None:
    loop, seen = VirtualLoop(Clock(hs.fleet.ideal(), Played().federation.population, Streams(0))), []
    for i in range(50):
        loop.call_at(2.0 if i % 2 else 1.0, seen.append, i)
    loop.call_at(3.0, loop.stop)
    loop.run_forever()
    loop.close()
    assert seen == [*range(0, 50, 2), *range(1, 50, 2)]


def test_time_goes_on_after_years() -> None:
    """Where a nanosecond is less than the last bit of a time."""
    played = Played(nodes=1)

    async def program(node: Node) -> None:
        await asyncio.sleep(1e9)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await node.receive()
        await asyncio.sleep(0.001)
        played.note(node)

    played.play(program, seconds=2e9)
    assert played.log == [(0, pytest.approx(1e9 + 1.001, abs=1e-6))]


def test_a_run_ends_when_its_seconds_are_over() -> None:
    played = Played(nodes=1)

    async def program(node: Node) -> None:
        while True:
            await asyncio.sleep(1)
            played.note(node)

    assert len(played.play(program, seconds=10.5).log) == 10
    assert played.clock.now == 10.5


def chatter(played: Played) -> Program:
    """Everybody sends to all at times of its own, and notes down what it hears."""

    async def program(node: Node) -> None:
        async def talk() -> None:
            for k in range(5):
                u = float(node.streams.uniform("pause", torch.tensor([node.id]), k))
                await asyncio.sleep(u)
                node.send(range(node.nodes), "word", n=torch.tensor(k))
                await node.train(one(), k)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(talk())
            while True:
                letter = await node.receive()
                played.note(node, letter.sender, letter.kind, int(letter.tensors["n"]))

    return program


@pytest.mark.parametrize("fleet", ["ideal", "devices(job='evenly(1.0, 0.2)', latency=0.1, up=0.01, loss=0.2, duplicates=0.2)"])
def test_a_run_repeats_in_every_detail(fleet: str) -> None:
    first, second, other = (Played(fleet, 5, seed=seed) for seed in (0, 0, 1))
    for played in (first, second, other):
        played.play(chatter(played))
    assert first.log and first.log == second.log != other.log
    assert first.batches == second.batches and torch.equal(first.traffic, second.traffic)


# ---- messages


def test_a_message_takes_the_time_of_its_links() -> None:
    """A link carries one message after the other; latencies of both ends add up."""
    size = wire_size({"model.x": one()})
    played = Played("devices(up=0.008, down=0.004, latency=0.5)")  # 1000 and 500 bytes a second

    async def program(node: Node) -> None:
        if node.id == 0:
            node.send([1, 2], "model", x=one())
        else:
            played.note(node, *(await node.receive())[:2])

    played.play(program)
    sent, received = size / 1000, size / 500
    assert played.log == [
        (1, pytest.approx(sent + 1 + received), 0, "model"),
        (2, pytest.approx(2 * sent + 1 + received), 0, "model"),
    ]


@pytest.mark.parametrize(("fault", "copies"), [("loss", 0), ("duplicates", 2)])
def test_messages_are_lost_or_come_twice(fault: str, copies: int) -> None:
    played = Played(f"devices({fault}=1)", 2)

    async def program(node: Node) -> None:
        if node.id == 0:
            for _ in range(3):
                node.send([0, 1], "word", n=torch.tensor(0))
        while True:
            played.note(node, (await node.receive()).sender)

    played.play(program)
    size = wire_size({"word.n": torch.tensor(0)})
    assert [entry[0] for entry in played.log].count(1) == 3 * copies
    assert [entry[0] for entry in played.log].count(0) == 3, "what a node sends to itself goes through no link"
    assert played.traffic.tolist() == [[3 * size, 0], [0, 3 * copies * size]]


def test_a_message_is_lost_at_either_end_as_often_as_it_should() -> None:
    played = Played("devices(loss=0.2)", 2)

    async def program(node: Node) -> None:
        for _ in range(400 if node.id == 0 else 0):
            node.send([1], "word", n=torch.tensor(0))
        while node.id == 1:
            played.note(node, (await node.receive()).sender)

    assert len(played.play(program).log) == pytest.approx(256, abs=3 * (400 * 0.64 * 0.36) ** 0.5)


def test_bytes_and_messages_add_up() -> None:
    played = Played("devices(latency=0.1)", 4)
    played.play(chatter(played))
    size, others = wire_size({"word.n": torch.tensor(0)}), 3
    assert played.programs.counts == {"word": [4 * 5 * others, 4 * 5 * others * size]}
    assert played.traffic.tolist() == [[5 * others * size, 5 * others * size]] * 4
    assert played.clock.up == int(played.traffic[:, 0].sum()) == int(played.traffic[:, 1].sum())


def test_messages_to_oneself_are_free_and_at_once() -> None:
    played = Played("devices(up=0.001, latency=5)", 2)

    async def program(node: Node) -> None:
        node.send([node.id], "model", x=one())
        played.note(node, (await node.receive()).sender)

    played.play(program)
    assert played.log == [(0, 0.0, 0), (1, 0.0, 1)]
    assert not played.traffic.any() and not played.programs.counts


def test_models_go_through_the_codec_and_the_rest_does_not() -> None:
    x, other = torch.linspace(-1, 1, 10, dtype=torch.float64), torch.linspace(-1, 1, 10, dtype=torch.float64)
    plain, played = Played(nodes=2), Played(nodes=2, codec="cast")
    heard: dict[str, Any] = {}

    def program(into: str) -> Program:
        async def live(node: Node) -> None:
            node.send([1 - node.id], "model", x=x, other=other)
            heard[into] = (await node.receive()).tensors

        return live

    plain.play(program("plain"))
    played.play(program("coded"))
    assert torch.equal(heard["plain"]["x"], x)
    assert torch.equal(heard["coded"]["x"], x.bfloat16().double()) and torch.equal(heard["coded"]["other"], other)
    assert played.programs.counts["model"][1] < plain.programs.counts["model"][1]


# ---- coming and going


def test_a_node_that_leaves_stops_and_loses_its_messages() -> None:
    played = Played("devices(latency=0.6, trace=leaves(share=1, at=3))", 2)

    async def program(node: Node) -> None:
        while True:
            await asyncio.sleep(1)
            node.send([1 - node.id], "word", n=torch.tensor(0))  # on its way for 1.2 seconds
            played.note(node)

    played.play(program, seconds=10)
    size = wire_size({"word.n": torch.tensor(0)})
    assert played.log == [(0, 1.0), (1, 1.0), (0, 2.0), (1, 2.0)]
    assert played.traffic[:, 0].tolist() == [2 * size] * 2
    assert int(played.traffic[0, 1]) == size, "what arrives after it has gone is lost"


def test_the_last_words_of_a_node_are_sent() -> None:
    played = Played("devices(trace=leaves(share=0.5, at=3))", 2)

    async def program(node: Node) -> None:
        try:
            while True:
                played.note(node, (await node.receive()).kind)
        finally:
            node.send([1 - node.id], "bye", n=torch.tensor(0))

    played.play(program, seconds=10)
    assert [entry[1:] for entry in played.log] == [(3.0, "bye")]
    assert played.programs.counts["bye"][0] == 1, "when the run is over nobody is heard any more"


def test_a_node_that_joins_starts_then_and_has_missed_what_was_said_before() -> None:
    played = Played("devices(trace=joins(share=1, at=3))", 2)

    async def program(node: Node) -> None:
        played.note(node)

    assert played.play(program).log == [(0, 3.0), (1, 3.0)]
    played = Played("devices(trace=joins(share=0.5, at=3))", 2)

    async def tell(node: Node) -> None:
        if node.now == 0:
            for k in range(6):
                await asyncio.sleep(0.9)
                node.send([1 - node.id], "word", n=torch.tensor(k))
        while True:
            played.note(node, int((await node.receive()).tensors["n"]))

    assert [entry[2] for entry in played.play(tell).log] == [3, 4, 5]


def test_a_node_that_is_back_has_its_notes_and_nothing_else() -> None:
    played = Played("devices(trace=crashes(every=10, lasts=10, slot=1))", 2)

    async def program(node: Node) -> None:
        times = int(node.notes.get("times", torch.tensor(0))) + 1
        node.notes["times"] = torch.tensor(times)
        played.note(node, times)
        await asyncio.sleep(1e6)

    played.play(program, seconds=200)
    for i in range(2):
        mine = [entry for entry in played.log if entry[0] == i]
        assert len(mine) > 2 and [entry[2] for entry in mine] == list(range(1, len(mine) + 1))
        assert [entry[1] for entry in mine] == sorted({entry[1] for entry in mine})


# ---- work


def test_training_takes_the_devices_time_and_is_executed_together() -> None:
    played = Played("devices(job='evenly(1.0, 3.0)')")

    async def program(node: Node) -> None:
        x = await node.train(one(), 7)
        played.note(node, float(x[0]))
        x = await node.train(x, 8)

    played.play(program)
    assert played.log == [(0, 1.0, 2.0), (1, 2.0, 3.0), (2, 3.0, 4.0)]
    assert played.batches[0] == [(0, 7), (1, 7), (2, 7)], "all that is under way when the first one is due"
    assert sorted(job for batch in played.batches for job in batch) == [(i, k) for i in range(3) for k in (7, 8)]


def test_training_that_is_cancelled_never_happens() -> None:
    played = Played("devices(job=2)", 2)

    async def program(node: Node) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await node.train(one(), 0)
        played.note(node, "stopped")
        await node.train(one(), 1)
        played.note(node, "trained")

    played.play(program)
    assert played.batches == [[(0, 1), (1, 1)]]
    assert played.log == [(0, 1.0, "stopped"), (1, 1.0, "stopped"), (0, 3.0, "trained"), (1, 3.0, "trained")]


def test_a_node_that_goes_away_does_not_finish_its_training() -> None:
    played = Played("devices(job=5, trace=leaves(share=1, at=3))", 2)

    async def program(node: Node) -> None:
        await node.train(one(), 0)
        played.note(node)

    assert played.play(program).log == [] and played.batches == []


class alone(hs.schedules.Peers):
    """Everybody trains three times on its own."""

    abstract = True

    async def live(self, node: Node) -> None:
        x = node.problem.start
        for k in range(3):
            x = await node.train(x, k)
            node.hold(x)


@pytest.mark.parametrize("path", ["stacked", "loop"])
def test_trainings_executed_together_equal_one_by_one(path: str) -> None:
    ends = []
    for job in ("0.5", "evenly(1.0, 9.7)"):  # all due together; never two
        fleet = hs.fleet.Fleet.parse(f"devices(job={job!r})")
        federation = hs.Federation(hs.tasks.digits(hidden=4), 4, hs.dirichlet(0.5), fleet, dtype="float64")
        arrangement = hs.engines.local(path=path, chunk=4, workers=1, threads=1)
        run = hs.run(federation, FedAvg(lr=0.1, steps=3), alone(), rounds=3, evaluate=0, engine=arrangement)
        ends.append(run.state["state.x"])
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-12)


class telling(hs.schedules.Peers):
    """Every node trains once and tells everybody."""

    abstract: ClassVar[bool] = True
    heard: ClassVar[dict[tuple[int, int], Tensor]] = {}

    async def live(self, node: Node) -> None:
        x = await node.train(node.problem.start, 0)
        node.send(range(node.nodes), "model", x=x)
        for _ in range(node.nodes):
            letter = await node.receive()
            self.heard[letter.sender, node.id] = letter.tensors["x"]
        node.hold(x)


def test_a_liar_goes_on_with_what_is_true_and_tells_the_others_something_else() -> None:
    federation = hs.Federation(hs.tasks.digits(hidden=4), 4, dtype="float64")
    arrangement, start = hs.engines.local(path="loop", chunk=4, workers=1, threads=1), federation.problem.start
    telling.heard.clear()
    attack = hs.attacks.Attack.parse("sign_flip(share=0.25)")
    run = hs.run(federation, FedAvg(lr=0.1, steps=3), telling(), rounds=1, evaluate=0, engine=arrangement, attack=attack)
    own, liar = run.state["state.x"], int(run.clients["liars"].nonzero())
    assert len(telling.heard) == 16
    for (sender, receiver), x in telling.heard.items():
        true = own[sender] if sender != liar or receiver == liar else start - (own[liar] - start)
        torch.testing.assert_close(x, true, rtol=0, atol=1e-12)


def test_what_a_node_gives_up_leaves_it_as_it_was_whoever_finishes_meanwhile() -> None:
    """Two nodes give up work of nine seconds; a third one, done before or after, changes nothing about that."""
    for job in (1.0, 9.0):
        played = Played(f"devices(job=listed(({job}, 9.0, 9.0)))")

        async def program(node: Node) -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(None if node.id == 0 else 1.5):
                    await node.train(torch.zeros(10, dtype=torch.float64), 0)

        played.play(program)
        assert played.finished == [0]


def test_a_node_does_one_thing_after_the_other() -> None:
    played, done = Played("devices(job=1.0)"), []

    async def program(node: Node) -> None:
        async def once(k: int) -> None:
            x = await node.train(torch.full((10,), float(k), dtype=torch.float64), k)
            done.append((node.id, k, node.now, float(x[0])))

        await asyncio.gather(once(0), once(10))

    played.play(program)
    assert [(k, now, x) for i, k, now, x in done if i == 0] == [(0, 1.0, 1.0), (10, 2.0, 11.0)]


def test_what_is_sent_is_what_it_was_then() -> None:
    played, got = Played("devices(latency=1.0)"), []

    async def program(node: Node) -> None:
        x = torch.ones(3)
        node.send([1], "model", x=x)
        x.zero_()
        if node.id == 1:
            got.append((await node.receive()).tensors["x"].tolist())

    played.play(program)
    assert got == [[1.0, 1.0, 1.0]]


# ---- rounds, and the end


def test_the_first_model_of_each_round_counts_and_the_last_round_ends_the_run() -> None:
    played = Played()
    played.rounds = 2

    async def program(node: Node) -> None:
        for k in (1, 1, 2, 1, 3):
            await asyncio.sleep(1)
            node.publish(torch.tensor([node.id, k]), k)

    played.play(program)
    assert [x.tolist() for x in played.committed] == [[0, 1], [0, 2]]
    assert played.clock.now == 3.0


def test_where_nobody_publishes_a_round_is_a_model_of_every_node() -> None:
    played = Played(nodes=2)
    played.rounds = 2

    async def program(node: Node) -> None:
        while True:
            await asyncio.sleep(1 + node.id)
            node.hold(one() * node.now)

    played.play(program)
    assert [x[:, 0].tolist() for x in played.committed] == [[1.0, 2.0], [3.0, 2.0]]


def test_when_all_wait_for_each_other_the_run_has_stalled() -> None:
    played = Played()

    async def program(node: Node) -> None:
        await node.receive()

    with pytest.raises(StalledError, match="nobody will send"):
        played.play(program, seconds=math.inf)


def test_peers_that_go_on_for_ever_without_a_round_have_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "FRUITLESS", 100)
    played = Played(nodes=1)

    async def program(node: Node) -> None:
        for k in range(1000):
            await asyncio.sleep(1)
            if k < 500 and k % 50 == 0:
                node.publish(one(), k + 1)

    with pytest.raises(StalledError, match="without a round"):
        played.play(program, seconds=math.inf)
    assert len(played.committed) == 10 and 551 <= played.clock.now <= 553


def test_the_exception_of_a_program_ends_the_run() -> None:
    played = Played()

    async def fail(node: Node) -> None:
        await asyncio.sleep(2)
        if node.id == 1:
            raise DivergedError("it went wrong")

    async def program(node: Node) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail(node))
            await node.receive()

    with pytest.raises(DivergedError, match="it went wrong"):
        played.play(program)
    assert played.clock.now == 2.0


def test_programs_run_inside_a_loop_that_is_running() -> None:
    played = Played(nodes=1)

    async def program(node: Node) -> None:
        await asyncio.sleep(5)
        played.note(node)

    async def notebook() -> None:
        played.play(program)

    asyncio.run(notebook())
    assert played.log == [(0, 5.0)]


def test_a_trace_of_rounds_is_refused() -> None:
    with pytest.raises(ConfigError, match="slots of seconds"):
        Played("ideal(trace=bernoulli(0.5))")
