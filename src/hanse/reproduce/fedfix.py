"""FedFix (Fraboni, Vidal, Kameni, Lorenzi, JMLR 24(110), 2023, arXiv 2206.10189), and accuracy against time for every schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hanse.codecs.base import identity
from hanse.core.messages import Reply
from hanse.data.partition import dirichlet
from hanse.data.tasks import digits, quadratics
from hanse.engines.estimate import Rehearsal, drive
from hanse.engines.local import local
from hanse.engines.simulation import Simulation
from hanse.federation import Federation
from hanse.fleet.profiles import devices
from hanse.methods.fedasync import FedAsync
from hanse.methods.fedavg import FedAvg
from hanse.reproduce.base import (
    SEEDS,
    Findings,
    Property,
    Scored,
    band,
    bowls,
    follow,
    models,
    panels,
    test_accuracy,
    train_loss,
)
from hanse.schedules.fedbuff import fedasync, fedbuff
from hanse.schedules.fedcompass import fedcompass
from hanse.schedules.fedfix import fedfix
from hanse.schedules.network import Schedule
from hanse.schedules.staleness import constant
from hanse.schedules.synchronous import synchronous
from hanse.track.figures import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

F80 = devices(job="evenly(1.0, 0.2)")
TAU = [1 - 0.8 * i / 9 for i in range(10)]
"""Seconds of a job of ten clients: scenario F-80."""
WINDOWS = (0.2, 0.5, 0.8, 1.0)
DELIVERIES = 10_000

CLIENTS, STEPS, SECONDS = 20, 10, 20.0
RATES = (0.3, 0.5, 1.0, 2.0)
LOW_RATES = (0.003, 0.005, 0.01)
GRID = torch.linspace(0, SECONDS, 401, dtype=torch.float64)
LAST = torch.linspace(0.75 * SECONDS, SECONDS, 11, dtype=torch.float64)
"""Times at which the last quarter is looked at, the same for all."""
UNBIASED = "FedAsync, unbiased"


class Contender(NamedTuple):
    """A rule in its schedule; its model is scored after every ``every`` rounds."""

    rule: FedAvg
    schedule: Schedule
    every: int = 1
    rates: tuple[float, ...] = RATES


CONTENDERS = {
    "FedAvg": Contender(FedAvg(steps=STEPS), synchronous(cohort=CLIENTS)),
    "FedAsync": Contender(FedAsync(steps=STEPS), fedasync(), 10),
    "FedBuff": Contender(FedAvg(steps=STEPS), fedbuff(buffer=CLIENTS // 2)),
    "FedFix": Contender(FedAvg(steps=STEPS), fedfix(window=0.5)),
    "FedCompass": Contender(FedAvg(steps=STEPS), fedcompass(q_min=STEPS // 5, q_max=STEPS)),
    UNBIASED: Contender(FedAvg(steps=STEPS), fedasync(weights="unbiased"), 10, LOW_RATES),
}
SETTING = (
    f"Digits, MLP 64-64-10, {CLIENTS} clients with Dirichlet(0.1) labels, batches of 32. Ten local steps take the slowest"
    " client 1 s and the fastest 0.2 s (F-80); messages take no time; every run has"
    f" {SECONDS:g} s. Means over 3 seeds (bands: lowest to highest). {STEPS} local steps a job; FedCompass assigns {STEPS // 5}"
    f" to {STEPS}, with lam = 1.2 and alpha = 0.9. FedAvg waits for all {CLIENTS}; FedBuff has a buffer of {CLIENTS // 2};"
    " FedFix steps every 0.5 s with unbiased weights; FedAsync mixes models with alpha = 0.6; FedAsync and FedBuff discount by"
    " (1 + u)^-0.5. FedAsync, unbiased, is that of FedFix's paper: every reply is a step, weighted by how rarely its client"
    " delivers. Each rate is that with the lowest training loss over the last quarter of the time, of"
    f" {', '.join(f'{r:g}' for r in RATES)}, or of {', '.join(f'{r:g}' for r in LOW_RATES)} where replies count 20 times as"
    " much. MB are sent both ways. Quadratics: ten, one a client, one step a job at rate 0.02 (FedFix) or 0.01; ends are"
    " means of the models of the second half."
)


class Ledger(Rehearsal):
    """A conversation without work that counts each client's deliveries, and what they count altogether, ``[N]`` each."""

    def __init__(self, federation: Federation, rounds: int) -> None:
        engine = local(path="vmap", chunk=federation.clients, workers=1, threads=1)
        super().__init__(Simulation(federation, FedAvg(steps=1), engine, identity(), seed=0, rounds=rounds), 0)
        self.total_rounds = rounds
        self.deliveries, self.counted = torch.zeros(2, federation.clients, dtype=torch.float64)

    def collect(self, *args: Any, **kwargs: Any) -> Reply:
        reply = super().collect(*args, **kwargs)
        assert reply.scale is not None
        self.deliveries[reply.clients] += 1
        self.counted[reply.clients] += reply.scale.double() / self.clients  # every client has the same weight
        return reply

    def rehearse(self, schedule: Schedule) -> Ledger:
        """All of the conversation."""
        drive(schedule.run(self, self.method))
        return self


def window_law(dt: float) -> tuple[bool, float]:
    """Over a common multiple of the periods ceil(tau_i / dt): whether all deliver as often as they should, and by how much the
    mean weight in a window is off.
    """
    periods = [math.ceil(tau / dt - 1e-9) for tau in TAU]
    windows = math.lcm(*periods)
    ledger = Ledger(bowls(F80), windows).rehearse(fedfix(window=dt))
    exact = ledger.deliveries.tolist() == [windows / k for k in periods]
    return exact, float((ledger.counted / windows - 0.1).abs().max())


def arrival_law() -> tuple[float, float]:
    """Relative errors of the shares of deliveries, 1 / tau_i, and of the mean unbiased weight, when every delivery is a step."""
    ledger = Ledger(bowls(F80), DELIVERIES).rehearse(fedasync(weights="unbiased"))
    rate = 1 / torch.tensor(TAU, dtype=torch.float64)
    share, weight = ledger.deliveries / DELIVERIES / (rate / rate.sum()), ledger.counted / DELIVERIES * len(TAU)
    return float((share - 1).abs().max()), float((weight - 1).abs().max())


def limit(schedule: Schedule, lr: float, rounds: int) -> Tensor:
    """Where one small step a job leads on the quadratics: the mean model of the second half of ``rounds`` rounds."""
    path, _ = models(bowls(F80), FedAvg(lr=lr, steps=1), schedule, rounds)
    return path[rounds // 2 :].mean(0)


def minimiser(weight: Tensor) -> Tensor:
    """Of ``sum_i weight_i f_i``, float64 ``[dimension]``."""
    a, b = quadratics().samples().unbind(1)
    return (weight[:, None] * a * b).sum(0) / (weight[:, None] * a).sum(0)


@dataclass(frozen=True)
class Course:
    """What became of one contender at one rate, a row a seed: loss and accuracy ``[seeds, len(GRID)]``, the loss at ``LAST``."""

    rate: float
    loss: Tensor
    accuracy: Tensor
    last: Tensor
    updates: float
    megabytes: float

    @property
    def final(self) -> float:
        """Mean training loss of the last quarter: what rates are chosen by. A run that diverged has none."""
        return float(self.last.nan_to_num(math.inf).mean())

    @property
    def spread(self) -> float:
        """Standard deviation of the loss over the last quarter, mean over seeds."""
        return float(self.last.std(1).mean())

    def reached(self, share: float) -> float:
        """Mean accuracy after that share of the time."""
        return float(self.accuracy[:, round(share * (len(GRID) - 1))].mean())


def course(federations: list[Federation], contender: Contender, rate: float) -> Course:
    """Run a contender on every federation."""
    rule = type(contender.rule)(lr=rate, steps=STEPS)
    losses, accuracies, last, updates, sent = [], [], [], 0.0, 0
    for federation in federations:
        scores: list[tuple[float, int]] = []

        def score(net: Simulation, scores: list[tuple[float, int]] = scores) -> float:
            scores.append((test_accuracy(net), net.clock.down + net.clock.up))
            return train_loss(net)

        loss = follow(federation, rule, contender.schedule, score, 10**6, SECONDS, contender.every)
        accuracy = Scored(loss.seconds, loss.updates, torch.tensor([s[0] for s in scores], dtype=torch.float64))
        ended = float(loss.seconds[-1]) if len(scores) else 0.0
        alive = [torch.where(t <= ended + 1, 1.0, torch.nan) for t in (GRID, LAST)]  # a run that diverged stops
        losses.append(loss.at(GRID) * alive[0])
        accuracies.append(accuracy.at(GRID) * alive[0])
        last.append(loss.at(LAST) * alive[1])
        updates, sent = updates + float(loss.updates[-1]), sent + scores[-1][1]
    n = len(federations)
    return Course(rate, torch.stack(losses), torch.stack(accuracies), torch.stack(last), updates / n, sent / n / 1e6)


def table(swept: dict[str, list[Course]], best: dict[str, Course]) -> list[list[str]]:
    """A row a contender, at its best rate."""
    rows = []
    for name, c in best.items():
        by_rate = ", ".join(f"{other.rate:g}: {other.final:.3f}" for other in swept[name])
        reached = [f"{c.reached(share):.3f}" for share in (0.25, 0.5, 1)]
        numbers = [f"{c.loss[:, -1].mean():.3f}", f"{c.spread:.3f}", f"{c.updates:.0f}", f"{c.megabytes:.1f}"]
        rows.append([name, f"{c.rate:g}", *reached, *numbers, by_rate])
    return rows


def draw(best: dict[str, Course]) -> Figure:
    """The accuracy of the five schedules, and the loss of those in the paper, over virtual time."""
    figure, (left, right) = panels(12, 3, 2, height=4.6)
    colours = dict(zip(best, COLOURS, strict=False))
    for name, c in best.items():
        label = f"{name}, rate {c.rate:g}"
        if name != UNBIASED:
            band(left, GRID, c.accuracy, colours[name], label)
        if name in ("FedAvg", UNBIASED, "FedFix"):
            band(right, GRID, c.loss, colours[name], label)
    for ax in (left, right):
        ax.set(xlabel="virtual time (s)", xlim=(0, SECONDS), xticks=range(0, int(SECONDS) + 1, 5))
    left.set(title="five schedules", ylabel="test accuracy", ylim=(0.3, 1))
    left.legend(frameon=False, loc="lower right")
    right.set(title="the schemes of the paper", ylabel="training loss", yscale="log")
    right.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
    right.set_yticks([], minor=True)
    right.legend(frameon=False, loc="lower left")
    return figure


def reproduce() -> Findings:
    """Measure the claims; about two and a half minutes on one core."""
    fleet = devices(step=f"evenly({1 / STEPS}, {0.2 / STEPS})")
    federations = [Federation(digits(), CLIENTS, dirichlet(0.1), fleet, seed=seed) for seed in SEEDS]
    swept = {name: [course(federations, c, rate) for rate in c.rates] for name, c in CONTENDERS.items()}
    best = {name: min(courses, key=lambda c: c.final) for name, courses in swept.items()}
    windows = [window_law(dt) for dt in WINDOWS]
    shares, weights = arrival_law()
    equal, fast = minimiser(torch.ones(10, dtype=torch.float64)), minimiser(1 / torch.tensor(TAU, dtype=torch.float64))
    ends = {
        "FedFix-0.5": limit(fedfix(window=0.5), 0.02, 600),
        "FedAsync, unbiased": limit(fedasync(weights="unbiased"), 0.01, 1600),
        "FedAsync, all alike": limit(fedasync(alpha=1, staleness=constant()), 0.01, 1600),
    }
    off = [float((x - equal).norm()) for x in ends.values()]
    biased = float((ends["FedAsync, all alike"] - fast).norm())
    fix, sync, alike, mixing = best["FedFix"], best["FedAvg"], best[UNBIASED], best["FedAsync"]
    at_end = [float(c.loss[:, -1].mean()) for c in (fix, sync, alike, mixing)]

    properties = [
        Property(
            "who delivers in FedFix",
            f"with dt = {', '.join(map(str, WINDOWS))} each of ten clients delivers once in ceil(tau_i / dt) windows, and counts"
            " p_i a window on average",
            f"deliveries {'exact' if all(e for e, _ in windows) else 'wrong'}, weights to {max(w for _, w in windows):.0e}",
            all(e and w < 1e-12 for e, w in windows),
        ),
        Property(
            "who delivers in FedAsync",
            f"shares of {DELIVERIES:,} deliveries are 1 / tau_i, and the unbiased weights p_i on average, each within 1 %",
            f"{shares:.2%} and {weights:.2%} off",
            max(shares, weights) < 0.01,
        ),
        Property(
            "quadratics, unbiased",
            "FedFix-0.5 and weighted FedAsync end within 0.01 of the minimiser of sum p_i f_i",
            f"{off[0]:.4f} and {off[1]:.4f} from it",
            max(off[:2]) < 1e-2,
        ),
        Property(
            "quadratics, all alike",
            "FedAsync without weights ends elsewhere: within 0.01 of the minimiser of sum f_i / tau_i",
            f"{biased:.4f} from it, {off[2]:.2f} from that of sum p_i f_i",
            biased < 1e-2 and off[2] > 10 * max(off[:2]),
        ),
        Property(
            "FedFix against FedAvg",
            f"after {SECONDS:g} s a training loss at most that of synchronous FedAvg, each at its best rate",
            f"{at_end[0]:.3f} against {at_end[1]:.3f}",
            at_end[0] <= at_end[1],
        ),
        Property(
            "FedFix is steadier than FedAsync",
            "the loss varies less over the last quarter of the time, each at its best rate",
            f"standard deviation {fix.spread:.3f}; FedAsync {alike.spread:.3f} unbiased, {mixing.spread:.3f} in its own form",
            fix.spread < min(alike.spread, mixing.spread),
        ),
        Property(
            "FedFix against both",
            f"after {SECONDS:g} s more accurate than FedAvg and than FedAsync, each at its best rate",
            f"{fix.reached(1):.3f} against {sync.reached(1):.3f}, and {alike.reached(1):.3f} and {mixing.reached(1):.3f}",
            fix.reached(1) > max(c.reached(1) for c in (sync, alike, mixing)),
        ),
    ]

    return Findings(
        "FedFix, and five schedules on one fleet",
        SETTING,
        properties,
        ("schedule", "rate", "accuracy at 5 s", "at 10 s", "at 20 s", "loss", "its deviation", "updates", "MB", "loss by rate"),
        table(swept, best),
        draw(best),
    )
