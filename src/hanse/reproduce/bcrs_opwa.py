"""BCRS and OPWA (Tang, Huang, Yan, Wang, Tang, Shi, Zhou, Chu, ICPP 2024, arXiv 2408.14736), on the digits."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hanse.codecs.base import Codec
from hanse.data.partition import dirichlet
from hanse.data.tasks import digits
from hanse.engines.simulation import Simulation
from hanse.federation import Federation
from hanse.fleet.distributions import lognormal, uniform
from hanse.fleet.profiles import devices
from hanse.methods.fedavg import FedAvg
from hanse.methods.opwa import OPWA
from hanse.reproduce.base import SEEDS, Findings, Property, panels, test_accuracy, ticks, watch
from hanse.schedules.synchronous import synchronous
from hanse.track.figures import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLIENTS, COHORT, ROUNDS, LAST = 10, 5, 40, 10
LEARNING = {"lr": 0.1, "epochs": 2, "batch": 32}
RATIOS = (0.01, 0.1)
SETTING = (
    f"Digits, MLP 64-64-10, {CLIENTS} clients by Dirichlet 0.1, {COHORT} a round, {ROUNDS} rounds of 2 local epochs of 32 samples,"
    " lr 0.1. Links to the server of log-normal bandwidth (median 1 Mbit/s, sigma 0.5) and latencies of 50 to 200 ms, a client's"
    " own; computing and the way down take no time. Accuracy on the test set, mean over the last 10 rounds, means over 3 seeds"
    " (bands: lowest to highest). OPWA with r = 1 and gamma = 5. Seconds to the target: virtual time until the mean of five"
    " rounds reaches what top-k has over its last ten. The figure is that of CR* = 0.01."
)


class Course(NamedTuple):
    """A rule through a codec, after every round, float64 ``[seeds, rounds]``: virtual seconds, bytes up, test accuracy."""

    seconds: Tensor
    up: Tensor
    accuracy: Tensor

    @property
    def score(self) -> float:
        """Accuracy over the last rounds, mean over seeds."""
        return float(self.accuracy[:, -LAST:].mean())

    def reached(self, target: float) -> float:
        """Virtual seconds until the mean of five rounds first is at least ``target``, mean over seeds; inf if never for one."""
        smooth = self.accuracy.unfold(1, 5, 1).mean(2)
        first = (smooth >= target).double().argmax(1) + 4
        there = (smooth >= target).any(1)
        return float(torch.where(there, self.seconds.gather(1, first[:, None])[:, 0], torch.inf).mean())


def federation(seed: int) -> Federation:
    """The clients and links of one seed."""
    links = devices(up=lognormal(1, 0.5), latency=uniform(0.05, 0.2))
    return Federation(digits(), CLIENTS, dirichlet(0.1), links, seed=seed)


def course(rule: type[FedAvg], codec: str) -> Course:
    """All seeds of one rule through one codec."""
    found: list[tuple[float, float, float]] = []

    def look(net: Simulation) -> None:
        found.append((net.now, float(net.clock.up), test_accuracy(net)))

    for seed in SEEDS:
        watch(federation(seed), rule(**LEARNING), synchronous(COHORT), look, ROUNDS, chunk=COHORT, codec=Codec.parse(codec))
    return Course(*torch.tensor(found, dtype=torch.float64).view(len(SEEDS), ROUNDS, 3).permute(2, 0, 1))


def ways(ratio: float) -> dict[str, tuple[type[FedAvg], str]]:
    """What is compared at one base ratio."""
    return {
        "top-k": (FedAvg, f"topk({ratio})"),
        "top-k, error feedback": (FedAvg, f"feedback(topk({ratio}))"),
        "top-k, OPWA": (OPWA, f"topk({ratio})"),
        "BCRS": (FedAvg, f"bcrs({ratio})"),
        "BCRS, OPWA": (OPWA, f"bcrs({ratio})"),
    }


WHOLE = {
    "FedAvg": (FedAvg, "identity"),
    "8 bits": (FedAvg, "layers | uniform(8)"),
    "FedZip": (FedAvg, "fedzip(0.1)"),
}


def draw(found: dict[float, dict[str, Course]]) -> Figure:
    """Accuracy against bytes and against virtual time."""
    figure, (left, right) = panels(11, 1, 1, height=5)
    colours = dict(zip([name for name in found[RATIOS[0]] if "OPWA" not in name], COLOURS, strict=False))
    for name, one in found[RATIOS[0]].items():
        colour, style = colours[name.removesuffix(", OPWA")], "--" if "OPWA" in name else "-"
        _line(left, one.up / 1e6, one.accuracy, colour, style, name)
        _line(right, one.seconds, one.accuracy, colour, style, name)
    left.set(xlabel="MB from the clients", ylabel="test accuracy, mean of five rounds", xscale="log")
    ticks(left, (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 4))
    right.set(xlabel="virtual time (s)", xlim=(0, None))
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=4)
    return figure


def _line(ax: Axes, x: Tensor, y: Tensor, colour: str, style: str, label: str) -> None:
    smooth = y.unfold(1, 5, 1).mean(2)
    at = x.mean(0)[4:]
    ax.plot(at, smooth.mean(0), style, color=colour, label=label)
    ax.fill_between(at, smooth.min(0).values, smooth.max(0).values, color=colour, alpha=0.1, lw=0)


def reproduce() -> Findings:
    """Measure the claims; about a minute on one core."""
    whole = {name: course(*way) for name, way in WHOLE.items()}
    found = {ratio: {**whole, **{name: course(*way) for name, way in ways(ratio).items()}} for ratio in RATIOS}
    strong, mild = (found[ratio] for ratio in RATIOS)
    target = {ratio: one["top-k"].score for ratio, one in found.items()}
    times = {name: one.reached(target[RATIOS[0]]) for name, one in strong.items()}

    def order(*names: str) -> str:
        return ", ".join(f"{name} {strong[name].score:.3f}" for name in names)

    longest = max(float((strong[name].seconds[:, -1] / strong["top-k"].seconds[:, -1]).max()) for name in ("BCRS", "BCRS, OPWA"))
    properties = [
        Property(
            "bandwidth",
            "at CR* = 0.01 top-k < BCRS < BCRS with OPWA in accuracy",
            order("top-k", "BCRS", "BCRS, OPWA"),
            strong["top-k"].score < strong["BCRS"].score < strong["BCRS, OPWA"].score,
        ),
        Property(
            "overlap",
            "at CR* = 0.01 top-k < top-k with OPWA in accuracy",
            order("top-k", "top-k, OPWA"),
            strong["top-k"].score < strong["top-k, OPWA"].score,
        ),
        Property(
            "time to accuracy",
            "BCRS with OPWA reaches the final accuracy of top-k at CR* = 0.01 in less virtual time than top-k",
            f"{times['BCRS, OPWA']:.1f} s against {times['top-k']:.1f} s",
            times["BCRS, OPWA"] < times["top-k"],
        ),
        Property(
            "time of a round",
            "BCRS takes no longer than top-k at CR*, but for its header",
            f"{100 * (longest - 1):.2f} % longer over {ROUNDS} rounds at most",
            longest < 1.02,
        ),
        Property(
            "against no compression",
            "at CR* = 0.1 BCRS with OPWA is more accurate than FedAvg, which sends everything",
            f"{mild['BCRS, OPWA'].score:.3f} against {mild['FedAvg'].score:.3f}",
            mild["BCRS, OPWA"].score > mild["FedAvg"].score,
        ),
    ]
    rows = []
    for ratio, courses in found.items():
        for name, one in courses.items():
            if name in whole and ratio != RATIOS[0]:
                continue
            reached = one.reached(target[ratio])
            rows.append(
                [
                    name,
                    "" if name in whole else f"{ratio}",
                    f"{one.score:.3f}",
                    f"{float(one.up[:, -1].mean()) / 1e6:.3f}",
                    f"{float(one.seconds[:, -1].mean()):.1f}",
                    "never in one seed" if reached == torch.inf else f"{reached:.1f}",
                ]
            )
    return Findings(
        "BCRS and OPWA on unequal links",
        SETTING,
        properties,
        ("rule and codec", "CR*", "accuracy", "MB up", "virtual seconds", "seconds to the target"),
        rows,
        draw(found),
    )
