"""FRL: the vote's algebra, and clients' work against the authors' formulas in plain autograd."""

from __future__ import annotations

import math
from contextlib import suppress
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import hanse as hs
from hanse.attacks import sign_flip
from hanse.codecs.ranks import reputations
from hanse.codecs.wire import FRAME, frame, varint
from hanse.core.context import Context
from hanse.core.gradients import paths
from hanse.core.layout import Layout
from hanse.core.messages import Reply, Upload
from hanse.core.optim import exponential, sgd
from hanse.core.problem import Problem
from hanse.core.wire import wire_size
from hanse.engines.simulation import Simulation
from hanse.methods import FRL
from hanse.methods.base import State
from hanse.methods.frl import largest, network
from hanse.track.run import Record

KEYS = ("abs", "reference", "signed")
LAYERS = {"0.weight": 64 * 8, "2.weight": 8 * 10}


def context(federation: hs.Federation, rule: FRL, state: State, path: str = "stacked") -> Context:
    """The work of all clients of ``federation``, those with most steps first."""
    counts = federation.split.train.counts()
    ids = counts.argsort(descending=True, stable=True)
    return Context(
        problem=federation.problem,
        path=paths(federation.problem)[path],
        samples=federation.split.train,
        streams=federation.streams,
        ids=ids,
        rounds=torch.zeros_like(ids),
        steps=rule.plan().lengths(counts[ids]),
        message=rule.message(state),
        mixed=False,
        state={},
        plan=rule.plan(),
        lr=rule.lr.at(0),
        local=rule.local,
    )


def reply(federation: hs.Federation, votes: dict[str, Tensor]) -> Reply:
    """What the server sees of votes ``[V, n]``."""
    clients = torch.arange(len(next(iter(votes.values()))))
    sums, one = {name: each.sum(0) for name, each in votes.items()}, torch.ones(len(clients), dtype=torch.float64)
    return Reply(clients, clients, one, sums, {}, {}, one, 9, {}, problem=federation.problem)


def elected(federation: hs.Federation, votes: dict[str, Tensor]) -> State:
    """The server's state after one round of votes."""
    rule = FRL()
    return rule.step(rule.init(federation.problem), reply(federation, votes), 0)


def some_votes(voters: int, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {f"ranks.{name}": reputations(torch.rand(voters, n, generator=draw)).double() for name, n in LAYERS.items()}


def reverse(votes: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each.shape[-1] - 1 - each for name, each in votes.items()}


# ---- the network that nobody changes


def test_weights_are_signed_constants_and_biases_zero(digits: hs.Federation) -> None:
    frozen = network(digits.problem)
    theta, scores = (digits.problem.layout.views(t) for t in (frozen.theta, frozen.scores))
    for name, fan_in in (("0.weight", 64), ("2.weight", 8)):
        assert torch.allclose(theta[name].abs(), torch.tensor(math.sqrt(2 / fan_in), dtype=torch.float64), atol=1e-15)
        assert abs(float(theta[name].sign().mean())) < 4 / math.sqrt(theta[name].numel())
        assert float(scores[name].abs().max()) < 1 / math.sqrt(fan_in)
        assert abs(float(scores[name].std()) * math.sqrt(3 * fan_in) - 1) < 0.15
        assert abs(float((theta[name] * scores[name]).sign().mean())) < 4 / math.sqrt(theta[name].numel())  # independent
    assert not theta["0.bias"].any() and not theta["2.bias"].any()


def test_another_seed_draws_another_network() -> None:
    one, other = (hs.Federation(hs.tasks.digits(hidden=8), clients=6, seed=seed).problem for seed in (0, 1))
    assert not torch.equal(network(one).theta, network(other).theta)


def test_normalisation_and_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 2))
    problem = Problem(model)
    views = problem.layout.views(FRL(k=1).init(problem)["x"])
    assert torch.equal(views["1.weight"], torch.ones(4)) and not views["1.bias"].any() and not views["0.bias"].any()
    assert torch.allclose(views["0.weight"].abs(), torch.tensor(math.sqrt(2 / 9)))
    assert FRL().message(FRL().init(problem)).keys() == {"ranks.0.weight", "ranks.3.weight"}


@pytest.mark.parametrize("key", KEYS)
def test_a_ranking_makes_the_same_network_on_two_machines(key: str) -> None:
    """Scores to a ranking, through its bytes, and back: the same masks and outputs bit for bit."""
    rule = FRL(key=key)
    here, there = (hs.Federation(hs.tasks.digits(hidden=8), clients=6, seed=3) for _ in range(2))
    sent = rule.init(here.problem)
    assert rule.down is not None
    arrived = {name: rule.down.decode(rule.down.encode(values)) for name, values in rule.message(sent).items()}
    rebuilt = rule._scores(network(there.problem), arrived)
    first = network(here.problem).scores
    for name in LAYERS:
        mine, theirs = here.problem.layout.views(first)[name], there.problem.layout.views(rebuilt)[name]
        assert torch.equal(mine.abs() if key == "abs" else mine, theirs)
    x = rule._masked(network(there.problem), rebuilt)
    assert torch.equal(x, sent["x"])
    pictures, none = here.split.test_x[:50], here.problem.start_buffers
    assert torch.equal(here.problem.output(sent["x"], none, pictures), there.problem.output(x, none, pictures))


@pytest.mark.parametrize("key", KEYS)
def test_the_share_k_of_every_layer_is_kept(digits: hs.Federation, key: str) -> None:
    for k, kept in ((0.5, (256, 40)), (0.1, (51, 8)), (0.001, (1, 1)), (1.0, (512, 80))):
        views = digits.problem.layout.views(FRL(k=k, key=key).init(digits.problem)["x"])
        assert tuple(int((views[name] != 0).sum()) for name in LAYERS) == kept


def test_the_supermask_is_the_end_of_the_ranking(digits: hs.Federation) -> None:
    state = elected(digits, some_votes(3))
    views = digits.problem.layout.views(state["x"])
    for name, n in LAYERS.items():
        assert torch.equal(views[name].flatten() != 0, state[f"ranks.{name}"] >= n / 2)


def test_with_all_edges_kept_the_ranking_does_not_matter(digits: hs.Federation, follow) -> None:
    rounds = follow(digits, FRL(k=1), 2)
    for each in rounds:
        assert torch.equal(each.x, network(digits.problem).theta)
    assert not torch.equal(rounds[0].state["ranks.0.weight"], rounds[1].state["ranks.0.weight"])


@given(st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0]), min_size=1, max_size=12), st.data())
def test_the_largest_are_the_last_of_the_stable_order(row: list[float], data: st.DataObject) -> None:
    count, key = data.draw(st.integers(1, len(row))), torch.tensor([row, row[::-1]])
    assert torch.equal(largest(key, count), reputations(key) >= len(row) - count)


# ---- the vote


def test_one_voter_decides(digits: hs.Federation) -> None:
    votes = some_votes(1)
    state = elected(digits, votes)
    assert all(torch.equal(state[name], each[0]) for name, each in votes.items())


def test_a_voter_and_its_reverse_leave_the_order_of_ties(digits: hs.Federation) -> None:
    votes = some_votes(1)
    both = {name: torch.cat([each, reverse(votes)[name]]) for name, each in votes.items()}
    state = elected(digits, both)
    for name, n in LAYERS.items():
        assert torch.equal(both[f"ranks.{name}"].sum(0), torch.full((n,), n - 1.0, dtype=torch.float64))
        assert torch.equal(state[f"ranks.{name}"], torch.arange(n, dtype=torch.float64))


@pytest.mark.parametrize(("honest", "reversed_"), [(2, 1), (5, 4), (20, 19)])
def test_a_majority_that_agrees_wins_whole(digits: hs.Federation, honest: int, reversed_: int) -> None:
    one = some_votes(1)
    votes = {n: torch.cat([each.expand(honest, -1), reverse(one)[n].expand(reversed_, -1)]) for n, each in one.items()}
    state = elected(digits, votes)
    assert all(torch.equal(state[name], each[0]) for name, each in one.items())


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 4))
def test_a_voter_moves_a_total_by_less_than_the_number_of_edges(seed: int, voters: int, liars: int) -> None:
    """Whatever liars send instead of honest votes: no edge's total moves by more than b (n - 1)."""
    votes, lies = some_votes(voters + liars, seed), some_votes(liars, seed + 1)
    for name, n in LAYERS.items():
        each = votes[f"ranks.{name}"]
        forged = torch.cat([each[:voters], lies[f"ranks.{name}"]])
        assert float((forged.sum(0) - each.sum(0)).abs().max()) <= liars * (n - 1)


def test_liars_that_reverse_a_common_vote_move_its_ends_by_the_whole_bound() -> None:
    for name, each in some_votes(1).items():
        n, honest = each.shape[1], each.expand(5, -1)
        forged = torch.cat([honest[:3], reverse({name: honest[3:]})[name]])
        assert float((forged.sum(0) - honest.sum(0)).abs().max()) == 2 * (n - 1)


def test_a_message_that_is_no_ranking_is_refused_and_the_others_are_counted(digits: hs.Federation) -> None:
    codec, votes, name = FRL.codec, some_votes(4), "ranks.2.weight"
    assert codec is not None
    layout, sent = Layout({name: (80,)}), [codec.encode(row) for row in votes[name]]
    body = bytearray(sent[0][FRAME.size :])
    body[-1] ^= 1  # now an edge has the place of another, and its own is empty
    twice, short = frame(votes[name][0], [bytes(body)]), codec.encode(torch.arange(79.0))
    for data, why in ((twice, "not a permutation of 0 to 79"), (short, "79")):
        with pytest.raises(hs.CodecError, match=why):
            codec.decode(data, layout)
    counted = []
    for data in (twice, short, *sent[1:]):
        with suppress(hs.CodecError):
            counted.append(codec.decode(data, layout))
    state = elected(digits, {n: each[1:] if n != name else torch.stack(counted) for n, each in votes.items()})
    assert all(torch.equal(state[n], reputations(each[1:].sum(0)).double()) for n, each in votes.items())


# ---- the clients


class Subnet(torch.autograd.Function):
    """As in the authors' code: the mask of the upper half, and gradients straight through it."""

    @staticmethod
    def forward(ctx: object, scores: Tensor) -> Tensor:
        out, order = torch.zeros_like(scores), scores.flatten().argsort()
        out.view(-1)[order[len(order) // 2 :]] = 1
        return out

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return g


@pytest.mark.parametrize("key", KEYS)
def test_clients_do_what_the_authors_code_does(digits: hs.Federation, key: str) -> None:
    """Edge-popup by autograd, torch's SGD and its cosine schedule, one client at a time."""
    rule = FRL(key=key, epochs=3, batch=16)
    state = rule.init(digits.problem)
    ctx = context(digits, rule, state)
    votes = rule.train(ctx).sums
    theta, first = (digits.problem.layout.views(t) for t in (network(digits.problem).theta, network(digits.problem).scores))
    ids, steps = ctx.ids, rule.plan().lengths(digits.split.train.counts(ctx.ids))
    batches = list(rule.plan().batches(digits.split.train, ids, digits.streams, torch.zeros_like(ids), steps))
    for i in range(len(ids)):
        s = {n: (first[n].abs() if key == "abs" else first[n].clone()).requires_grad_() for n in LAYERS}
        optimiser = torch.optim.SGD(list(s.values()), lr=0.4, momentum=0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=3)
        for k, (_, batch) in enumerate(batches[: int(steps[i])]):
            w = {n: theta[n] * Subnet.apply(v if key == "signed" else v.abs()) for n, v in s.items()}
            output = torch.relu(batch.x[i] @ w["0.weight"].t()) @ w["2.weight"].t()
            each = nn.functional.cross_entropy(output, batch.y[i], reduction="none")
            optimiser.zero_grad()
            (each.mean() if batch.weight is None else each @ batch.weight[i]).backward()
            optimiser.step()
            if (k + 1) % (int(steps[i]) // 3) == 0:
                schedule.step()
        for n, v in s.items():
            expected = reputations((v.abs() if key == "abs" else v).detach().flatten()).double()
            assert torch.equal(votes[f"ranks.{n}"][i], expected)


def test_edges_that_are_left_out_can_come_back(digits: hs.Federation, follow) -> None:
    before, after = network(digits.problem), follow(digits, FRL(), 1)[-1].x
    start = FRL().init(digits.problem)["x"]
    came = (start == 0) & (after != 0) & (before.theta != 0)
    assert int(came.sum()) > 20 and torch.equal(after[came], before.theta[came])


def test_the_weights_stay_bit_for_bit(digits: hs.Federation, follow) -> None:
    theta = network(digits.problem).theta.clone()
    for each in follow(digits, FRL(), 3):
        kept = each.x != 0
        assert torch.equal(each.x[kept], theta[kept]) and int(kept.sum()) == 256 + 40
    assert torch.equal(network(digits.problem).theta, theta)


def votes_of(federation: hs.Federation, path: str) -> Upload:
    rule = FRL()
    return rule.train(context(federation, rule, rule.init(federation.problem), path))


def test_batched_equals_one_client_at_a_time(digits: hs.Federation) -> None:
    one, other = votes_of(digits, "stacked"), votes_of(digits, "loop")
    assert all(torch.equal(one.sums[name], other.sums[name]) for name in one.sums)
    assert torch.equal(one.weight, torch.ones(6, dtype=torch.float64))


def test_the_rate_falls_over_rounds_as_in_the_authors_code() -> None:
    assert FRL().lr == exponential(0.4, 0.999) and FRL().local == sgd(momentum=0.9, weight_decay=1e-4)


def test_the_vote_learns() -> None:
    """One digit in ten is chance; a subnetwork needs more hidden units than trained weights do."""
    federation = hs.Federation(hs.tasks.digits(hidden=64), clients=6)
    engine = hs.engines.local(path="stacked", chunk=6, workers=1, threads=1)
    run = hs.run(federation, FRL(), hs.schedules.synchronous(cohort=6), rounds=4, evaluate=4, engine=engine)
    assert run.history[-1]["metrics"]["accuracy"] > 0.7


def test_bytes_are_those_of_the_rankings(digits: hs.Federation) -> None:
    """sum_l ceil(n_l ceil(log2 n_l) / 8), and what is around it: frames, names, the weight and the loss."""
    cohort = hs.schedules.synchronous(cohort=6)
    history = hs.run(digits, FRL(), cohort, rounds=1, evaluate=0).history
    ranked = {n: math.ceil(m * math.ceil(math.log2(m)) / 8) for n, m in LAYERS.items()}
    assert sum(ranked.values()) == 512 * 9 // 8 + 80 * 7 // 8
    parts = {f"ranks.{n}": FRAME.size + len(varint(size + 1)) + size for n, size in ranked.items()}
    scalars = {"weight": torch.ones(1, dtype=torch.float64), "loss": torch.ones(1, dtype=torch.float64)}
    assert history[-1]["bytes_down"] == 6 * wire_size({}, parts)
    assert history[-1]["bytes_up"] == 6 * wire_size(scalars, parts)


# ---- in a run


def test_liars_that_reverse_their_vote_send_valid_rankings(digits: hs.Federation) -> None:
    """The paper's attack: the reverse of the ranking that the liars' own votes make together."""
    run = hs.run(digits, FRL(), hs.schedules.synchronous(cohort=6), rounds=3, attack=sign_flip(share=0.34, together=True))
    for name, n in LAYERS.items():
        assert torch.equal(run.state[f"state.ranks.{name}"].sort().values, torch.arange(n, dtype=torch.float64))


@pytest.mark.parametrize("schedule", ["fedbuff(buffer=2, cohort=4)", "synchronous(cohort=6)"])
def test_a_run_that_was_stopped_goes_on_as_it_would_have(schedule: str, tmp_path) -> None:
    """Also where clients start from several versions of the ranking at once."""
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=6, fleet=hs.fleet.devices(job="evenly(1.0, 0.2)"))
    options = {
        "schedule": hs.schedules.Schedule.parse(schedule),
        "rounds": 4,
        "engine": hs.engines.local(path="stacked", chunk=6, workers=1, threads=1),
    }
    whole, stop = hs.run(federation, FRL(), **options), Stop()
    half = hs.run(federation, FRL(), out=tmp_path, writers=[stop], on_start=stop.start, **options)
    assert len(half.history) == 2
    assert all(torch.equal(tensor, whole.state[name]) for name, tensor in hs.resume(tmp_path).state.items())


class Stop:
    """Ends a run after its second round."""

    def start(self, net: Simulation) -> None:
        self.net = net

    def write(self, record: Record) -> None:
        self.net.stopping |= record["round"] == 2

    def close(self) -> None:
        pass


def test_nobody_leaves_the_ranking(digits: hs.Federation, follow) -> None:
    rounds = follow(digits, FRL(epochs=1, batch=256), 12, cohort=1, draw="bernoulli")
    came = [bool(each.record["cohort"]) for each in rounds[1:]]
    assert came == [not torch.equal(old.state["ranks.0.weight"], new.state["ranks.0.weight"]) for old, new in pairwise(rounds)]
    assert True in came and False in came


def test_what_is_refused(digits: hs.Federation) -> None:
    with pytest.raises(hs.ConfigError, match="batch norm"):
        FRL().init(Problem(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))))
    with pytest.raises(hs.ConfigError, match="private"):
        FRL().init(Problem(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), private=("1.*",)))
    with pytest.raises(hs.ConfigError, match="two or more dimensions"):
        FRL().init(hs.Federation(hs.tasks.quadratics(), 10, hs.natural()).problem)
    with pytest.raises(hs.ConfigError, match="written by ranks"):
        hs.run(digits, FRL(), hs.schedules.synchronous(cohort=6), rounds=1, codec=hs.codecs.topk(0.1))
    with pytest.raises(hs.ConfigError, match="it needs a server"):
        hs.run(digits, FRL(), hs.schedules.gossip(), rounds=1)
