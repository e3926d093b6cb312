"""AFA-CD and AFA-CS against their formulas, with every worker's last contribution held in one place, and FedAvg."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

import hanse as hs
from hanse.core.optim import exponential, sgd
from hanse.core.wire import wire_size
from hanse.fleet.clock import Jobs
from hanse.methods import AFA_CD, AFA_CS, MIFA, FedAvg
from hanse.schedules import anarchic, fedbuff

BOTH = pytest.mark.parametrize("rule", [AFA_CD, AFA_CS])


def close(a, b, atol):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@dataclass
class Watcher:
    """After every step the model, the server's and the workers' memory; and the jobs that it was made of, in order of arrival."""

    jobs: list[Jobs] = field(default_factory=list)
    states: list[dict[str, torch.Tensor]] = field(default_factory=list)
    kept: list[dict[str, torch.Tensor]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    net: Any = None

    def start(self, net):
        self.net, collect = net, net.collect

        def listening(jobs, *args):
            self.jobs.append(jobs)
            return collect(jobs, *args)

        net.collect = listening

    def write(self, record):
        self.records.append(record)
        self.states.append(self.net.state)
        self.kept.append(self.net.kept.read(torch.arange(self.net.clients)) if self.net.kept.widths else {})

    def close(self):
        pass


def watch(federation, rule, schedule, rounds):
    path = "vmap" if isinstance(federation.task, hs.tasks.quadratics) else "stacked"
    engine, seen = hs.engines.local(path=path, chunk=federation.clients, workers=1, threads=1, shortcuts=False), Watcher()
    hs.run(federation, rule, schedule, rounds=rounds, evaluate=0, engine=engine, writers=[seen], on_start=seen.start)
    return seen


def bowls_on(fleet):
    """Ten quadratics, one a worker, on a fleet."""
    return hs.Federation(hs.tasks.quadratics(), clients=10, partition=hs.natural(), fleet=fleet, dtype="float64")


# ---- the formulas


@BOTH
def test_every_step_is_the_algorithm_written_out(bowls, rule):
    """The paper's form from the recorded arrivals: gradients are averaged, the server holds all A_i and keeps the newest.

    Rates fall with the version a worker started from, workers differ in speed, some contribute twice to a step.
    """
    fleet = hs.fleet.devices(step="evenly(0.1, 0.5)")
    rule = rule(lr=exponential(0.1, 0.97), server_lr=0.3)
    seen = watch(bowls_on(fleet), rule, anarchic(m=4, steps=(1, 5), pause="evenly(0.0, 1.0)"), 25)
    models, memory = [torch.zeros_like(bowls.best)], torch.zeros_like(bowls.b)
    for jobs, state in zip(seen.jobs, seen.states, strict=True):
        arrived = []
        for i, version, steps in zip(jobs["client"], jobs["version"], jobs["steps"], strict=True):
            y, gradients = models[version], []
            for _ in range(steps):
                gradients.append(bowls.a[i] * (y - bowls.b[i]))
                y = y - rule.lr.at(int(version)) * gradients[-1]
            arrived.append(torch.stack(gradients).mean(0))
            memory[i] = arrived[-1]
        mean = memory.mean(0) if isinstance(rule, AFA_CS) else torch.stack(arrived).mean(0)
        models.append(models[-1] - 0.3 * mean)
        close(state["x"], models[-1], 1e-12)
    assert any(len(jobs) > len(set(jobs["client"].tolist())) for jobs in seen.jobs)
    assert {*range(1, 6)} == {k for jobs in seen.jobs for k in jobs["steps"].tolist()}


@BOTH
@pytest.mark.parametrize("local", [sgd(), sgd(momentum=0.9)], ids=str)
def test_a_contribution_is_the_displacement_per_step_and_with_plain_sgd_the_mean_gradient(digits, follow, listen, rule, local):
    """For every K_i: the clients' numbers of samples give them different ones."""
    seen = []

    class Overheard(rule):
        abstract: ClassVar[bool] = True

        def gradient(self, ctx):
            gradients, end = listen(ctx), ctx.steps[:, None]
            g = super().gradient(ctx)
            total = torch.zeros_like(g)
            for heard in gradients:
                total[: len(heard)] += heard
            seen.append((g, total / end, ctx.steps))
            return g

    follow(digits, Overheard(lr=0.3, batch=16, local=local), 2)
    for g, mean, steps in seen:
        assert len(steps.unique()) > 3
        assert torch.allclose(g, mean, rtol=0, atol=1e-10) is local.plain


@BOTH
def test_steps_that_hardly_move_count_alike_however_many(bowls, rule):
    """Sending displacements instead would move the model by K_i times as much for those who work longer."""
    steps = [
        watch(bowls_on(hs.fleet.ideal()), rule(lr=1e-9), anarchic(m=10, steps=(k, k)), 1).states[0]["x"] for k in (1, 20)
    ]  # fmt: skip
    close(*steps, 1e-7)
    close(steps[0], -0.1 * bowls.grad(torch.zeros_like(bowls.best)).mean(0), 1e-7)


# ---- everyone, and nobody but one


@BOTH
@pytest.mark.parametrize("weights", ["uniform", "samples"])
def test_everyone_with_the_same_steps_is_fedavg(digits, follow, rule, weights):
    """eta = lr K; under rounds with a barrier and, where no job takes any time, under its own schedule."""
    ours, avg = rule(lr=0.3, server_lr=0.3 * 5, steps=5, weights=weights), FedAvg(lr=0.3, steps=5, weights=weights)
    expected = follow(digits, avg, 3)
    for one, other in zip(follow(digits, ours, 3), expected, strict=True):
        close(one.x, other.x, 1e-10)
    for state, other in zip(watch(digits, ours, anarchic(m=6, steps=(5, 5)), 3).states, expected, strict=True):
        close(state["x"], other.x, 1e-10)


def test_with_rounds_and_equal_steps_afa_cs_is_mifa(quadratics, follow):
    """For three of ten clients a round, MIFA's displacements being lr K times our gradients."""
    ours, mifa = AFA_CS(lr=0.1, steps=4, server_lr=0.7 * 0.1 * 4), MIFA(lr=0.1, steps=4, server_lr=0.7, weights="uniform")
    close(follow(quadratics, ours, 10, cohort=3)[-1].x, follow(quadratics, mifa, 10, cohort=3)[-1].x, 1e-10)


def test_with_a_single_worker_ever_there_afa_cs_moves_by_one_nth(bowls):
    """Everyone else's A_i is 0."""
    alone = hs.fleet.ideal(trace=hs.fleet.bernoulli(hs.fleet.listed((0, 0, 0, 1, 0, 0, 0, 0, 0, 0))))
    seen, x = watch(bowls_on(alone), AFA_CS(lr=0.1, server_lr=0.5), anarchic(m=1, steps=(1, 1)), 4), torch.zeros_like(bowls.best)
    for state in seen.states:
        x = x - 0.5 / 10 * bowls.a[3] * (x - bowls.b[3])
        close(state["x"], x, 1e-12)


# ---- the books


@pytest.mark.parametrize("weights", ["uniform", "samples"])
@pytest.mark.parametrize(
    "schedule",
    [anarchic(m=3, steps=(1, 4), pause=0.5), anarchic(m=2, oldest=1, patience=9), fedbuff(buffer=2, patience=9)],
    ids=str,
)
def test_the_server_holds_the_mean_of_the_newest_contributions(schedule, weights):
    """After every step, whoever was lost, came twice to a step, or was too old to count; in single precision."""
    fleet = hs.fleet.devices(step="evenly(0.1, 0.4)", loss=0.1)
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=6, partition=hs.dirichlet(0.5), fleet=fleet)
    n = federation.split.train.counts().float() if weights == "samples" else torch.ones(6)
    seen = watch(federation, AFA_CS(steps=2, weights=weights), schedule, 15)
    for state, kept in zip(seen.states, seen.kept, strict=True):
        close(state["gradient"], n @ kept["a"] / n.sum(), 1e-6)
    assert bool(seen.kept[-1]["a"].any(1).all())


@BOTH
def test_a_job_costs_a_model_down_and_a_vector_up(rule):
    """Bytes of a job: P numbers down; up as many, a weight and a loss. K_i is not sent."""
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=6, fleet=hs.fleet.devices(step="evenly(0.1, 0.4)"))
    seen = watch(federation, rule(), anarchic(m=2, steps=(1, 4)), 8)
    x, one = federation.problem.start, torch.zeros(1)
    up = wire_size({{AFA_CD: "gradient", AFA_CS: "change"}[rule]: x, "weight": one, "loss": one})
    assert 0 <= up - 4 * (len(x) + 2) < 256  # the header
    clock, record = seen.net.clock, seen.records[-1]
    assert record["bytes_up"] == up * seen.net.updates
    assert record["bytes_down"] == wire_size({"x": x}) * (seen.net.updates + len(clock.out))


# ---- where they end


@pytest.mark.parametrize(
    "schedule",
    [hs.schedules.synchronous(cohort=3), fedbuff(buffer=2), anarchic(m=2, steps=(1, 1), pause="evenly(3, 0)")],
    ids=str,
)
def test_with_one_step_afa_cs_reaches_the_optimum_under_any_schedule_and_afa_cd_does_not(bowls, schedule):
    """Single full-batch steps, so nothing but the unequal participation is in the way; AFA-CD stops or wanders beside it."""
    federation = bowls_on(hs.fleet.devices(step="evenly(1.0, 0.2)"))
    ends = [watch(federation, r(lr=0.1, server_lr=0.1, steps=1), schedule, 120).states[-1]["x"] for r in (AFA_CS, AFA_CD)]
    assert bowls.distance(ends[0]) < 0.03
    assert bowls.distance(ends[1]) > 0.4


@BOTH
def test_a_batch_of_clients_equals_one_client_at_a_time(digits, follow, rule):
    """Unequal clients side by side or alone, by two ways to compute gradients: the same to 1e-10."""
    reference = follow(digits, rule(lr=0.2, batch=16), 2, cohort=4)
    for how in ({"chunk": 1}, {"chunk": 2}, {"chunk": 1, "path": "loop"}):
        for one, other in zip(follow(digits, rule(lr=0.2, batch=16), 2, cohort=4, **how), reference, strict=True):
            close(one.x, other.x, 1e-10)
            assert all(torch.allclose(one.kept[n], other.kept[n], rtol=0, atol=1e-10) for n in other.kept)
