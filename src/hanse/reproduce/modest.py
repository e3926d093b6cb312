"""MoDeST (de Vos et al., 2023, arXiv 2302.13837): against FedAvg and D-PSGD, and with most of its nodes crashing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hanse.core.wire import wire_size
from hanse.data.partition import dirichlet
from hanse.data.tasks import digits
from hanse.engines.simulation import Simulation
from hanse.federation import Federation
from hanse.fleet.participation import joins, leaves
from hanse.fleet.profiles import devices
from hanse.fleet.traces import Trace, always
from hanse.methods.fedavg import FedAvg
from hanse.reproduce.base import SEEDS, Findings, Property, band, by_seed, panels, watch
from hanse.schedules.gossip import gossip
from hanse.schedules.modest import modest
from hanse.schedules.network import Schedule
from hanse.schedules.synchronous import synchronous
from hanse.topologies import random_regular
from hanse.track.figures import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NODES, S, A, DEGREE = 50, 8, 2, 4
GOAL, ROUNDS, GOSSIP_ROUNDS = 0.85, 60, 150
RATES = (0.1, 0.3, 1.0, 2.0)
CRASH, SHARE, SUCCESS, LONG, LAST = 20, 0.8, 0.6, 100, 20
OURS, SERVER, PEERS, MORE = "MoDeST", "FedAvg", "D-PSGD", "DFedAvg"
WHOLE, CRASHED, FEW = "nobody crashes", f"{SHARE:.0%} crash in round {CRASH}", "the others were never there"
MODELS = ("train", "restart", "aggregate")


def federation(seed: int, trace: Trace | None = None) -> Federation:
    """The digits on devices and links of unequal speed."""
    fleet = devices(step="evenly(0.02, 0.1)", up=5, down=20, latency=0.05, trace=trace or always())
    return Federation(digits(), NODES, dirichlet(0.5), fleet, seed=seed)


@dataclass(frozen=True)
class Course:
    """One run, a row a round, float64 ``[rounds]``: test accuracy, models and bytes sent so far, virtual seconds.

    ``restarts`` and ``control``: messages and bytes of the whole run that begin it anew, or carry no model.
    """

    accuracy: Tensor
    transfers: Tensor
    bytes: Tensor
    seconds: Tensor
    restarts: int
    control: int

    def first(self, what: Tensor) -> float:
        """``what`` when the accuracy was ``GOAL`` for the first time; inf if never."""
        reached = what[self.accuracy >= GOAL]
        return float(reached[0]) if len(reached) else math.inf

    @property
    def rounds(self) -> float:
        """Rounds to ``GOAL``."""
        return self.first(torch.arange(1.0, len(self.accuracy) + 1))

    @property
    def final(self) -> float:
        """Mean accuracy of the last rounds."""
        return float(self.accuracy[-LAST:].mean())


def accuracy(net: Simulation) -> float:
    """Of the global model on the test set; among peers that of the mean of all."""
    split = net.federation.split
    return net.problem.evaluate(net.model, net.problem.start_buffers, split.test_x, split.test_y)["accuracy"]


def transfers(net: Simulation) -> int:
    """Models sent so far, either way."""
    if net.letters:
        return sum(net.letters.get(kind, [0])[0] for kind in MODELS)
    return 2 * net.updates if net.traffic is None else net.clock.up // wire_size({"x": net.model})


def course(where: Federation, rule: FedAvg, schedule: Schedule, rounds: int) -> Course:
    """Run it."""
    rows: list[tuple[float, ...]] = []
    nets: list[Simulation] = []

    def look(net: Simulation) -> None:
        rows.append((accuracy(net), transfers(net), net.clock.up + net.clock.down, net.now))
        nets[:] = [net]

    watch(where, rule, schedule, look, rounds)
    letters = nets[0].letters
    control = sum(size for kind, (_, size) in letters.items() if kind not in MODELS)
    score, sent, size, seconds = torch.tensor(rows, dtype=torch.float64).t().contiguous()
    return Course(score, sent, size, seconds, letters.get("restart", [0])[0], control)


def tuned(rounds: int, schedule: Schedule, **work: int) -> tuple[float, list[Course], dict[float, list[Course]]]:
    """The rate that is at ``GOAL`` in the fewest rounds, its runs, and those of all rates, a run a seed."""
    found = {
        lr: [course(federation(seed), FedAvg(lr=lr, weights="uniform", **work), schedule, rounds) for seed in SEEDS] for lr in RATES
    }
    best = min(RATES, key=lambda lr: mean(run.rounds for run in found[lr]))
    return best, found[best], found


def crashes(rate: float) -> dict[str, list[Course]]:
    """MoDeST with all nodes, with most of them crashing in the middle of a round, and with the survivors alone."""
    schedule, rule = modest(sample=S, aggregators=A, success=SUCCESS), FedAvg(lr=rate, weights="uniform", steps=5, batch=20)
    found: dict[str, list[Course]] = {WHOLE: [], CRASHED: [], FEW: []}
    for seed in SEEDS:
        whole = course(federation(seed), rule, schedule, LONG)
        at = float(whole.seconds[CRASH - 2 : CRASH].mean())
        found[WHOLE].append(whole)
        found[CRASHED].append(course(federation(seed, leaves(share=SHARE, at=at)), rule, schedule, LONG))
        found[FEW].append(course(federation(seed, joins(share=SHARE, at=1e12)), rule, schedule, LONG))
    return found


def draw(best: dict[str, list[Course]], crashed: dict[str, list[Course]]) -> Figure:
    """Accuracy over rounds and over models sent, and what crashes do to it."""
    figure, (left, middle, right) = panels(14, 1, 1, 1, height=4.4)
    for (name, runs), colour in zip(best.items(), COLOURS, strict=False):
        scores = torch.stack([run.accuracy for run in runs])
        band(left, range(1, scores.shape[1] + 1), scores, colour, name)
        band(middle, torch.stack([run.transfers for run in runs]).mean(0), scores, colour, name)
    for (name, runs), colour in zip(crashed.items(), COLOURS, strict=False):
        band(right, range(1, LONG + 1), torch.stack([run.accuracy for run in runs]), colour, name)
    right.axvline(CRASH, color="black", lw=0.6, ls=":")
    left.set(title="each at its quickest rate", xlabel="round", xlim=(0, ROUNDS), ylabel="test accuracy")
    middle.set(title="the same runs", xlabel="models sent", xscale="log")
    right.set(title=f"MoDeST, success = {SUCCESS:g}", xlabel="round")
    for ax in (left, middle, right):
        ax.axhline(GOAL, color="black", lw=0.6, ls=":")
        ax.set_ylim(0.2, 1)
        ax.legend(frameon=False, loc="lower right")
    return figure


def average(runs: Iterable[Course], of: Callable[[Course], float]) -> float:
    """Mean over seeds."""
    return mean(of(run) for run in runs)


def reproduce() -> Findings:
    """Measure the claims; about two minutes on one core."""
    graph = random_regular(degree=DEGREE)
    arms = {
        SERVER: tuned(ROUNDS, synchronous(cohort=S), steps=5, batch=20),
        OURS: tuned(ROUNDS, modest(sample=S, aggregators=A), steps=5, batch=20),
        PEERS: tuned(GOSSIP_ROUNDS, gossip(topology=graph), steps=1, batch=20),
        MORE: tuned(GOSSIP_ROUNDS // 3, gossip(topology=graph), steps=5, batch=20),
    }
    best = {name: runs for name, (_, runs, _) in arms.items()}
    crashed = crashes(arms[OURS][0])
    rounds = {name: average(runs, lambda run: run.rounds) for name, runs in best.items()}
    sent = {name: average(runs, lambda run: run.first(run.transfers)) for name, runs in best.items()}
    most = max(float(run.transfers.diff().max()) for run in best[OURS])
    ends = {name: average(runs, lambda run: run.final) for name, runs in crashed.items()}

    rows = []
    for name, (rate, runs, swept) in arms.items():
        by_rate = ", ".join(f"{lr:g}: {average(found, lambda run: run.rounds):.1f}" for lr, found in swept.items())
        reached = (f"{rounds[name]:.1f}", f"{sent[name]:.0f}", f"{average(runs, lambda run: run.first(run.bytes)) / 1e6:.1f}")
        control = f"{average(runs, lambda run: run.control / float(run.bytes[-1])):.1%}" if name == OURS else "-"
        rows.append([name, f"{rate:g}", *reached, control, by_seed(run.final for run in runs), "-", by_rate])
    for name, runs in crashed.items():
        restarts = " ".join(str(run.restarts) for run in runs)
        control = f"{average(runs, lambda run: run.control / float(run.bytes[-1])):.1%}"
        rows.append(
            [f"{OURS}, {name}", f"{arms[OURS][0]:g}", "-", "-", "-", control, by_seed(r.final for r in runs), restarts, "-"]
        )

    properties = [
        Property(
            f"rounds to {GOAL:.0%}",
            "at most 1.3 times those of FedAvg, each at its best rate",
            f"{rounds[OURS]:.1f} against {rounds[SERVER]:.1f}: {rounds[OURS] / rounds[SERVER]:.2f} times",
            rounds[OURS] <= 1.3 * rounds[SERVER] < math.inf,
        ),
        Property(
            f"models sent to {GOAL:.0%}",
            f"at most a third of D-PSGD on a {DEGREE}-regular graph, each at its best rate",
            f"{sent[OURS]:.0f} against {sent[PEERS]:.0f}, {sent[PEERS] / sent[OURS]:.1f} times as many",
            sent[OURS] <= sent[PEERS] / 3,
        ),
        Property(
            "models sent in a round",
            f"at most 2 a s = {2 * A * S} from one first average to the next",
            f"at most {most:.0f}",
            most <= 2 * A * S,
        ),
        Property(
            "crashes",
            f"after {SHARE:.0%} of the nodes have crashed in round {CRASH}, training goes on",
            f"all {LONG} rounds in {sum(len(run.accuracy) == LONG for run in crashed[CRASHED])} of {len(SEEDS)} runs",
            all(len(run.accuracy) == LONG for run in crashed[CRASHED]),
        ),
        Property(
            "accuracy after crashes",
            "within 5 points of a run in which only the survivors ever were there",
            f"{ends[CRASHED]:.3f} against {ends[FEW]:.3f}; {ends[WHOLE]:.3f} where nobody crashes",
            ends[CRASHED] >= ends[FEW] - 0.05,
        ),
    ]
    return Findings(
        "MoDeST against FedAvg and D-PSGD, and its nodes crashing",
        f"Digits, MLP 64-64-10, {NODES} nodes with Dirichlet(0.5) labels; local steps of 0.02 to 0.1 s, links of 5 Mbit/s up and"
        f" 20 down with 50 ms latency; means over 3 seeds (bands: lowest to highest). FedAvg draws {S} clients a round, MoDeST has"
        f" s = {S}, a = {A}; both take 5 local steps on batches of 20 and average uniformly. D-PSGD takes one step a round on"
        f" all nodes and averages with its {DEGREE} neighbours, DFedAvg takes five; they are scored by the mean of all models."
        f" Everybody is tuned over the rates {', '.join(f'{lr:g}' for lr in RATES)} for the fewest rounds to {GOAL:.0%} on the"
        f" test set of 360 pictures (the first time it is there). Crashes: sf = {SUCCESS:g}, {SHARE:.0%} of the nodes go away for"
        f" ever in the middle of round {CRASH}, with what they train and average; {LONG} rounds, accuracy over the last {LAST}."
        " MB count both ways with a server, and what is sent among peers.",
        properties,
        ("run", "rate", f"rounds to {GOAL:.0%}", "models sent", "MB", "control", "final accuracy", "restarts", "rounds by rate"),
        rows,
        draw(best, crashed),
    )
