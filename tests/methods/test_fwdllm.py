"""FwdLLM: forward gradients, and steps that wait until their variance is small."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import pytest
import torch
from small_runs import Seen
from torch import Tensor

import hanse as hs
from hanse.core.errors import ConfigError, DivergedError
from hanse.core.wire import wire_size
from hanse.methods import FwdLLM

RULE = FwdLLM(threshold=math.inf, steps=3, batch=4, lr=0.05)


def federation(hidden: int = 4) -> hs.Federation:
    return hs.Federation(hs.tasks.digits(hidden=hidden), clients=6, partition=hs.dirichlet(0.5), dtype="float64")


def played(rule: FwdLLM, rounds: int = 2, fed: hs.Federation | None = None, chunk: int = 3) -> tuple[hs.Run, Seen]:
    seen = Seen()
    engine = hs.engines.local(chunk=chunk, workers=1)
    schedule = hs.schedules.synchronous(cohort=4)
    fed = fed or federation()
    run = hs.run(fed, rule, schedule, rounds=rounds, engine=engine, writers=[seen], on_start=seen.start)
    return run, seen


@pytest.mark.parametrize("h", [1e-3, 0.5])
def test_on_quadratics_u_is_the_gradient_along_v_for_any_probe(quadratics: hs.Federation, bowls: Any, h: float) -> None:
    rule = RULE.model_copy(update={"h": h, "steps": 2, "batch": 1})
    _, seen = played(rule, rounds=1, fed=quadratics)
    (reply,), start = seen.replies, quadratics.problem.start
    expected = torch.zeros_like(start)
    for client in reply.clients.tolist():
        a, b = quadratics.split.train.of(client)[0][0]
        g, drawn = a * (start - b), rule.directions(quadratics.problem.layout, client, 0, torch.zeros_like(start))
        for _ in range(2):
            v = next(drawn).to(start)
            expected += (g @ v) * v
    torch.testing.assert_close(reply.sums["u"], expected, rtol=0, atol=1e-6)
    assert float(reply.sums["count"]) == 8
    torch.testing.assert_close(seen.models[0], start - 0.05 * expected / 8, rtol=0, atol=1e-9)


@pytest.mark.parametrize("candidates", [1, 5])
def test_scalars_and_gradients_come_to_the_same_model(candidates: int) -> None:
    rule = RULE.model_copy(update={"candidates": candidates})
    one, other = played(rule, 3)[1], played(rule.model_copy(update={"send": "scalars"}), 3)[1]
    torch.testing.assert_close(one.models[-1], other.models[-1], rtol=0, atol=1e-9)


def test_scalars_are_as_few_for_any_model() -> None:
    rule, x = RULE.model_copy(update={"send": "scalars"}), torch.zeros(1, dtype=torch.float64)
    up = {"weight": x, "loss": x, "factors": x.expand(3), "key": torch.zeros(1, dtype=torch.int64)}
    for hidden in (2, 9):
        assert played(rule, 1, federation(hidden))[0].history[0]["bytes_up"] == 4 * wire_size(up)


def test_a_step_waits_and_what_came_is_kept() -> None:
    timid = RULE.model_copy(update={"threshold": 1e-12, "most": 10**6})
    run, seen = played(timid, 3)
    assert all(torch.equal(model, federation().problem.start) for model in seen.models)
    assert run.state["state.counts"].tolist() == [24.0, 12.0]
    said = [reply.sums["u"] for reply in seen.replies]
    torch.testing.assert_close(run.state["state.sums"], torch.stack([said[0] + said[2], said[1]]))


def test_a_step_is_taken_at_last() -> None:
    _, ready = played(RULE, 1)
    first = RULE.model_copy(update={"threshold": 1e-12, "most": 2})
    before = {**first.init(federation().problem), "first": torch.tensor([12.0], dtype=torch.float64)}
    once = first.step(before, ready.replies[0], 0)
    twice = first.step(once, ready.replies[0], 1)
    assert torch.equal(once["x"], before["x"]) and not torch.equal(twice["x"], before["x"])
    assert not twice["counts"].any() and not twice["sums"].any()
    torch.testing.assert_close(twice["g"], ready.replies[0].sums["u"] / 12)


def test_the_variance_is_that_of_its_formula() -> None:
    """E[var] = 2 (P + 1) / P |g|^2 / n on a fixed batch."""
    P, n, draws = 50, 20, 4000
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(P, generator=generator, dtype=torch.float64)
    v = torch.randn(draws, 2, n // 2, P, generator=generator, dtype=torch.float64)
    sums = ((v @ g)[..., None] * v).sum(2)
    found = [RULE.variance(one, torch.full((2,), n / 2, dtype=torch.float64)) for one in sums]
    assert sum(found) / draws == pytest.approx(2 * (P + 1) / P * float(g @ g) / n, rel=0.05)
    assert RULE.variance(sums[0], torch.tensor([3.0, 0.0])) == math.inf


def test_candidates_are_nearer_to_the_last_step() -> None:
    fed = federation()
    g = torch.randn(fed.problem.layout.size, generator=torch.Generator().manual_seed(0))

    def cosine(candidates: int) -> float:
        drawn = RULE.model_copy(update={"candidates": candidates}).directions(fed.problem.layout, 0, 0, g)
        return sum(float(torch.cosine_similarity(next(drawn), g, dim=0).abs()) for _ in range(20)) / 20

    assert cosine(10) > 1.5 * cosine(1)


def test_nothing_is_ever_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> NoReturn:
        raise AssertionError("back-propagation")

    for where, name in ((torch.autograd, "grad"), (torch.autograd, "backward"), (Tensor, "backward"), (torch.func, "grad")):
        monkeypatch.setattr(where, name, forbidden)
    seen = Seen()
    engine = hs.engines.local(path="loop", chunk=2, workers=1)
    with torch.inference_mode():
        fed = federation()
        hs.run(fed, RULE, hs.schedules.synchronous(cohort=4), rounds=2, engine=engine, writers=[seen], on_start=seen.start)
    assert not torch.equal(seen.models[0], seen.models[1])


def test_losses_that_are_not_finite_are_no_perturbations() -> None:
    """One number of the model is infinite, and so no loss is a number."""
    fed = federation()
    fed.problem.start[0] = math.inf
    for send in ("gradients", "scalars"):
        rule = RULE.model_copy(update={"send": send})
        seen, schedule = Seen(), hs.schedules.synchronous(cohort=4)
        with pytest.raises(DivergedError, match="the test loss after round 1 is nan"):
            hs.run(fed, rule, schedule, rounds=1, engine=hs.engines.local(workers=1), on_start=seen.start)
        assert rule._told(rule.init(fed.problem), seen.replies[0])[1] == 0


def test_schedules_may_ask_for_more_steps_where_only_sums_travel() -> None:
    schedule = hs.schedules.fedcompass(q_min=4, q_max=6)
    run = hs.run(federation(), RULE, schedule, rounds=2)
    assert len(run.history) == 2
    with pytest.raises(ConfigError, match="local steps are not allowed with FwdLLM: at most 3"):
        hs.run(federation(), RULE.model_copy(update={"send": "scalars"}), schedule, rounds=2)


def test_what_would_be_ignored_is_refused() -> None:
    for field, value in (("clip", 1.0), ("local", "adamw")):
        with pytest.raises(ConfigError, match=field):
            FwdLLM(**{field: value})
