"""RFFL (Xu, Lyu, FL-ICML 2021, arXiv 2011.10464), on the digits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from hanse.attacks import Attack, free_rider, inversion, label_flip, rescale, sign_flip, sign_random
from hanse.core.messages import Reply
from hanse.core.optim import constant
from hanse.core.streams import Streams
from hanse.data.partition import Partition, shuffled
from hanse.data.task import Dataset
from hanse.data.tasks import digits
from hanse.engines.local import local
from hanse.engines.simulation import Simulation
from hanse.experiment import per_node, run
from hanse.federation import Federation
from hanse.methods.base import State
from hanse.methods.rffl import RFFL
from hanse.reproduce.base import Findings, Property, panels
from hanse.schedules.synchronous import synchronous
from hanse.track.figures import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS, HONEST, LIARS, ROUNDS, GAMMA, FAIR = (0, 1), 5, 2, 40, 0.5, 90
SHARE = LIARS / (HONEST + LIARS)
WORK = {"lr": constant(value=0.1), "epochs": 2, "gamma": GAMMA}
CAUGHT: dict[str, Attack] = {
    "free riders": free_rider(share=SHARE, norm=GAMMA),
    "signs turned": sign_flip(share=SHARE),
    "signs at random": sign_random(share=SHARE),
    "values inverted": inversion(share=SHARE),
    "re-scaling": rescale(share=SHARE),
}
FLIPPED: dict[str, Attack] = {"labels 1 to 7": label_flip(share=SHARE, source=1, target=7)}
SETTING = (
    f"Digits, MLP 64-64-10, {HONEST} honest participants with 33, 66, 132, 265 and 530 samples (1:2:4:8:16) and {LIARS} adversaries"
    f" with 205, the mean; {ROUNDS} rounds of 2 passes over the data at a rate of 0.1, gamma {GAMMA}, alpha 0.95, beta 1/3,"
    f" removal from round 10 on (rounds are counted from 0), {len(SEEDS)} seeds. Accuracy is on the test set of 360 pictures, of"
    " every participant's own model after its last update. Alone: the same work without rewards, updates not cut. Fairness: 100"
    " times Pearson's correlation of the honest participants' accuracies alone and with RFFL."
)


class doubling(Partition):
    """Samples dealt out at random, each honest client having twice as many as the one before it, and liars the mean of these."""

    abstract: ClassVar[bool] = True

    def deal(self, data: Dataset, clients: int, streams: Streams) -> tuple[Tensor, Tensor]:
        lies = Attack(share=SHARE).liars(clients, streams)  # the same under every attack
        size = torch.zeros(clients, dtype=torch.float64)
        size[~lies] = 2.0 ** torch.arange(HONEST, dtype=torch.float64)
        size[lies] = size[~lies].mean()
        ends = (size.cumsum(0) / size.sum() * len(data.x)).round().long()
        return shuffled(len(data.x), streams, "partition"), torch.diff(ends, prepend=torch.zeros(1, dtype=torch.long))


class Alone(RFFL):
    """Nobody ever gets anything: the aggregate stays what it is before round 0, nothing."""

    abstract: ClassVar[bool] = True

    def step(self, state: State, reply: Reply, round: int) -> State:
        return state


class Outcome(NamedTuple):
    """A run: reputations of the honest in the order of their sizes, ``[5]``, their accuracies with RFFL and alone, and the round in
    which each of the honest and of the liars was removed (None: never).
    """

    r: Tensor
    final: Tensor
    alone: Tensor
    honest_out: list[int | None]
    liars_out: list[int | None]

    @property
    def fairness(self) -> float:
        """100 times the correlation of the accuracies."""
        return 100 * float(torch.corrcoef(torch.stack([self.alone, self.final]))[0, 1])

    @property
    def grows(self) -> bool:
        """Whether reputations grow with size."""
        return bool((self.r.diff() > 0).all())


def play(federation: Federation, rule: RFFL, attack: Attack | None) -> Simulation:
    """The network of a run after its last round."""
    nets: list[Simulation] = []
    everyone = federation.clients
    engine = local(path="stacked", chunk=everyone, workers=1, threads=1)
    how = {"rounds": ROUNDS, "evaluate": 0, "engine": engine}
    run(federation, rule, synchronous(cohort=everyone), attack=attack, on_start=nets.append, **how)  # type: ignore[arg-type]
    return nets[0]


def outcome(net: Simulation, alone: Tensor) -> Outcome:
    """What came out, given the accuracies alone."""
    assert net.adversaries is not None
    lies, active = net.adversaries.liars, net.state["active"]
    out = [None if stays else rounds - 1 for stays, rounds in zip(active.tolist(), net.taken.tolist(), strict=True)]
    honest, liars = ([out[i] for i in which.nonzero()[:, 0].tolist()] for which in (~lies, lies))
    return Outcome(net.state["r"][~lies], per_node(net)["accuracy"], alone, honest, liars)


def listed(values: Tensor) -> str:
    """Numbers, as a cell of a table."""
    return " ".join(f"{value:.3f}" for value in values.tolist())


def rounds(out: list[int | None]) -> str:
    """In which rounds they were removed, as a cell of a table."""
    return " ".join("-" if t is None else str(t) for t in out)


def by_run(outs: Iterable[list[int | None]]) -> str:
    """The rounds of several runs."""
    return " / ".join(rounds(out) for out in outs)


def draw(found: dict[str, list[Outcome]]) -> Figure:
    """Reputations by size, and accuracies with RFFL by those alone."""
    figure, (left, right) = panels(10, 1, 1, height=4.5)
    for (name, outcomes), colour in zip(found.items(), COLOURS, strict=False):
        for outcome, marker in zip(outcomes, "ox", strict=True):
            left.plot(range(HONEST), outcome.r, f"{marker}-", color=colour, alpha=0.7, label=name if marker == "o" else None)
            right.plot(outcome.alone, outcome.final, marker, color=colour, alpha=0.7)
    left.set(title="honest participants", xlabel="samples", ylabel="reputation after the last round", ylim=(0, None))
    left.set_xticks(range(HONEST), ["33", "66", "132", "265", "530"])
    right.plot([0.6, 1], [0.6, 1], color="grey", lw=0.8, ls=":")
    right.set(title="o, x: seeds", xlabel="test accuracy alone", ylabel="test accuracy of the own model")
    figure.legend(frameon=False, loc="outside lower center", ncols=len(found))
    return figure


def reproduce() -> Findings:
    """Measure the claims; about a minute and a half on one core."""
    federations = [Federation(digits(), HONEST + LIARS, doubling(test=0), seed=seed) for seed in SEEDS]
    honest = [~Attack(share=SHARE).liars(HONEST + LIARS, federation.streams) for federation in federations]
    solitary = Alone(**{**WORK, "gamma": 1e6})
    alone = [per_node(play(fed, solitary, None))["accuracy"][who] for fed, who in zip(federations, honest, strict=True)]
    rows = []

    def measure(name: str, attack: Attack, rule: RFFL) -> list[Outcome]:
        found = [outcome(play(fed, rule, attack), acc) for fed, acc in zip(federations, alone, strict=True)]
        for seed, one in zip(SEEDS, found, strict=True):
            out = rounds(one.liars_out), rounds(one.honest_out)
            rows.append([name, str(seed), *out, listed(one.r), listed(one.alone), listed(one.final), f"{one.fairness:.1f}"])
        return found

    caught = {name: measure(name, attack, RFFL(**WORK)) for name, attack in CAUGHT.items()}
    flipped = {name: measure(name, attack, RFFL(**WORK)) for name, attack in FLIPPED.items()}
    measure("free riders; reward = replace", CAUGHT["free riders"], RFFL(**WORK, reward="replace"))

    every = [one for outcomes in caught.values() for one in outcomes]
    gains = torch.stack([one.final - one.alone for one in every])
    (flips,) = flipped.values()
    properties = [
        Property(
            "removal",
            "under each of the five attacks on updates the adversaries, and nobody else, are removed in round 10 in every seed",
            "; ".join(f"{name}: {by_run(one.liars_out for one in found)}" for name, found in caught.items())
            + f"; honest: {sum(t is not None for one in every for t in one.honest_out)}",
            all(one.liars_out == [10] * LIARS and one.honest_out == [None] * HONEST for one in every),
        ),
        Property(
            "fairness",
            f"the correlation is above {FAIR} under each attack in every seed",
            f"{min(one.fairness for one in every):.1f} to {max(one.fairness for one in every):.1f}",
            min(one.fairness for one in every) > FAIR,
        ),
        Property(
            "reputations",
            "grow from each honest participant to the next larger one",
            f"in {sum(one.grows for one in every)} of {len(every)} runs; smallest to largest "
            + " / ".join(listed(one.r) for one in caught["free riders"]),
            all(one.grows for one in every),
        ),
        Property(
            "gain",
            "no honest participant is less accurate than alone",
            f"smallest participant {float(gains[:, 0].min()):+.3f} to {float(gains[:, 0].max()):+.3f}, largest"
            f" {float(gains[:, -1].min()):+.3f} to {float(gains[:, -1].max()):+.3f}, least of all {float(gains.min()):+.3f}",
            float(gains.min()) >= 0,
        ),
        Property(
            "label flippers",
            "1 for 7: they are not removed",
            f"{by_run(one.liars_out for one in flips)}; of the honest {by_run(one.honest_out for one in flips)}",
            all(one.liars_out == [None] * LIARS for one in flips),
        ),
    ]
    return Findings(
        "RFFL: reputations, fairness and removals",
        SETTING,
        properties,
        ("adversaries", "seed", "removed in", "honest removed in", "reputations", "alone", "with RFFL", "fairness"),
        rows,
        draw({**caught, **flipped}),
    )
