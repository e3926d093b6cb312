"""RFFL against its formulas, on replies made by hand and in runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hanse as hs
from hanse.codecs import Sending
from hanse.core.errors import ConfigError
from hanse.core.layout import Layout
from hanse.core.messages import Reply
from hanse.core.streams import Streams
from hanse.core.wire import wire_size
from hanse.data.task import Dataset
from hanse.engines.simulation import Simulation
from hanse.methods import RFFL, FedAvg
from hanse.methods.base import State
from hanse.methods.rffl import cosines

Follow = Callable[..., list[Any]]

P, N = 30, 7
LAYOUT = Layout({"weight": (5, 5), "bias": (5,)})


def reply(u: Tensor, clients: Tensor | None = None, sizes: Tensor | None = None, population: int = N) -> Reply:
    """What the server sees of updates ``[C, P]``."""
    who = torch.arange(len(u)) if clients is None else clients
    weight = torch.ones(len(u), dtype=u.dtype) if sizes is None else sizes
    return Reply(who, 0 * who, weight, {}, {"u": u}, {}, weight, population=population, starts={})


def begun() -> State:
    """The server's state before round 0."""
    none = torch.zeros(P, dtype=torch.float64)
    rows = {"r": torch.zeros(0).double(), "active": torch.zeros(0).bool(), "seen": torch.zeros(0).long()}
    return {"x": none, "g": none, **rows}


def known(r: list[float], seen: int = 99) -> State:
    """The server's state with these reputations, after ``seen`` rounds."""
    rows = {"active": torch.ones(len(r)).bool(), "seen": torch.full((len(r),), seen)}
    return {**begun(), "r": torch.tensor(r, dtype=torch.float64), **rows}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class alike(hs.data.Partition):
    """Everybody has the same samples."""

    abstract: ClassVar[bool] = True

    def deal(self, data: Dataset, clients: int, streams: Streams) -> tuple[Tensor, Tensor]:
        return torch.arange(50).repeat(clients), torch.full((clients,), 50)


# ---- the page's checks


@pytest.mark.parametrize("reward", ["additive", "replace"])
def test_equal_updates_make_it_fedavg(follow: Follow, reward: str) -> None:
    """With the own update on top of the reward it is FedAvg that moves twice as far; a client's own model lacks the last reward."""
    fed = hs.Federation(hs.tasks.digits(8), 4, alike(test=0), dtype="float64")
    how = {"lr": 0.1, "steps": 3, "batch": 50, "shuffle": False}
    ours = follow(fed, RFFL(**how, gamma=1e3, reward=reward), 5)
    plain = follow(fed, FedAvg(**how, server_lr=2 if reward == "additive" else 1), 5)
    before = [fed.problem.start] + [round.x for round in plain]
    for t, round in enumerate(ours):
        assert round.state["r"].tolist() == pytest.approx([1 / 4] * 4, abs=1e-12)
        own = (before[t] + before[t + 1]) / 2 if reward == "additive" else before[t]
        torch.testing.assert_close(round.kept["theta"], own.expand(4, -1), rtol=0, atol=1e-6)
        if reward == "replace":
            torch.testing.assert_close(round.x, plain[t].x, rtol=0, atol=1e-6)


@given(st.integers(0, 10**6), st.integers(1, N), st.floats(0, 1), st.floats(0, 0.99), st.integers(0, 12))
@settings(max_examples=25, deadline=None)
def test_reputations_add_up_and_who_is_out_stays_out(seed: int, present: int, alpha: float, beta: float, warmup: int) -> None:
    rule, state, left = RFFL(alpha=alpha, beta=beta, warmup=warmup), begun(), torch.ones(N).bool()
    for t in range(20):
        drawn = torch.randperm(N, generator=torch.Generator().manual_seed(seed + t))[:present].sort().values
        who = rule.asked(state, drawn)
        assert bool(left[who].all())
        if not len(who):
            continue
        honest = normal(1, P, seed=seed) + normal(len(who), P, seed=seed + t)
        u = torch.where(who[:, None] < 2, normal(len(who), P, seed=seed - t - 1), honest)
        state = rule.step(state, reply(u, who, 1 + who.double()), t)
        assert float(state["r"].sum()) == pytest.approx(1, abs=1e-9)
        assert not bool((state["active"] & ~left).any()) and bool(state["active"].any())
        left = state["active"]
        assert bool((state["r"][~left] == 0).all())
        q = rule.parts(state, torch.arange(N))
        assert float(q.min()) >= 0 and float(q.max()) == 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.sampled_from([torch.float32, torch.float64]))
@settings(deadline=None)
def test_a_reward_is_the_largest_entries_of_each_layer(shares: list[float], dtype: torch.dtype) -> None:
    g, q = normal(P).to(dtype), torch.tensor([*shares, 0, 1], dtype=torch.float64)
    assert RFFL.down is not None
    sent = RFFL.down.roundtrip(g.repeat(len(q), 1), Sending(LAYOUT, torch.zeros(len(q), dtype=torch.long), q))
    for v, share in zip(sent.values, q.tolist(), strict=True):
        for mine, whole in zip(LAYOUT.views(v).values(), LAYOUT.views(g).values(), strict=True):
            there = mine != 0
            assert int(there.sum()) == math.ceil(share * whole.numel() - 1e-9)
            assert torch.equal(mine[there], whole[there])
            assert not bool(there.any()) or bool((whole[there].abs().min() >= whole[~there].abs()).all())
    assert torch.equal(sent.values[-1], g) and not bool(sent.values[-2].any())


@given(st.floats(1e-3, 1), st.integers(0, 100))
def test_the_length_of_an_update_does_not_change_its_cosine(c: float, seed: int) -> None:
    u, g = normal(3, P, seed=seed), normal(P, seed=seed + 1)
    torch.testing.assert_close(cosines(c * u, g), cosines(u, g), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(cosines(u, g), torch.nn.functional.cosine_similarity(u, g[None]), rtol=1e-12, atol=1e-14)


def test_nothing_has_no_direction() -> None:
    u = normal(2, P)
    assert cosines(u, torch.zeros(P).double()).tolist() == [0, 0]
    assert cosines(0 * u, u[0]).tolist() == [0, 0]


def test_downloads_cost_what_reputations_are_worth(digits: hs.Federation, follow: Follow) -> None:
    """Places of as many bits as the layer needs, or a bitmap, whichever is less, and a value for each."""
    rounds, sizes = follow(digits, RFFL(lr=0.1, epochs=1), 4), digits.problem.shared_layout.sizes
    for before, after in pairwise(rounds):
        r, expected = before.state["r"].clamp(min=0), 0
        for q in (r / r.max()).tolist():
            counts = [math.ceil(q * n - 1e-9) for n in sizes]
            places = [min(math.ceil(m * (n - 1).bit_length() / 8), math.ceil(n / 8)) for m, n in zip(counts, sizes, strict=True)]
            frames = 16 + sum(2 + (m > 126) for m in counts)  # of the message, and of every layer
            body = frames + sum(places) + 8 * sum(counts)
            expected += wire_size({}, {"g": body})
        assert after.record["bytes_down"] - before.record["bytes_down"] == expected


def test_alpha_1_keeps_the_shares_of_the_data(digits: hs.Federation, follow: Follow) -> None:
    counts = digits.split.train.counts().double()
    for round in follow(digits, RFFL(lr=0.1, epochs=1, alpha=1, beta=0), 4):
        torch.testing.assert_close(round.state["r"], counts / counts.sum(), rtol=1e-12, atol=0)


# ---- the server's step


def test_two_rounds_by_hand() -> None:
    u, sizes, rule = normal(2, 3, P), torch.tensor([1.0, 2, 5]).double(), RFFL(alpha=0.9, gamma=4)
    u[0] *= 4 / u[0].norm(dim=1, keepdim=True).clamp(min=4)  # the server's cut changes nothing
    u[1] *= 4 / u[1].norm(dim=1, keepdim=True).clamp(min=4)
    one = rule.step(begun(), reply(u[0], sizes=sizes, population=3), 0)
    g = sizes @ u[0] / 8
    phi = torch.nn.functional.cosine_similarity(u[0], g[None])
    torch.testing.assert_close(one["g"], g)
    torch.testing.assert_close(one["r"], phi / phi.sum())
    two = rule.step(one, reply(u[1], sizes=sizes, population=3), 1)
    w = one["r"].clamp(min=0)
    g2 = w @ u[1] / w.sum()
    r = 0.9 * one["r"] + 0.1 * torch.nn.functional.cosine_similarity(u[1], g2[None])
    torch.testing.assert_close(two["g"], g2)
    torch.testing.assert_close(two["r"], r / r.sum())
    torch.testing.assert_close(two["x"], g + g2)


def test_the_threshold_is_taken_once_a_round() -> None:
    """beta / |R| is 0.067 with five participants and would be 0.083 after the first removal."""
    state = RFFL(alpha=1).step(known([0.05, 0.07, 0.28, 0.3, 0.3]), reply(normal(5, P), population=5), 20)
    assert state["active"].tolist() == [False, True, True, True, True]
    torch.testing.assert_close(state["r"], torch.tensor([0, 0.07, 0.28, 0.3, 0.3]).double() / 0.95)


def test_nobody_is_removed_before_its_eleventh_round() -> None:
    for seen, stays in ((9, True), (10, False)):
        state = RFFL(alpha=1).step(known([0.01, 0.49, 0.5], seen), reply(normal(3, P), population=3), 10)
        assert bool(state["active"][0]) is stays


def test_the_absent_keep_what_they_have() -> None:
    before, who = known([0.1, 0.2, 0.3, 0.4]), torch.tensor([1, 2])
    after = RFFL(beta=0.1).step(before, reply(normal(1, P) + 0.1 * normal(2, P), who, population=4), 3)
    assert torch.equal(after["r"][[0, 3]], before["r"][[0, 3]])
    assert not torch.equal(after["r"][who], before["r"][who])
    assert after["seen"].tolist() == [99, 100, 100, 99]
    w = before["r"][who]
    assert RFFL(gamma=1e3).step(before, reply(u := normal(2, P), who, population=4), 3)["g"] == pytest.approx(w @ u / w.sum())


def test_who_points_away_is_not_counted() -> None:
    """r stays negative, its weight and its reward are 0."""
    u, rule = normal(3, P), RFFL(gamma=1e3, beta=0, warmup=50)
    state = rule.step(known([-0.2, 0.5, 0.7], 1), reply(u, population=3), 1)
    torch.testing.assert_close(state["g"], (0.5 * u[1] + 0.7 * u[2]) / 1.2)
    assert float(state["r"][0]) < 0 and float(rule.parts(state, torch.tensor([0]))) == 0


def test_reputations_that_would_vanish_stay() -> None:
    """Nobody sends anything, and nothing is left of before."""
    u = torch.zeros(3, P).double()
    state = RFFL(alpha=0).step(known([0.25, 0.25, 0.5]), reply(u, population=3), 1)
    assert state["r"].tolist() == [0.25, 0.25, 0.5]
    assert not bool(state["g"].any())


@pytest.mark.parametrize("lie", [1e6, 1e30, math.inf, math.nan])
def test_a_lie_about_the_norm_is_cut(lie: float) -> None:
    u = normal(3, P)
    u[0] *= lie
    state = RFFL(gamma=0.5).step(begun(), reply(u, population=3), 0)
    assert float(state["g"].norm()) <= 0.5 and bool(state["r"].isfinite().all())


def test_uniform_weights_in_the_first_round(digits: hs.Federation, follow: Follow) -> None:
    rule = RFFL(lr=0.1, epochs=1, weights="uniform", gamma=1e3)
    (round,) = follow(digits, rule, 1)
    u = round.kept["theta"] - digits.problem.start
    torch.testing.assert_close(round.state["g"], u.mean(0), rtol=1e-9, atol=1e-12)


# ---- in a run


@pytest.mark.parametrize("reward", ["additive", "replace"])
def test_models_are_their_own(digits: hs.Federation, follow: Follow, reward: str) -> None:
    """Every round's models from those of the round before, the rewards, and updates of the largest norm."""
    rounds = follow(digits, RFFL(lr=0.3, gamma=0.05, reward=reward), 4)
    for before, after in pairwise(rounds):
        r, g = before.state["r"].clamp(min=0), before.state["g"]
        assert RFFL.down is not None
        sending = Sending(digits.problem.shared_layout, torch.zeros(6, dtype=torch.long), r / r.max())
        v = RFFL.down.roundtrip(g.repeat(6, 1), sending).values
        moved = after.kept["theta"] - before.kept["theta"] - v
        norms = moved.norm(dim=1)
        torch.testing.assert_close(norms, torch.full_like(norms, 0.05 if reward == "additive" else 0), rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(after.x, before.x + after.state["g"])
    assert len(rounds[-1].kept["theta"].unique(dim=0)) == 6


def test_batched_equals_one_client_at_a_time(digits: hs.Federation, follow: Follow) -> None:
    one, two = (follow(digits, RFFL(lr=0.1, epochs=1), 3, path=path, chunk=chunk) for path, chunk in (("stacked", 6), ("loop", 1)))
    torch.testing.assert_close(one[-1].kept["theta"], two[-1].kept["theta"], rtol=0, atol=1e-10)
    torch.testing.assert_close(one[-1].state["r"], two[-1].state["r"], rtol=0, atol=1e-10)


def test_liars_are_removed_and_no_longer_asked() -> None:
    fed = hs.Federation(hs.tasks.digits(8), 7, dtype="float64")
    engine = hs.engines.local(path="stacked", chunk=7, workers=1, threads=1)
    run = hs.run(
        fed,
        RFFL(lr=0.1, epochs=1),
        hs.schedules.synchronous(7),
        rounds=13,
        evaluate=0,
        attack=hs.attacks.sign_flip(share=0.3),
        engine=engine,
    )
    assert torch.equal(run.state["state.active"], ~run.clients["liars"])
    assert [len(record["cohort"]) for record in run.history] == [7] * 11 + [5] * 2  # rounds are counted from 0
    assert run.clients["rounds"][run.clients["liars"]].tolist() == [11, 11]


@pytest.mark.parametrize("private", [(), ("2.*",)])
def test_everyone_is_measured_by_its_own_model(private: tuple[str, ...]) -> None:
    fed = hs.Federation(hs.tasks.digits(8), 5, private=private)
    found: dict[str, Simulation] = {}

    def start(net: Simulation) -> None:
        found["net"] = net

    run = hs.run(fed, RFFL(lr=0.3, epochs=1), hs.schedules.synchronous(5), rounds=3, evaluate=0, on_start=start)
    kept = found["net"].kept.read(torch.arange(5))
    models = torch.cat([kept["theta"], kept["private"]], 1) if private else kept["theta"]
    none, metrics = fed.problem.start_buffers, run.history[-1]["metrics"]
    own = fed.problem.evaluate_clients(models, none, fed.split.test)["accuracy"]
    assert torch.equal(run.clients["accuracy"], own)
    assert metrics["client_accuracy"] == pytest.approx(float(own.mean()))
    everywhere = [fed.problem.evaluate(w, none, fed.split.test_x, fed.split.test_y)["accuracy"] for w in models]
    assert metrics["node_accuracy"] == pytest.approx(sum(everywhere) / 5)
    assert ("accuracy" in metrics) is not bool(private)


# ---- what is refused


def test_a_server_model_cannot_be_moved() -> None:
    with pytest.raises(ConfigError, match="server and server_lr are not allowed"):
        RFFL(server_lr=0.5)
    with pytest.raises(ConfigError, match=r"RFFL\.beta: 1 is not allowed"):
        RFFL(beta=1)


class normed(hs.tasks.digits):
    """Digits through batch norm."""

    abstract: ClassVar[bool] = True

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))


def test_batch_norm_has_to_be_private() -> None:
    with pytest.raises(ConfigError, match="buffers: 'average' is not allowed with RFFL"):
        hs.run(hs.Federation(normed(), 4), RFFL(), hs.schedules.synchronous(4), rounds=1)
    run = hs.run(hs.Federation(normed(), 4, buffers="private"), RFFL(epochs=1), hs.schedules.synchronous(4), rounds=2)
    assert run.history[-1]["metrics"]["node_accuracy"] > 0.2


def test_peers_know_no_reputations() -> None:
    with pytest.raises(ConfigError, match="gossip is not allowed with RFFL"):
        hs.run(hs.Federation(hs.tasks.digits(8), 4), RFFL(), hs.schedules.gossip(), rounds=1)
