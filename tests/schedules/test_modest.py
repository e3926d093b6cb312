"""Rounds of federated averaging without a server: MoDeST."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import hanse as hs
from hanse.core.errors import ConfigError, StalledError
from hanse.core.wire import wire_size
from hanse.engines import programs
from hanse.engines.simulation import Simulation
from hanse.fleet.clock import SECOND
from hanse.methods import FedAdam, FedAvg
from hanse.schedules import modest, synchronous
from hanse.schedules.membership import JOIN, LEAVE, View
from hanse.schedules.modest import Member
from hanse.schedules.peers import Letter, Node

N = 12
RULE = FedAvg(lr=0.2, steps=3, batch=16, weights="uniform")
PLAIN = "devices(job='evenly(1.0, 0.5)', latency=0.01)"
MODELS = ("train", "restart", "aggregate")


class Ears:
    """A node, and everything that it sends, draws in and publishes, with the time of it."""

    def __init__(self, node: Node, said: list[Any], published: list[Any]) -> None:
        self.node, self.said, self.published = node, said, published

    def __getattr__(self, name: str) -> Any:
        return getattr(self.node, name)

    def send(self, to: Iterable[int], kind: str, **tensors: Tensor) -> None:
        to = list(to)
        self.said += [(self.node.now, self.node.id, j, kind, tensors) for j in to]
        self.node.send(to, kind, **tensors)

    def publish(self, x: Tensor, round: int) -> None:
        self.published.append((self.node.now, self.node.id, round))
        self.node.publish(x, round)


class heard(modest):
    """MoDeST, all of whose nodes can be listened to."""

    abstract: ClassVar[bool] = True
    said: ClassVar[list[Any]] = []
    published: ClassVar[list[Any]] = []
    members: ClassVar[dict[int, Member]] = {}

    async def live(self, node: Node) -> None:
        async with asyncio.TaskGroup() as tasks:
            member = Member(self, Ears(node, self.said, self.published), tasks)  # type: ignore[arg-type]
            self.members[node.id] = member
            await member.live()


class Played:
    """A run of MoDeST: its models, and all that was said."""

    def __init__(self, fleet: str = "ideal", rounds: int = 5, seconds: float | None = None, clients: int = N, **how: Any) -> None:
        for memory in (heard.said, heard.published, heard.members):
            memory.clear()
        self.schedule = heard(**{"sample": 4, **how})
        self.federation = hs.Federation(
            hs.tasks.digits(hidden=4), clients, hs.dirichlet(0.5), hs.fleet.Fleet.parse(fleet), dtype="float64"
        )
        self.engine = hs.engines.local(path="loop", chunk=1, workers=1, threads=1, shortcuts=False)
        self.models: list[Tensor] = []
        self.net: Any = None
        self.run = hs.run(
            self.federation,
            RULE,
            self.schedule,
            rounds=rounds,
            seconds=seconds,
            evaluate=0,
            engine=self.engine,
            writers=[self],
            on_start=self.start_,
        )
        self.said, self.published, self.members = [*heard.said], [*heard.published], dict(heard.members)

    def start_(self, net: Simulation) -> None:
        self.net = net

    def write(self, record: Any) -> None:
        self.models.append(self.net.state["x"].clone())

    def close(self) -> None:
        pass

    def sent(self, *kinds: str) -> list[tuple[float, int, int, Any]]:
        """When, from whom, to whom, and what, of some kinds of messages."""
        return [(now, i, j, tensors) for now, i, j, kind, tensors in self.said if kind in kinds]

    def away(self, time: float) -> set[int]:
        """Who is not there."""
        online = self.federation.fleet.trace.online(self.federation.population, torch.arange(self.federation.clients), time, 0)
        return {int(i) for i in (~online).nonzero()}

    def network(self) -> Simulation:
        """Another one on the same federation."""
        return Simulation(self.federation, RULE, self.engine, hs.codecs.identity(), seed=0, rounds=100)


def order(k: int, clients: int = N) -> list[int]:
    """Everybody, as round ``k`` asks them while nobody is gone."""
    return View.everyone(clients).order(k, 0, 10**6)


# ---- exact: federated averaging


@pytest.mark.parametrize("fleet", ["ideal", PLAIN, "devices(step='evenly(0.1, 3.0)', up=1, latency=0.3)"])
def test_with_everybody_there_it_is_federated_averaging_of_models_bit_for_bit(fleet: str) -> None:
    played = Played(fleet)
    net = played.network()
    x = played.federation.problem.start
    for t, model in enumerate(played.models):
        ids = torch.tensor(sorted(order(t + 1)[:4]))
        x = torch.stack([one.x for one in net._trained(ids, x.repeat(4, 1), torch.full((4,), t))]).mean(0)
        net.round += 1
        assert torch.equal(model, x)
    assert len(played.models) == 5


def test_it_equals_synchronous_fedavg_with_the_same_clients() -> None:
    played = Played()
    models: list[Tensor] = []

    class Look:
        def write(self, record: Any) -> None:
            models.append(self.net.state["x"].clone())

        def close(self) -> None:
            pass

        def start(self, net: Simulation) -> None:
            self.net = net
            net.sample = lambda k: torch.tensor(sorted(order(net.round + 1)[:k]))  # type: ignore[method-assign]

    look = Look()
    hs.run(
        played.federation,
        RULE,
        synchronous(cohort=4),
        rounds=5,
        evaluate=0,
        engine=played.engine,
        writers=[look],
        on_start=look.start,
    )
    torch.testing.assert_close(torch.stack(played.models), torch.stack(models), rtol=0, atol=1e-10)


def test_several_aggregators_of_the_same_models_change_nothing() -> None:
    assert all(torch.equal(a, b) for a, b in zip(Played(PLAIN).models, Played(PLAIN, aggregators=3).models, strict=True))


def test_a_run_repeats_bit_for_bit() -> None:
    fleet = "devices(step='exponential(0.2)', latency=0.1, loss=0.02, trace=crashes(every=60, lasts=20, slot=5))"
    one, two = (Played(fleet, aggregators=2, success=0.5, patience=20, dead=60) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.models, two.models, strict=True))
    assert one.run.notes["messages"] == two.run.notes["messages"]
    assert [record["seconds"] for record in one.run.history] == [record["seconds"] for record in two.run.history]


# ---- messages


@pytest.mark.parametrize("a", [1, 2])
def test_models_and_control_messages_are_counted_apart(a: int) -> None:
    s, rounds = 4, 9
    played = Played(PLAIN, rounds=rounds, aggregators=a)
    aggregated, trained = Counter[int](), Counter[int]()
    for _, i, j, tensors in played.sent("aggregate"):
        aggregated[int(tensors["round"])] += i != j
    for _, i, j, tensors in played.sent("train"):
        trained[int(tensors["round"])] += i != j
    for k in range(2, rounds + 1):  # the last round is over with its first average
        itself = len({*order(k)[:a]} & {*order(k - 1)[:s]})
        assert aggregated[k] == a * s - itself
        assert trained[k] == a * s - a
        assert aggregated[k] + trained[k] <= 2 * a * s
    x, view = played.federation.problem.start, View.everyone(N).rows
    letters = played.net.letters
    for kind, sent in (("aggregate", aggregated), ("train", trained)):
        size = wire_size({f"{kind}.x": x, f"{kind}.round": torch.tensor(0), f"{kind}.view": view})
        assert letters[kind] == [sum(sent.values()), sum(sent.values()) * size]
        assert size < x.numel() * 8 + view.numel() * 8 + 256
    assert letters.keys() == {"aggregate", "train", "ping", "pong", "ack"}
    assert letters["ping"] == letters["pong"]
    assert letters["ping"][0] <= N * s + rounds * (s * a + s * a)
    assert sum(size for _, size in letters.values()) == int(played.run.clients["sent"].sum())
    assert f"{letters['train'][0]} train ({letters['train'][1]:,} bytes)" in played.run.notes["messages"]


def test_views_travel_as_rows_of_four() -> None:
    views = [tensors["view"] for *_, tensors in Played().sent("train", "aggregate")]
    assert views and all(view.shape == (N, 4) and view.dtype == torch.int64 for view in views)


def test_a_ping_is_repeated_every_second_until_the_node_is_passed_over() -> None:
    played = Played("devices(job=1, trace=joins(share=0.3, at=1e6))", rounds=1, ping_timeout=3.5)
    gone = played.away(0.0)
    pings = {j: [now for now, i, to, _ in played.sent("ping") if i == 8 and to == j and now < 5] for j in range(N)}
    silent = [pings[j] for j in order(1)[:4] if j in gone]
    assert silent and all(times == [0, 1, 2, 3] for times in silent)
    assert all(len(pings[j]) == 1 for j in order(1)[:4] if j not in gone | {8})
    assert min(pings[j][0] for j in order(1)[4:] if pings[j]) == 3.5, "then the next one is asked"


# ---- who is sampled


def test_the_first_who_answer_are_the_sample() -> None:
    played = Played("devices(job=1, latency=0.1, trace=joins(share=0.4, at=1e6))", rounds=4)
    gone = played.away(0.0)
    for k in range(2, 5):
        there = [j for j in order(k) if j not in gone]
        assert {i for _, i, _, tensors in played.sent("train") if int(tensors["round"]) == k} == {there[0]}
        assert {j for _, _, j, tensors in played.sent("train") if int(tensors["round"]) == k} == {*there[:4]}


def test_who_is_silent_for_too_long_is_asked_no_more() -> None:
    played = Played("devices(job=1, latency=0.1, trace=leaves(share=0.5, at=5))", rounds=40, inactive=10, success=0.5, dead=400)
    gone, last = played.away(6.0), played.run.history[-1]["seconds"]
    pinged = [now for now, _, j, _ in played.sent("ping") if j in gone]
    rounds = {record["round"]: record["seconds"] for record in played.run.history}
    heard_last = max(r for r, seconds in rounds.items() if seconds <= 6)
    assert max(pinged) <= rounds[heard_last + 13] < last
    assert min(now for now in pinged if now > 6) < rounds[heard_last + 8], "but so long they are"


def test_who_says_that_it_leaves_is_asked_no_more_once_all_have_heard() -> None:
    fleet = "devices(job=1, latency=0.1, trace=leaves(share=0.5, at=5))"
    told, silent = (Played(fleet, rounds=20, success=0.5, announced=announced) for announced in (True, False))
    gone = told.away(6.0)
    assert {i for now, i, _, _ in told.sent("leave") if now < told.net.now} == gone and not silent.sent("leave")
    assert len([now for now, _, j, _ in told.sent("ping") if j in gone and now > 6]) == 0  # 10 s is everybody
    assert any(j in gone and now > 6 for now, _, j, _ in silent.sent("ping"))
    for member in (told.members[i] for i in range(N) if i not in gone):
        assert all(member.view.of(j)[2] == LEAVE for j in gone)


@pytest.mark.parametrize("fleet", [PLAIN, "devices(job=1, latency=0.2, trace=crashes(every=30, lasts=15, slot=5))"])
def test_counters_never_decrease(fleet: str) -> None:
    played = Played(fleet, rounds=12, success=0.5, patience=20, dead=60, announced=True)
    counters: dict[int, int] = {}
    for _, i, _, kind, tensors in played.said:
        if "state" in tensors:
            assert int(tensors["state"][1]) >= counters.get(i, 1), kind
            counters[i] = int(tensors["state"][1])
    assert (max(counters.values()) > 2) is ("crashes" in fleet)


def test_a_node_that_comes_later_says_so_and_is_sampled_from_then_on() -> None:
    played = Played("devices(job=1, latency=0.1, trace=joins(share=0.5, at=300))", rounds=50, inactive=12, success=0.5)
    late = played.away(0.0)
    joined = {i: int(tensors["state"][1]) for _, i, _, tensors in played.sent("join")}
    assert joined == dict.fromkeys(late, 2)
    assert all(played.members[i].view.of(j)[1:] == (2, JOIN) for i in set(range(N)) - late for j in late)
    early, after = ({i for now, i, _, _ in played.sent("aggregate") if (now > 300) is later} & late for later in (False, True))
    assert not early and len(after) >= 4
    before = [j for now, _, j, _ in played.sent("ping") if 250 < now < 300]
    assert not {*before} & late, "until then nobody asks for them any more"


def member(**how: Any) -> Member:
    """Node 0 of five, whose tasks never run and who talks to a wall."""
    sent: list[Any] = []

    class Wall:
        id, nodes, now, notes = 0, 5, 0.0, {}
        problem = hs.Federation(hs.tasks.quadratics(count=1), 1, hs.natural()).problem
        said = sent

        def send(self, to: Iterable[int], kind: str, **tensors: Tensor) -> None:
            sent.extend((j, kind, tensors) for j in to)

        def publish(self, x: Tensor, round: int) -> None:
            sent.append((None, "published", x, round))

    class Tasks:
        def create_task(self, work: Any) -> Any:
            work.close()
            return asyncio.Future(loop=asyncio.new_event_loop())

    return Member(modest(**{"sample": 4, **how}), Wall(), Tasks())  # type: ignore[arg-type]


def letter(sender: int, kind: str, k: int, value: float = 0.0, view: View | None = None) -> Letter:
    rows = (View.everyone(5) if view is None else view).rows
    return Letter(sender, kind, {"x": torch.full((10,), value), "round": torch.tensor(k), "view": rows})


def test_a_join_counts_after_the_next_transfer_and_a_leave_at_once() -> None:
    me = member()
    me.on_join(Letter(7, "join", {"state": torch.tensor([3, 2])}))
    assert me.view.of(7) is None
    me.transfer([1], "train", 1, torch.zeros(10))
    assert me.view.of(7) == (3, 2, 0)
    assert me.node.said[-1][2]["view"].shape == (5, 4)  # type: ignore[attr-defined]
    me.on_leave(Letter(7, "leave", {"state": torch.tensor([3, 3])}))
    assert me.view.of(7) == (3, 3, LEAVE)


def test_a_node_that_hears_it_has_left_counts_on() -> None:
    me = member()
    me.on_train(letter(1, "train", 1, view=View.entry(0, 5, 3, LEAVE)))
    assert me.counter == 4 and me.view.of(0) == (5, 4, 0)


# ---- averaging


def test_the_first_model_of_a_sender_wins_and_an_aggregator_averages_once() -> None:
    me = member(success=0.5)
    for sender, value in ((1, 1.0), (1, 5.0), (2, 2.0)):
        me.on_aggregate(letter(sender, "aggregate", 3, value))
    (_, _, x, round), *_ = [said for said in me.node.said if said[1] == "published"]  # type: ignore[attr-defined]
    assert round == 2 and x.tolist() == [1.5] * 10
    me.on_aggregate(letter(3, "aggregate", 3, 9.0))
    assert 3 not in me.open and len([said for said in me.node.said if said[1] == "published"]) == 1  # type: ignore[attr-defined]
    to, kind, tensors = me.node.said[-1]  # type: ignore[attr-defined]
    assert (to, kind, tensors["ack"].tolist()) == (3, "ack", [2, 1]), "who comes late need not try again"


@pytest.mark.parametrize("models", [1, 2, 3])
def test_when_the_timer_fires_there_have_to_be_enough_for_liveness(models: int) -> None:
    me = member(liveness=0.5, patience=1e-9, dead=1)
    for sender in range(models):
        me.on_aggregate(letter(sender, "aggregate", 3))
    asyncio.run(me.expire(3, me.open[3]))
    published = [said for said in me.node.said if said[1] == "published"]  # type: ignore[attr-defined]
    assert len(published) == (models >= 2) and 3 not in me.open


def test_a_participant_takes_the_first_model_of_a_round_and_a_later_round_interrupts() -> None:
    me = member()
    me.on_train(letter(1, "train", 4))
    first = me.training
    me.on_train(letter(2, "train", 4))
    me.on_train(letter(2, "train", 3))
    assert me.training is first and me.k_train == 4 and first is not None and not first.cancelled()
    me.on_train(letter(2, "train", 5))
    assert me.k_train == 5 and first.cancelled() and me.training is not first
    assert me.estimate == 5


@pytest.mark.parametrize(("s", "sf", "enough"), [(8, 1.0, 8), (8, 0.6, 4), (100, 0.29, 29), (3, 0.1, 1)])
def test_how_many_models_are_enough(s: int, sf: float, enough: int) -> None:
    assert modest(sample=s, success=sf).enough == enough
    assert (modest(sample=8).least, modest(sample=30, liveness=0.1).least, modest(sample=1, liveness=0.01).least) == (4, 3, 1)


def test_an_aggregator_never_averages_fewer_unless_its_timer_fired(monkeypatch: pytest.MonkeyPatch) -> None:
    averaged: list[tuple[int, float]] = []
    opened: dict[tuple[int, int], float] = {}
    hear, average = Member.on_aggregate, Member.average

    def on_aggregate(self: Member, letter: Letter) -> None:
        opened.setdefault((self.id, int(letter.tensors["round"])), self.node.now)
        hear(self, letter)

    def averaging(self: Member, k: int) -> None:
        averaged.append((len(self.open[k]), self.node.now - opened.pop((self.id, k))))
        average(self, k)

    monkeypatch.setattr(Member, "on_aggregate", on_aggregate)
    monkeypatch.setattr(Member, "average", averaging)
    Played(
        "devices(step='exponential(1.0)', latency=0.1, loss=0.15)",
        rounds=10,
        sample=6,
        success=0.7,
        liveness=0.3,
        aggregators=2,
        patience=15,
        dead=90,
    )
    full, timed = [n for n, _ in averaged if n >= 4], [(n, age) for n, age in averaged if n < 4]
    assert full and max(full) == 4, "as soon as floor(sf s) are there"
    assert timed and all(n >= 2 and age >= 15 - 1 / SECOND for n, age in timed)


# ---- when things go wrong


def test_training_goes_on_when_most_have_crashed() -> None:
    played = Played("devices(job=1, latency=0.1, trace=leaves(share=0.5, at=20))", rounds=30, success=0.5, aggregators=2)
    assert played.run.history[-1]["round"] == 30 and played.run.history[-1]["seconds"] > 20
    assert not {i for now, i, _, _ in played.sent("train", "aggregate") if now > 21} & played.away(21.0)


def test_without_its_aggregator_a_model_goes_to_the_next() -> None:
    """Alone, the aggregator goes away in the middle of a round: nobody answers, and the trainers sample again."""
    played = Played("devices(job=4, latency=0.1, trace=leaves(share=0.5, at=40))", rounds=20, success=0.5, dead=5000)
    again = Counter((i, int(tensors["round"])) for _, i, _, tensors in played.sent("aggregate"))
    assert played.run.history[-1]["round"] == 20 and not played.sent("restart")
    assert max(again.values()) <= 2


def test_an_aggregator_that_says_it_leaves_is_believed() -> None:
    me = member()
    me.on_ack(Letter(3, "ack", {"ack": torch.tensor([1, 0])}))
    assert me.view.of(3) == (0, 1, LEAVE)
    me.on_train(letter(3, "train", 1, view=View.entry(3, 0, 2)))
    assert me.view.of(3) == (1, 2, 0), "until it is back"


def test_a_dead_run_starts_again_from_the_freshest_model() -> None:
    """All but a few go away while they train: too few models are left to average, so nothing happens until T_dead is over."""
    played = Played("devices(job=3, latency=0.1, trace=leaves(share=0.6, at=20))", rounds=15, dead=1000)
    restarts = played.sent("restart")
    assert restarts and played.run.history[-1]["round"] == 15
    now, first, _, tensors = restarts[0]
    last = max(record["seconds"] for record in played.run.history if record["seconds"] < now)
    assert now >= last + 1000
    gone, k = played.away(21.0), int(tensors["round"])
    before = [(int(t["round"]), i, j) for at, i, j, t in played.sent("train") if at < now]
    trained = {j: max([r for r, _, to in before if to == j] + [r - 1 for r, i, _ in before if i == j], default=0) for j in range(N)}
    survivors = {j: r for j, r in trained.items() if j not in gone}
    assert survivors[first] >= max(survivors.values()) - 1 and k > max(survivors.values())


def test_a_run_whose_nodes_cannot_make_a_round_ends_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "FRUITLESS", 2000)
    with pytest.raises(StalledError, match="without a round"):
        Played("devices(job=1, latency=0.1, trace=leaves(share=0.9, at=20))", rounds=50)


def test_it_ends_by_virtual_time_too() -> None:
    played = Played(PLAIN, rounds=10**6, seconds=30.0)
    assert 10 < len(played.models) < 60 and played.net.now == pytest.approx(30.0)


# ---- settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modest(sample=4, aggregators=5)", r"modest\.aggregators: 5 is not allowed: at most the sample, 4"),
        ("modest(dead=100)", r"modest\.dead: 100 is not allowed: longer than patience, 300"),
        ("modest(success=0)", "success"),
    ],
)
def test_settings_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hs.schedules.Schedule.parse(text)


def test_a_sample_of_more_than_everybody_and_a_rule_with_a_server_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"modest\.sample: 13 is not allowed: at most the number of clients, 12"):
        Played(sample=13)
    federation = hs.Federation(hs.tasks.digits(hidden=4), N)
    with pytest.raises(ConfigError, match="not allowed with modest: it has a server"):
        hs.run(federation, FedAdam(), modest(sample=4), rounds=1)
