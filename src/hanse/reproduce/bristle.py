"""Bristle (Verbraeken, de Vos, Pouwelse, 2021, arXiv 2110.11006), on the digits."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from hanse.aggregators import Merge, average, krum, median, robust, trimmed_mean
from hanse.attacks import Attack, label_flip
from hanse.attacks import random as noise
from hanse.core.layout import Layout
from hanse.data.partition import neighbouring
from hanse.data.tasks import digits
from hanse.engines.local import local
from hanse.experiment import run
from hanse.federation import Federation
from hanse.methods.bristle import Bristle
from hanse.reproduce.base import SEEDS, Findings, Property, by_seed, panels
from hanse.schedules.bristle import bristle
from hanse.schedules.gossip import gossip
from hanse.schedules.network import Schedule
from hanse.topologies import Mixing, complete
from hanse.track.figures import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PEERS, LIARS, ROUNDS, FEATURES = 15, 5, 150, 128
RATES = (0.001, 0.01, 0.1)
"""The first is the authors'."""
SETTING = (
    f"Digits, {FEATURES} random features (two layers of rectified units, He's initial weights), of which the output weights are"
    f" trained. {PEERS} peers that all know each other, with 4 neighbouring classes each, 5 samples of each class to train on and"
    f" 10 to test others on; {LIARS} of them lie: they train on labels 9 - y, or send normal noise instead of what they learned,"
    " and merge as everybody does."
    f" {ROUNDS} rounds of one step of Adam on 5 samples, L2 0.005. All rows take these steps and move the columns of their own"
    " classes; they differ in what a peer makes of the columns it receives. Accuracy is on the test set of 360 pictures of all"
    " classes, the mean over the honest peers of their own models after the last round, means over 3 seeds; a picture is 0.003."
    f" Best: the best rate of {', '.join(map(str, RATES))} for each row under each attack; {RATES[0]} is the authors'."
    " Krum: half way from one's own columns to the winner's, as in the authors' code."
)


class features(digits):
    """The digits with a network of random features below a linear layer."""

    abstract: ClassVar[bool] = True
    hidden: int = FEATURES
    """Width of both hidden layers."""

    def model(self) -> nn.Module:
        first, second = nn.Linear(64, self.hidden, bias=False), nn.Linear(self.hidden, self.hidden, bias=False)
        for layer in (first, second):
            nn.init.kaiming_normal_(layer.weight)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(self.hidden, 10, bias=False))


class alone(Merge):
    """Nothing of others."""

    abstract: ClassVar[bool] = True

    def __call__(self, own: Tensor, received: Tensor, mixing: Mixing, layout: Layout) -> Tensor:
        return own


class halfway(Merge):
    """Half way to what another merge says."""

    abstract: ClassVar[bool] = True
    to: Merge
    """The other merge."""

    def __call__(self, own: Tensor, received: Tensor, mixing: Mixing, layout: Layout) -> Tensor:
        return own.lerp(self.to(own, received, mixing, layout), 0.5)


MERGES: dict[str, Merge] = {
    "local": alone(),
    "average": average(),
    "median": robust(median()),
    "trimmed mean": robust(trimmed_mean(LIARS)),
    "Krum": halfway(robust(krum(LIARS))),
}
SCHEDULES: dict[str, Schedule] = {name: gossip(complete(), merge=merge) for name, merge in MERGES.items()} | {"Bristle": bristle()}
ATTACKS: dict[str, Attack | None] = {
    "no attack": None,
    "label flip": label_flip(share=LIARS / PEERS),
    "noise": noise(share=LIARS / PEERS),
}


def federation(seed: int) -> Federation:
    """The peers of one seed."""
    return Federation(features(), PEERS, neighbouring(each=15, test=2 / 3), frozen=("0.*", "2.*"), seed=seed)


def accuracy(peers: Federation, schedule: Schedule, attack: Attack | None, lr: float, rounds: int = ROUNDS) -> float:
    """Mean accuracy of the honest peers' own models on all classes, after the last round."""
    engine = local(path="vmap", chunk=PEERS, workers=1, threads=1)
    done = run(peers, Bristle(lr=lr), schedule, rounds=rounds, evaluate=0, engine=engine, attack=attack)
    return done.history[-1]["metrics"]["node_accuracy"]


def gains(found: Tensor, name: str, attack: str) -> float:
    """What Bristle has more than the row ``name`` under ``attack``, of means ``[rows, attacks]``."""
    names, column = list(SCHEDULES), list(ATTACKS).index(attack)
    return float(found[-1, column] - found[names.index(name), column])


def claim(name: str, others: tuple[str, ...], attacks: tuple[str, ...], least: float, found: Tensor) -> Property:
    """That Bristle is above all ``others`` by ``least`` under all ``attacks``."""
    each = {(attack, other): gains(found, other, attack) for attack in attacks for other in others}
    measured = "; ".join(f"{attack}, {other}: {gain:+.3f}" for (attack, other), gain in each.items())
    what = f"at least {least} above {' and '.join(others)}" if least > 0 else f"at most {-least} below {' and '.join(others)}"
    return Property(name, f"{what} ({', '.join(attacks)})", measured, min(each.values()) >= least)


def draw(authors: Tensor, best: Tensor) -> Figure:
    """Bars of the mean accuracies ``[rows, attacks]`` at the authors' rate, and at the best one."""
    figure, axes = panels(10, 1, 1)
    for ax, found, title in zip(axes, (authors, best), (f"lr = {RATES[0]}", "each at its best rate"), strict=True):
        for column, (attack, colour) in enumerate(zip(ATTACKS, COLOURS, strict=False)):
            places = [row + 0.27 * (column - 1) for row in range(len(SCHEDULES))]
            ax.bar(places, found[:, column].tolist(), 0.25, color=colour, label=attack)
        ax.set_xticks(range(len(SCHEDULES)), list(SCHEDULES), rotation=20)
        ax.set(title=title, ylabel="accuracy on all classes", ylim=(0, 1))
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=len(ATTACKS))
    return figure


def reproduce() -> Findings:
    """Measure the claims; about three minutes on one core."""
    peers = [federation(seed) for seed in SEEDS]
    shape = (len(SCHEDULES), len(ATTACKS), len(RATES), len(SEEDS))
    found = torch.tensor(
        [
            accuracy(each, schedule, attack, lr)
            for schedule in SCHEDULES.values()
            for attack in ATTACKS.values()
            for lr in RATES
            for each in peers
        ],
        dtype=torch.float64,
    ).view(shape)
    means = found.mean(-1)
    authors, best = means[..., 0], means.max(-1).values
    attacks = tuple(ATTACKS)[1:]
    properties = [
        claim(f"{what}{where}", others, under, least, values)
        for values, where in ((authors, ", at the authors' rate"), (best, ", each at its best rate"))
        for what, others, under, least in (
            ("without attack", ("average",), ("no attack",), -0.05),
            ("attacked, average", ("average",), attacks, 0.2),
            ("attacked, robust rules", ("median", "Krum"), attacks, 0.1),
        )
    ]
    rows = [
        [name, attack, str(rate), by_seed(found[i, j, k].tolist()), f"{float(means[i, j, k]):.3f}"]
        for i, name in enumerate(SCHEDULES)
        for j, attack in enumerate(ATTACKS)
        for k, rate in enumerate(RATES)
    ]
    return Findings(
        "Bristle against other ways to merge output columns",
        SETTING,
        properties,
        ("what a peer makes of others' columns", "attack", "lr", "accuracy, by seed", "mean"),
        rows,
        draw(authors, best),
    )
