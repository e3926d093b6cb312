"""MoDeST: rounds of federated averaging without a server. Every node can tell from a hash who trains in a round and who averages.

De Vos, Dhasade, Kermarrec, Lavoie, Pouwelse: "MoDeST: Bridging the Gap between Federated and Decentralized Learning with
Decentralized Sampling", 2023, arXiv 2302.13837 (later "Plexus").

    SAMPLE(k, x):        walk ORDER(k), the hash order of who is believed to be there: ping x at a time, for each that is silent
                         the next;  the first x that answer
    on TRAIN(k, x):      k is later than k_train: stop training;  x_i <- what the rule makes of x
                         send AGGREGATE(k + 1, x_i) to SAMPLE(k + 1, a), wait for ACK(k), without one do both again
    on AGGREGATE(k + 1, x_j):   floor(sf s) models are in, or T_agg seconds are over and enough for liveness:
                         x <- their plain average;  send TRAIN(k + 1, x) to SAMPLE(k + 1, s), then ACK(k) to who contributed
    PING, PONG           say how far somebody is, and that it is there
    JOIN, LEAVE          to 10 s nodes drawn at random; a JOIN counts after the receiver's next transfer, a LEAVE at once

Models travel with the sender's view (``membership``). A round ends with its first average, which is the model that is evaluated.

Our choices: the models are averaged in the order of their nodes' numbers. No ACK within 2 T_agg: sample again, so that pings tell
whether the aggregator is gone, until there is an ACK or a round k + 2. A late model gets its ACK at once. A node that hears it has
left although it is there counts on and thereby joins again. For round 1 everybody samples, and those in it train. A node that has
heard of no new round for T_dead seconds, and dt more for every round that its own model is behind, samples for the next round; if
nobody who answers knows more, it sends RESTART, a TRAIN with its own model.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from hanse.core.errors import ConfigError
from hanse.core.messages import Tensors
from hanse.methods.base import Method
from hanse.schedules.membership import JOIN, LEAVE, View
from hanse.schedules.network import Network
from hanse.schedules.peers import Letter, Node, Peers

Share = Annotated[float, Field(gt=0, le=1)]


class modest(Peers):
    """Rounds of federated averaging without a server: nodes sample each other."""

    sample: PositiveInt = 10
    """Nodes that train in a round, s."""
    aggregators: PositiveInt = 1
    """Nodes that average a round, a: the first of the next round's sample."""
    success: Share = 1.0
    """Share of the sample whose models are enough to average, sf."""
    ping_timeout: PositiveFloat = 5.0
    """Seconds without an answer, to a ping every second, after which a node is passed over, dt."""
    inactive: PositiveInt = 50
    """Rounds after which a node that nobody has heard of is asked no more; should be several times N / s, dk."""
    patience: PositiveFloat = 300.0
    """Seconds from the first model after which an aggregator averages those it has, T_agg."""
    liveness: Share = 0.4
    """Share of the sample whose models are enough then; with fewer they are dropped."""
    dead: PositiveFloat = 1200.0
    """Seconds without a new round after which a node restarts from its own model, T_dead."""
    announced: bool = False
    """Whether nodes that go away say so before; otherwise they are just gone."""

    @model_validator(mode="after")
    def _possible(self) -> modest:
        if self.aggregators > self.sample:
            raise ValueError(f"modest.aggregators: {self.aggregators} is not allowed: at most the sample, {self.sample}")
        if self.dead <= self.patience:
            raise ValueError(f"modest.dead: {self.dead:g} is not allowed: longer than patience, {self.patience:g}")
        return self

    @property
    def enough(self) -> int:
        """Models that are averaged at once, floor(sf s)."""
        return max(1, math.floor(self.success * self.sample + 1e-9))  # 0.29 * 100 is less than 29

    @property
    def least(self) -> int:
        """Models that are averaged after ``patience``."""
        return math.ceil(self.liveness * self.sample - 1e-9)

    async def run(self, net: Network, method: Method) -> None:
        if self.sample > net.clients:
            raise ConfigError(f"modest.sample: {self.sample} is not allowed: at most the number of clients, {net.clients}")
        await super().run(net, method)

    async def live(self, node: Node) -> None:
        async with asyncio.TaskGroup() as tasks:
            await Member(self, node, tasks).live()


class Member:
    """One node of MoDeST, from when it comes until it goes away. ``k_train`` is the latest round it has trained for."""

    def __init__(self, rules: modest, node: Node, tasks: asyncio.TaskGroup) -> None:
        start = {
            "view": View.everyone(node.nodes).rows,
            "counter": torch.tensor(1),
            "k_train": torch.tensor(0),
            "x": node.problem.start[: node.problem.shared],
            "round": torch.tensor(0),
        }
        self.fresh = node.now == 0
        notes = {**start, **node.notes}
        self.rules, self.node, self.tasks, self.id = rules, node, tasks, node.id
        self.view, self.counter, self.k_train = View(notes["view"]), int(notes["counter"]), int(notes["k_train"])
        self.x, self.round = notes["x"], int(notes["round"])
        self.pending = View.everyone(0)
        self.training: asyncio.Task[None] | None = None
        self.ack: asyncio.Future[bool] | None = None
        self.open: dict[int, dict[int, Tensor]] = {}
        self.finished: set[int] = set()
        self.pongs: dict[int, asyncio.Event] = {}
        self.heard = float(notes.get("heard", torch.tensor(node.now, dtype=torch.float64)))

    @property
    def estimate(self) -> int:
        """ROUND: how far the others are."""
        return max(self.k_train, self.view.latest, *self.open)

    async def live(self) -> None:
        """Everything that happens to this node."""
        on = {
            "train": self.on_train,
            "restart": self.on_train,
            "aggregate": self.on_aggregate,
            "ack": self.on_ack,
            "ping": self.on_ping,
            "pong": self.on_pong,
            "join": self.on_join,
            "leave": self.on_leave,
        }
        if self.fresh:
            self.tasks.create_task(self.begin())
        else:
            self.join()
        self.tasks.create_task(self.watch())
        try:
            while True:
                letter = await self.node.receive()
                before = self.estimate
                on[letter.kind](letter)
                if self.estimate > before:
                    self.heard = self.node.now
        finally:
            if self.rules.announced:
                self.leave()
            self.node.notes |= {  # as if it had been written down with every change
                "view": self.view.rows,
                "counter": torch.tensor(self.counter),
                "k_train": torch.tensor(self.k_train),
                "x": self.x,
                "round": torch.tensor(self.round),
                "heard": torch.tensor(self.heard, dtype=torch.float64),
            }

    # ---- the sample

    async def sample(self, k: int, x: int) -> list[int]:
        """SAMPLE: the first ``x`` of round ``k`` that answer, in the round's order; fewer if there are no more."""
        order = self.view.order(k, self.id, self.rules.inactive)
        ahead = iter(order)

        async def find() -> int | None:
            for j in ahead:  # all who look take from the same list
                if await self.answers(j):
                    return j
            return None

        found = set(await asyncio.gather(*(find() for _ in range(x))))
        return [j for j in order if j in found]

    async def answers(self, j: int) -> bool:
        """Whether node ``j`` is there."""
        if j == self.id:
            return True
        pong = self.pongs.setdefault(j, asyncio.Event())
        for second in range(math.ceil(self.rules.ping_timeout)):
            self.node.send([j], "ping", **self.state)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(1.0, self.rules.ping_timeout - second)):
                    return await pong.wait()
        return False

    @property
    def state(self) -> Tensors:
        return {"state": torch.tensor([self.estimate, self.counter])}

    def on_ping(self, letter: Letter) -> None:
        self.meet(letter)
        self.node.send([letter.sender], "pong", **self.state)

    def on_pong(self, letter: Letter) -> None:
        self.meet(letter)
        if letter.sender in self.pongs:
            self.pongs.pop(letter.sender).set()

    def meet(self, letter: Letter) -> None:
        """The sender is there."""
        round, counter = letter.tensors["state"].tolist()
        self.view = self.view.merge(View.entry(letter.sender, max(self.estimate, round), counter))

    # ---- models

    def transfer(self, to: list[int], kind: str, k: int, x: Tensor) -> None:
        """Send a model for the sample of round ``k``; who has joined in the meantime counts from now on."""
        self.node.send(to, kind, x=x, round=torch.tensor(k), view=self.view.rows)
        self.view, self.pending = self.view.merge(self.pending), View.everyone(0)

    def hear(self, letter: Letter) -> tuple[int, Tensor]:
        """Round and model of a letter, whose view is merged."""
        k = int(letter.tensors["round"])
        self.view = self.view.merge(View(letter.tensors["view"]))
        self.view = self.view.merge(View.entry(letter.sender, max(k, self.estimate), 0))
        self.deny()
        return k, letter.tensors["x"]

    def deny(self) -> None:
        """A node that others believe has left counts on."""
        _, counter, event = self.view.of(self.id) or (0, 0, JOIN)
        if event == LEAVE and counter >= self.counter:
            self.counter = counter + 1
            self.view = self.view.merge(View.entry(self.id, 0, self.counter))

    def keep(self, x: Tensor, round: int) -> None:
        """This node's last model, from which it would restart."""
        if round >= self.round:
            self.x, self.round = x, round

    def on_train(self, letter: Letter) -> None:
        k, x = self.hear(letter)
        if k > self.k_train:
            if self.training is not None:
                self.training.cancel()
            self.k_train, self.training = k, None
        if k == self.k_train and self.training is None:
            self.training = self.tasks.create_task(self.train(k, x))

    async def train(self, k: int, x: Tensor) -> None:
        self.keep(x, k - 1)
        x = await self.node.train(x, k - 1)
        self.keep(x, k)
        while True:
            aggregators = await self.sample(k + 1, self.rules.aggregators)
            self.ack = asyncio.get_running_loop().create_future()
            self.transfer(aggregators, "aggregate", k + 1, x)
            try:
                async with asyncio.timeout(2 * self.rules.patience):
                    done = await self.ack
            except TimeoutError:
                done = False
            if done or self.estimate > k + 1:
                break

    def on_aggregate(self, letter: Letter) -> None:
        k, x = self.hear(letter)
        if k in self.finished:
            self.acknowledge([letter.sender], k, ok=True)
            return
        if k not in self.open:
            self.open[k] = {}
            self.tasks.create_task(self.expire(k, self.open[k]))
        self.open[k].setdefault(letter.sender, x)
        if len(self.open[k]) >= self.rules.enough:
            self.average(k)

    async def expire(self, k: int, models: dict[int, Tensor]) -> None:
        await asyncio.sleep(self.rules.patience)
        if self.open.get(k) is models:
            if len(models) >= self.rules.least:
                self.average(k)
            else:
                del self.open[k]

    def average(self, k: int) -> None:
        """The models for round ``k`` become one."""
        models = self.open.pop(k)
        self.finished.add(k)
        x = torch.stack([models[j] for j in sorted(models)]).mean(0)
        self.keep(x, k - 1)
        self.node.publish(x, k - 1)
        self.tasks.create_task(self.distribute(k, x, list(models)))

    async def distribute(self, k: int, x: Tensor, contributors: list[int]) -> None:
        self.transfer(await self.sample(k, self.rules.sample), "train", k, x)
        self.acknowledge(contributors, k, ok=True)

    def acknowledge(self, contributors: list[int], k: int, ok: bool) -> None:
        self.node.send(contributors, "ack", ack=torch.tensor([k - 1, int(ok)]))

    def on_ack(self, letter: Letter) -> None:
        k, ok = letter.tensors["ack"].tolist()
        if not ok:
            _, counter, _ = self.view.of(letter.sender) or (0, 0, JOIN)
            self.view = self.view.merge(View.entry(letter.sender, 0, counter, LEAVE))
        if k == self.k_train and self.ack is not None and not self.ack.done():
            self.ack.set_result(bool(ok))

    # ---- coming, going, and starting again

    async def begin(self) -> None:
        if self.id in await self.sample(1, self.rules.sample) and self.training is None:
            self.k_train = 1
            self.training = self.tasks.create_task(self.train(1, self.x))

    def join(self) -> None:
        self.counter += 1
        self.tell("join", JOIN, self.view.known)

    def leave(self) -> None:
        self.counter += 1
        self.tell("leave", LEAVE, self.view.present(self.estimate, self.rules.inactive))
        for k, models in self.open.items():
            self.acknowledge(list(models), k, ok=False)

    def tell(self, kind: str, event: int, whom: list[int]) -> None:
        others = [j for j in whom if j != self.id]
        n = min(10 * self.rules.sample, len(others))
        drawn = self.node.streams.sample("modest.tell", max(1, len(others)), n, self.counter, self.id)
        self.node.send([others[int(i)] for i in drawn], kind, **self.state)
        self.view = self.view.merge(View.entry(self.id, 0, self.counter, event))

    def on_join(self, letter: Letter) -> None:
        round, counter = letter.tensors["state"].tolist()
        self.pending = self.pending.merge(View.entry(letter.sender, max(self.estimate, round), counter))

    def on_leave(self, letter: Letter) -> None:
        round, counter = letter.tensors["state"].tolist()
        self.view = self.view.merge(View.entry(letter.sender, round, counter, LEAVE))

    async def watch(self) -> None:
        """Start again where nothing goes on any more."""
        while True:
            k = self.estimate
            due = self.heard + self.rules.dead + self.rules.ping_timeout * (k - self.round)
            if due > self.node.now:
                await asyncio.sleep(due - self.node.now)
                continue
            sample = await self.sample(k + 1, self.rules.sample)
            if self.estimate == k:
                self.transfer(sample, "restart", k + 1, self.x)
            self.heard = self.node.now
