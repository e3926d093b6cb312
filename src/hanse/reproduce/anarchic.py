"""Anarchic federated learning (Yang, Zhang, Khanduri, Liu, ICML 2022, arXiv 2108.09875), on quadratics and on the digits."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hanse.data.partition import shards
from hanse.data.tasks import digits, quadratics
from hanse.federation import Federation
from hanse.fleet.distributions import listed
from hanse.fleet.profiles import Fleet, devices
from hanse.methods.anarchic import AFA_CD, AFA_CS
from hanse.methods.base import Method
from hanse.methods.fedavg import FedAvg
from hanse.reproduce.base import SEEDS, Findings, Property, Scored, band, bowls, by_seed, follow, models, panels, test_accuracy
from hanse.schedules.anarchic import anarchic
from hanse.schedules.network import Schedule
from hanse.schedules.synchronous import synchronous
from hanse.track.figures import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UPDATES = 1500
"""Of the quadratics' model."""
ROUNDS, STEPS = 120, 10
"""Of FedAvg; everyone else gets as many worker gradients."""
M, FEWEST, MOST = 10, 1, 20
RATES, SERVER_RATES = (0.5, 0.7, 1.0), (2.0, 3.0)
FLEETS = {
    "unrelated": devices(step="evenly(0.1, 1.0)"),
    "tied to labels": devices(step="by_class(classes=(0, 1, 2, 3, 4), inside=1.0, outside=0.1)"),
}
"""Seconds a local step."""
NAMES = ("AFA-CD", "AFA-CS", "FedAvg")
SETTING = (
    "Quadratics: ten workers with one each, pauses of 20 to 1 seconds on average, 1 to 5 steps a job, every contribution a step"
    f" of the server with lr = 0.001, eta = 0.05; the mean of the last 30 % of {UPDATES} models. Digits: MLP 64-64-10, 20"
    " workers with 2 shards of sorted labels each, batches of 32; a local step takes 0.1 to 1 s, evenly over the workers, or"
    f" 1 s for workers that hold mostly digits 0 to 4 and 0.1 s for the others. FedAvg: {ROUNDS} rounds of {STEPS} steps with"
    f" everyone. AFA: m = {M}, {FEWEST} to {MOST} steps a job, until the workers have computed as many gradients (expected)."
    f" Averages are uniform. With unrelated speeds lr is the best of {', '.join(map(str, RATES))} for FedAvg, and eta the"
    f" better of {' and '.join(map(str, SERVER_RATES))} for each of AFA-CD and AFA-CS with that lr. Accuracy is on the test"
    " set of 360 pictures over the last tenth of a run, means over 3 seeds (bands: lowest to highest); a picture is 0.003."
)


def skewed(rule: Method) -> tuple[Tensor, list[float]]:
    """Every model, ``[UPDATES, P]``, and the staleness of what it was made from.

    Ten quadratics whose workers come once a second to once in twenty, the rare ones being the slow ones as well.
    """
    rate = torch.linspace(0.05, 1, 10)
    schedule = anarchic(m=1, steps=(1, 5), pause=listed(tuple((1 / rate).tolist())))
    path, done = models(bowls(devices(job="evenly(0.6, 0.0)")), rule, schedule, UPDATES)
    return path, [record["staleness"] for record in done.history]


def measured(rule: Method, schedule: Schedule, fleet: Fleet, rounds: int, steps: float) -> list[Scored]:
    """A run a seed on the digits, up to as many gradients as FedAvg computes, if a client update takes ``steps`` of them."""
    runs = []
    for seed in SEEDS:
        federation = Federation(digits(), clients=20, partition=shards(2), fleet=fleet, seed=seed)
        scored = follow(federation, rule, schedule, test_accuracy, rounds, every=3 if rounds > ROUNDS else 2)
        within = scored.updates * steps <= 20 * ROUNDS * STEPS
        runs.append(Scored(*(column[within] for column in scored)))
    return runs


def final(scored: Scored) -> float:
    """Mean accuracy over the last tenth of a run."""
    return float(scored.score[-len(scored.score) // 10 :].mean())


def lasted(runs: Sequence[Scored]) -> float:
    """Mean virtual seconds."""
    return mean(float(scored.seconds[-1]) for scored in runs)


def draw(away: dict[str, Tensor], found: dict[tuple[str, str], list[Scored]]) -> Figure:
    """The way to the optimum of the quadratics, and the accuracy on the digits at both kinds of speeds."""
    figure, (left, *others) = panels(12, 1, 1, 1)
    colours = dict(zip(NAMES, COLOURS, strict=False))
    for name, x in away.items():
        left.plot(range(1, UPDATES + 1), x.norm(dim=1), color=colours[name], lw=0.8, label=name)
    left.set(title="quadratics", xlabel="updates of the model", ylabel="distance from the optimum", yscale="log")
    for ax, speeds in zip(others, FLEETS, strict=True):
        ended = {name: lasted(found[speeds, name]) for name in NAMES}
        at = torch.linspace(0, max(ended.values()), 60, dtype=torch.float64)
        for name in NAMES:
            times = at[at <= ended[name]]
            band(ax, times, torch.stack([scored.at(times) for scored in found[speeds, name]]), colours[name], name)
        ax.set(title=f"digits, speeds {speeds}", xlabel="virtual time (s)", ylabel="test accuracy")
    for ax in (left, *others):
        ax.legend(frameon=False)
    return figure


def reproduce() -> Findings:
    """Measure the claims; about three minutes on one core."""
    paths = {"AFA-CD": skewed(AFA_CD(lr=0.001, server_lr=0.05)), "AFA-CS": skewed(AFA_CS(lr=0.001, server_lr=0.05))}
    away = {name: path - quadratics().optimum() for name, (path, _) in paths.items()}
    distance = {name: float(x[UPDATES - UPDATES * 3 // 10 :].mean(0).norm()) for name, x in away.items()}
    stale = paths["AFA-CS"][1]

    # With speeds unrelated to labels the local rate is tuned for FedAvg, and the server's for each AFA rule.
    rows, found = [], dict[tuple[str, str], list[Scored]]()

    def measure(name: str, rules: Sequence[FedAvg], schedule: Schedule, rounds: int, steps: float) -> FedAvg:
        def runs(rule: FedAvg, speeds: str) -> list[Scored]:
            runs = measured(rule, schedule, FLEETS[speeds], rounds, steps)
            scores = [final(scored) for scored in runs]
            rows.append([speeds, str(rule), f"{mean(scores):.3f}", f"{lasted(runs):.0f}", by_seed(scores)])
            return runs

        tried = [runs(rule, "unrelated") for rule in rules]
        best = max(range(len(rules)), key=lambda i: mean(map(final, tried[i])))
        found["unrelated", name], found["tied to labels", name] = tried[best], runs(rules[best], "tied to labels")
        return rules[best]

    everyone, own = synchronous(cohort=20), anarchic(m=M, steps=(FEWEST, MOST))
    grid = [FedAvg(lr=lr, steps=STEPS, weights="uniform") for lr in RATES]
    lr = measure("FedAvg", grid, everyone, ROUNDS, STEPS).lr
    for name, kind in (("AFA-CD", AFA_CD), ("AFA-CS", AFA_CS)):
        measure(name, [kind(lr=lr, server_lr=eta) for eta in SERVER_RATES], own, 175, (FEWEST + MOST) / 2)
    accuracy = {key: mean(map(final, runs)) for key, runs in found.items()}
    seconds = {key: lasted(runs) for key, runs in found.items()}

    properties = [
        Property(
            "quadratics, AFA-CS",
            "ends within 0.01 of the minimiser of the uniform mean, though some workers come 20 times as often as others",
            f"{distance['AFA-CS']:.4f}; staleness {mean(stale):.1f} on average, {max(stale):.0f} at most",
            distance["AFA-CS"] < 0.01,
        ),
        Property(
            "quadratics, AFA-CD",
            "ends more than 0.5 from it",
            f"{distance['AFA-CD']:.2f}",
            distance["AFA-CD"] > 0.5,
        ),
    ]
    for speeds in FLEETS:
        cd, cs, avg = (accuracy[speeds, name] for name in NAMES)
        properties += [
            Property(
                f"digits, speeds {speeds}: AFA-CS and AFA-CD",
                "AFA-CS is more accurate after equally many worker gradients, by more than one test picture",
                f"{cs:.3f} against {cd:.3f}",
                cs > cd + 1 / 360,
            ),
            Property(
                f"digits, speeds {speeds}: AFA-CS and FedAvg",
                "accuracy within 0.03 of FedAvg's after equally many worker gradients, in less virtual time",
                f"{cs:.3f} against {avg:.3f}, in {seconds[speeds, 'AFA-CS']:.0f} s against {seconds[speeds, 'FedAvg']:.0f} s",
                cs >= avg - 0.03 and seconds[speeds, "AFA-CS"] < seconds[speeds, "FedAvg"],
            ),
        ]

    return Findings(
        "Anarchic federated learning: AFA-CD, AFA-CS and FedAvg",
        SETTING,
        properties,
        ("speeds", "rule", "accuracy", "virtual seconds", "by seed"),
        rows,
        draw(away, found),
    )
