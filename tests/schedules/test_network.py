"""How a conversation begins: a rule that opens has every client work before round 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import hanse as hs
from hanse.core.context import Context
from hanse.core.messages import Reply, Upload
from hanse.engines.simulation import Simulation
from hanse.methods.base import State
from hanse.track.run import Record

ENGINE = hs.engines.local("stacked", 4, 1, 1)
SCHEDULES = [
    "synchronous(cohort=3)",
    "synchronous(cohort=3, deadline=9.0)",
    "cyclic(cohort=3)",
    "fedbuff(buffer=2)",
    "fedfix(window=2.0)",
]


class Opening(hs.methods.FedAvg):
    """FedAvg that first asks for everybody's gradient."""

    abstract: ClassVar[bool] = True
    opens: ClassVar[bool] = True
    keeps: ClassVar[tuple[str, ...]] = ("first",)

    def init(self, problem: Any) -> State:
        state = super().init(problem)
        return {**state, "g": torch.zeros_like(state["x"]), "opened": torch.zeros(1)}

    def open(self, ctx: Context) -> Upload:
        g = ctx.large_gradient(ctx.start.expand(len(ctx.ids), -1))
        ctx.state["first"] = g
        return ctx.upload(self.weigh(ctx), gradient=g)

    def opened(self, state: State, reply: Reply) -> State:
        return {**state, "g": reply.mean("gradient"), "opened": state["opened"] + 1}


@pytest.fixture(scope="module")
def federation() -> hs.Federation:
    fleet = hs.fleet.devices(job="evenly(1.0, 0.3)", latency=0.125)
    return hs.Federation(hs.tasks.digits(hidden=4), 8, hs.dirichlet(0.5), fleet, dtype="float64")


class Last:
    """Holds the network, and stops it after a round."""

    net: Simulation

    def __init__(self, after: int = 0) -> None:
        self.after = after

    def start(self, net: Simulation) -> None:
        self.net = net

    def write(self, record: Record) -> None:
        self.net.stopping |= record["round"] == self.after

    def close(self) -> None:
        pass


def go(federation: hs.Federation, schedule: str, last: Last, rule: hs.methods.Method, **options: Any) -> hs.Run:
    how = {"rounds": 4, "engine": ENGINE, "evaluate": 0, "writers": [last], "on_start": last.start, **options}
    return hs.run(federation, rule, hs.schedules.Schedule.parse(schedule), **how)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_client_opens_once_before_round_0(federation: hs.Federation, schedule: str) -> None:
    last = Last()
    run = go(federation, schedule, last, Opening())
    problem, train = federation.problem, federation.split.train
    x = problem.start.clone().requires_grad_()
    output = problem.output(x, problem.start_buffers, train.x)
    (expected,) = torch.autograd.grad(problem.loss(output, train.y).mean(), x)  # weighted by samples: that of all together
    assert last.net.state["opened"] == 1
    torch.testing.assert_close(last.net.state["g"], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        last.net.kept.read(torch.arange(8))["first"].T @ train.counts().double() / len(train.x), expected, rtol=1e-10, atol=1e-12
    )
    assert [record["round"] for record in run.history] == [1, 2, 3, 4]
    assert len(run.history[0]["cohort"]) <= 8  # those of round 0 alone


@pytest.mark.parametrize("schedule", ["synchronous(cohort=3)", "cyclic(cohort=3)"])
def test_an_opening_takes_its_time_and_its_bytes(federation: hs.Federation, schedule: str) -> None:
    """The slowest client needs 1 s and two latencies; a gradient is as large as a displacement."""
    with_, without = (go(federation, schedule, Last(), rule).history[0] for rule in (Opening(), hs.methods.FedAvg()))
    assert with_["seconds"] - without["seconds"] == pytest.approx(1.25, abs=1e-9)
    cohort, per_client = 3, without["bytes_down"] // 3
    assert with_["bytes_down"] == (8 + cohort) * per_client
    names = len("gradient") - len("delta")
    assert 0 <= with_["bytes_up"] - without["bytes_up"] * (8 + cohort) // cohort <= 8 * 8 * (names > 0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rounds_after_it_are_those_without_it(federation: hs.Federation, schedule: str) -> None:
    """The opening has a key of its own in every client's chance, but cohorts and models of the rule follow the same formulas."""
    runs = [go(federation, schedule, Last(), rule) for rule in (Opening(), hs.methods.FedAvg())]
    assert [len(r["cohort"]) for r in runs[0].history] == [len(r["cohort"]) for r in runs[1].history]


def test_a_resumed_run_does_not_open_again(federation: hs.Federation, tmp_path: Path) -> None:
    schedule, whole, half, rest = "fedbuff(buffer=2)", Last(), Last(after=2), Last()
    expected = go(federation, schedule, whole, Opening())
    go(federation, schedule, half, Opening(), out=tmp_path)
    found = go(federation, schedule, rest, Opening(), out=tmp_path, resume=True)
    assert rest.net.state["opened"] == 1 and found.history == expected.history
    assert all(torch.equal(found.weights[n], t) for n, t in expected.weights.items())


def test_rules_that_do_not_open_say_so() -> None:
    with pytest.raises(TypeError, match="FedAvg does not define open"):
        hs.methods.FedAvg().open(None)  # type: ignore[arg-type]
    assert not hs.methods.FedAvg().opens
