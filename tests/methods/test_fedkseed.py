"""FedKSeed: the model that is rebuilt from scalars is the average of the clients' models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small_runs import Seen
from torch import Tensor

import hanse as hs
from hanse.core.errors import ConfigError
from hanse.core.losses import cross_entropy
from hanse.core.streams import Streams
from hanse.core.wire import wire_size
from hanse.methods import FedKSeed

RULE = FedKSeed(seeds=16, eps=1e-3, lr=0.01, steps=5, batch=4)
CLIENTS = 6


def federation(hidden: int = 4, **how: object) -> hs.Federation:
    return hs.Federation(hs.tasks.digits(hidden=hidden), clients=CLIENTS, partition=hs.dirichlet(0.5), dtype="float64", **how)


def played(rule: FedKSeed, rounds: int = 2, cohort: int = 4, hidden: int = 4, chunk: int = 3) -> tuple[hs.Run, Seen]:
    seen = Seen()
    engine = hs.engines.local(path="stacked", chunk=chunk, workers=1)
    schedule = hs.schedules.synchronous(cohort=cohort)
    run = hs.run(federation(hidden), rule, schedule, rounds=rounds, engine=engine, writers=[seen], on_start=seen.start)
    return run, seen


def z(fed: hs.Federation, seed: int) -> Tensor:
    rng = Streams(0).numpy("kseed", seed)
    return torch.cat(
        [torch.from_numpy(rng.standard_normal(e.shape, np.float32)).flatten() for e in fed.problem.layout.entries]
    ).double()


def test_the_rebuilt_model_is_the_average_of_the_clients_models() -> None:
    """Every client's steps written out, by plain probes of the loss on the batches that its stream gives it."""
    fed, (_, seen) = federation(), played(RULE)
    start = fed.problem.start
    assert [len(reply) for reply in seen.replies] == [4, 4]
    for round, reply in enumerate(seen.replies):
        ends = []
        for client, weight in zip(reply.clients.tolist(), reply.weight.tolist(), strict=True):
            w, me = start.clone(), torch.tensor([client])
            drawn = (fed.streams.uniform("kseed", me, round, 5)[0] * 16).long().tolist()
            batches = RULE.plan().batches(fed.split.train, me, fed.streams, torch.tensor([round]), torch.tensor([5]))
            for j, (_, batch) in zip(drawn, batches, strict=True):
                above, below = (
                    cross_entropy(
                        fed.problem.output(w + side * 1e-3 * z(fed, j), fed.problem.start_buffers, batch.x[0]), batch.y[0]
                    ).mean()
                    for side in (1, -1)
                )
                w = w - 0.01 * (above - below) / 2e-3 * z(fed, j)
            ends.append(weight * w)
        start = sum(ends, torch.zeros_like(start)) / reply.weight.sum()
        torch.testing.assert_close(seen.models[round], start, rtol=0, atol=1e-7)  # a is float32
        start = seen.models[round]


def test_the_server_needs_nothing_but_the_scalars() -> None:
    run, seen = played(RULE, rounds=4)
    assert torch.equal(RULE.rebuilt(federation().problem, run.state["state.a"]), seen.models[-1])
    updates = torch.stack([b - a for a, b in zip([federation().problem.start, *seen.models], seen.models, strict=False)])
    assert torch.linalg.matrix_rank(torch.stack([z(federation(), j) for j in range(16)])) == 16
    span = torch.stack([z(federation(), j) for j in range(16)])
    inside = torch.linalg.lstsq(span.T, updates.T).solution.T @ span
    torch.testing.assert_close(inside, updates, rtol=0, atol=1e-6)


@pytest.mark.parametrize("importance", [False, True])
def test_what_travels_is_as_long_for_any_model(importance: bool) -> None:
    rule = RULE.model_copy(update={"importance": importance})
    down = {name: torch.zeros(16) for name in ("a", "p")[: 1 + importance]}
    one = torch.zeros(1, dtype=torch.float64)
    up = {"weight": one, "loss": one, "seeds": torch.zeros(5, dtype=torch.int16), "g": one.expand(5)}
    for hidden in (2, 20):
        run, _ = played(rule, rounds=1, hidden=hidden)
        assert run.history[0]["bytes_down"] == 4 * wire_size(down)
        assert run.history[0]["bytes_up"] == 4 * wire_size(up)


def test_the_papers_settings_stay_below_18_kilobytes() -> None:
    paper, one = FedKSeed(), torch.zeros(1)
    up = {"weight": one, "loss": one, "seeds": torch.zeros(paper.steps, dtype=torch.int16), "g": torch.zeros(paper.steps)}
    assert wire_size({"a": torch.zeros(paper.seeds)}) + wire_size(up) < 18_000


def test_batched_clients_equal_clients_one_by_one() -> None:
    one, other = played(RULE, chunk=1)[0], played(RULE, chunk=4)[0]
    torch.testing.assert_close(one.state["state.a"], other.state["state.a"], rtol=0, atol=1e-9)


def test_importance_that_is_flat_changes_nothing_and_otherwise_little() -> None:
    plain, pro = played(RULE, rounds=1)[0], played(RULE.model_copy(update={"importance": True}), rounds=1)[0]
    assert torch.equal(plain.state["state.x"], pro.state["state.x"])
    rule = RULE.model_copy(update={"importance": True})
    law = rule.law({n: pro.state[f"state.{n}"] for n in ("sizes", "reports")})
    assert float(law.sum()) == pytest.approx(1) and 1 < float(law.max() / law.min()) <= math.e + 1e-6
    reports = pro.state["state.reports"]
    assert float(reports.sum()) == 16 + 4 * 5 and float(reports.min()) >= 1


def test_probes_leave_the_model_where_it_was() -> None:
    fed = federation()
    w = fed.problem.start.float().repeat(3, 1)
    before, j = w.clone(), torch.tensor([3, 7, 3])
    for by in (0.5, -1.0, 0.5):
        RULE.nudge(fed.problem.layout, w, j, torch.full((3,), by))
    torch.testing.assert_close(w, before, rtol=0, atol=1e-6)
    assert not torch.equal(z(fed, 3), z(fed, 7))


def test_steps_that_cannot_be_believed_are_none() -> None:
    timid = RULE.model_copy(update={"most": 1e-12})
    run, seen = played(timid, rounds=1)
    assert torch.equal(seen.models[-1], federation().problem.start)
    assert not run.state["state.a"].any()


def test_a_codec_leaves_the_seeds_as_they_are() -> None:
    """Halves of the scalars may get lost on a codec; which seeds they belong to may not."""
    seen, plain = Seen(), played(RULE, rounds=1)[1]
    engine, schedule = hs.engines.local(path="stacked", workers=1), hs.schedules.synchronous(cohort=4)
    codec = hs.codecs.topk(0.2) | hs.codecs.uniform(2)
    hs.run(federation(), RULE, schedule, rounds=1, codec=codec, engine=engine, writers=[seen], on_start=seen.start)
    (one,), (other,) = seen.replies, plain.replies
    order = [one.clients.argsort(), other.clients.argsort()]
    assert torch.equal(one.rows["seeds"][order[0]], other.rows["seeds"][order[1]])
    assert not torch.equal(one.rows["g"][order[0]], other.rows["g"][order[1]])


def test_what_would_be_ignored_is_refused() -> None:
    for field, value in (("clip", 1.0), ("local", "adamw"), ("aggregate", "median")):
        with pytest.raises(ConfigError, match=field):
            FedKSeed(**{field: value})
    with pytest.raises(ConfigError, match="local steps are not allowed with FedKSeed: at most 5"):
        hs.run(federation(), RULE, hs.schedules.fedcompass(q_min=6, q_max=9), rounds=1)
