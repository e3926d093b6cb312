"""A message of which each client gets a part of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save
from small_networks import at_once, network, same, traffic
from small_runs import stop_after
from torch import Tensor

import hanse as hs
from hanse.codecs import Codec, Sending
from hanse.codecs.wire import FRAME
from hanse.core.context import Context
from hanse.core.errors import ConfigError
from hanse.core.messages import Upload
from hanse.core.problem import Problem
from hanse.engines.estimate import estimate
from hanse.methods import RFFL, FedAvg
from hanse.methods.base import State

SHARES = torch.tensor([1, 0.5, 0, 0.013, 1e-9, 0.9, 0.25, 1, 0.7, 0.04, 0.3, 0.6], dtype=torch.float64)
"""What part each of twelve clients gets."""


class Handed(FedAvg):
    """Everybody sends back what it got."""

    abstract: ClassVar[bool] = True
    down: ClassVar[Codec | None] = Codec.parse("layers | topk(rounding='up') | shortest(coders=(positions, bitmap))")

    def parts(self, state: State, clients: Tensor) -> Tensor:
        return SHARES[clients]

    def train(self, ctx: Context) -> Upload:
        return ctx.upload(self.weigh(ctx), rows={"got": ctx.start.expand(len(ctx.ids), -1).clone()})

    def step(self, state: State, reply: Any, round: int) -> State:
        return state


def largest(x: Tensor, problem: Problem, share: float) -> Tensor:
    """``x`` ``[P]`` without all but the ceil(share n) entries of largest magnitude of each layer."""
    kept = torch.zeros_like(x)
    for entry in problem.shared_layout.entries:
        here = slice(entry.start, entry.start + entry.size)
        count = int(torch.tensor(share * entry.size - 1e-9).ceil().clamp(min=0))
        chosen = x[here].abs().argsort(descending=True)[:count]
        kept[here][chosen] = x[here][chosen]
    return kept


def size(problem: Problem, share: float) -> int:
    """Bytes of a message with that part of one vector: places as addresses or as a bitmap, whichever is less, and values."""
    total = FRAME.size
    for n in problem.shared_layout.sizes:
        m = int(torch.tensor(share * n - 1e-9).ceil().clamp(min=0))
        counted = 1 if m + 1 < 128 else 2
        total += counted + 1 + min(-(-m * (n - 1).bit_length() // 8), -(-n // 8)) + m * problem.start.element_size()
    return len(save({"x": torch.zeros(total, dtype=torch.uint8)}))


@pytest.mark.parametrize("fleet", ["ideal", "devices(job='evenly(1, 0.2)', down=1)"])
@pytest.mark.parametrize(("chunk", "workers"), [(12, 1), (5, 1), (1, 2)])
def test_everyone_gets_its_part_and_pays_for_that(fleet: str, chunk: int, workers: int) -> None:
    """Both where nothing takes time and with a fleet, however the work is cut."""
    federation = hs.Federation(hs.tasks.digits(8), 12, fleet=hs.fleet.Fleet.parse(fleet), dtype="float64")
    net = network(federation, Handed(), chunk=chunk, workers=workers)
    x = torch.randn(net.problem.shared, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net.begin({"x": x})
    who = torch.tensor([0, 1, 2, 3, 4, 6, 7, 11])
    reply = at_once(net.ask(who, "train", {"x": x}, SHARES[who]))
    for client, got in zip(reply.clients.tolist(), reply.rows["got"], strict=True):
        assert torch.equal(got, largest(x, net.problem, float(SHARES[client]))), client
    assert traffic(net)[0] == sum(size(net.problem, share) for share in SHARES[who].tolist())


def test_a_part_is_what_the_codec_writes_for_one_client(ragged: hs.Federation) -> None:
    net = network(ragged, Handed())
    x, layout = torch.randn(net.problem.shared, dtype=torch.float64), net.problem.shared_layout
    net.begin({"x": x})
    for client in range(12):
        reply = at_once(net.ask(torch.tensor([client]), "train", {"x": x}, SHARES[client : client + 1]))
        data = net.down.encode(x, Sending(layout, torch.tensor([0]), SHARES[client : client + 1]))
        assert torch.equal(net.down.decode(data, layout), reply.rows["got"][0])


def test_a_smaller_part_is_there_sooner() -> None:
    federation = hs.Federation(hs.tasks.digits(8), 12, fleet=hs.fleet.Fleet.parse("devices(down=1)"))
    run = hs.run(federation, Handed(), hs.schedules.synchronous(12), rounds=1)
    for client, _, sent, received, *_ in run.history[0]["jobs"]:
        assert received - sent == pytest.approx(size(federation.problem, float(SHARES[client])) * 8 / 1e6, abs=2e-9)


@pytest.mark.parametrize("fleet", ["ideal", "devices(down=1)"])
def test_a_round_in_which_nobody_is_asked(fleet: str) -> None:
    federation = hs.Federation(hs.tasks.digits(8), 12, fleet=hs.fleet.Fleet.parse(fleet))
    net = network(federation, Handed())
    x = net.problem.start
    net.begin({"x": x})
    nobody = torch.zeros(0, dtype=torch.long)
    assert len(at_once(net.ask(nobody, "train", {"x": x}, SHARES[nobody]))) == 0
    assert traffic(net) == (0, 0)


@pytest.mark.parametrize("schedule", ["synchronous(5)", "synchronous(5, over=0.4)", "synchronous(5, deadline=2.5)"])
def test_a_resumed_run_is_identical(tmp_path: Path, schedule: str) -> None:
    fleet = hs.fleet.devices(job="exponential(1)", down=1, loss=0.1)
    federation = hs.Federation(hs.tasks.digits(8), 8, hs.dirichlet(0.5), fleet)
    how: dict[str, Any] = {"rounds": 6, "engine": hs.engines.local(path="stacked", chunk=3, workers=1, threads=1)}
    rule, when = RFFL(lr=0.1, epochs=1, warmup=2), hs.schedules.Schedule.parse(schedule)
    whole = hs.run(federation, rule, when, **how)

    hs.run(federation, rule, when, **how, out=tmp_path, on_start=stop_after(3))
    resumed = hs.resume(tmp_path, federation)
    assert same(whole.state, resumed.state)
    assert [r["bytes_down"] for r in whole.history] == [r["bytes_down"] for r in resumed.history]


def test_estimates_count_parts(even: hs.Federation) -> None:
    """Round 0's, as nobody has worked yet."""
    cost = estimate(network(even, Handed()), hs.schedules.synchronous(12))
    assert cost.down == 100 * sum(size(even.problem, share) for share in SHARES.tolist())


@pytest.mark.parametrize("schedule", ["fedbuff(2, cohort=4)", "cyclic(4)", "fedasync"])
def test_schedules_that_hand_out_no_parts_are_refused(even: hs.Federation, schedule: str) -> None:
    with pytest.raises(ConfigError, match=r"down: .* is not allowed here: only synchronous sends each client its part"):
        hs.run(even, Handed(), hs.schedules.Schedule.parse(schedule), rounds=1)


def test_a_rule_that_writes_its_own_messages_takes_no_other_codec(even: hs.Federation) -> None:
    with pytest.raises(ConfigError, match=r"down: cast is not allowed with Handed: its messages are written by layers \| topk"):
        hs.run(even, Handed(), rounds=1, down=hs.codecs.cast())
    assert len(hs.run(even, Handed(), rounds=1, down=Handed.down).history) == 1
