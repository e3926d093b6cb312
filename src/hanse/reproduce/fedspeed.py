"""FedSpeed (Sun, Shen, Huang, Ding, Tao, ICLR 2023, arXiv 2302.10429), on the digits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from hanse.data.partition import shards
from hanse.methods.fedavg import FedAvg
from hanse.methods.fedprox import FedProx
from hanse.methods.fedspeed import FedSpeed
from hanse.reproduce.base import (
    Findings,
    Property,
    band,
    by_seed,
    digit_federations,
    distance_to_optimum,
    panels,
    scores,
    test_accuracy,
    ticks,
)
from hanse.track.figures import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROUNDS, COHORT, LAST = 100, 5, 10
RATES = (0.1, 0.3, 0.5, 1.0)
EPOCHS = (1, 5, 20)
SETTING = (
    f"Digits, MLP 64-64-10, 20 clients with 2 shards of sorted labels each, {COHORT} a round, {ROUNDS} rounds, batches of 32,"
    f" means over 3 seeds (bands: lowest to highest). Accuracy is on the test set of 360 pictures, over the last {LAST} rounds."
    f" The local rate is the best of {', '.join(map(str, RATES))} for FedAvg with 5 epochs; FedSpeed has lam = 10, rho = 0.1,"
    " alpha = 1."
)


def final(accuracy: Tensor) -> float:
    """Mean over seeds and the last rounds; 0 if a run diverged."""
    return float(accuracy[:, -LAST:].mean().nan_to_num(0.0))


def draw(eta: float, curves: dict[str, Tensor], average: dict[int, Tensor], speed: dict[int, Tensor]) -> Figure:
    """The accuracy with 5 local epochs, and at the end with each number of them."""
    figure, (left, right) = panels(10, 1, 1)
    for (label, accuracy), colour in zip(curves.items(), COLOURS, strict=False):
        band(left, range(1, ROUNDS + 1), accuracy, colour, label)
    left.set(title=f"5 local epochs, rate {eta}", xlabel="rounds", ylabel="test accuracy")
    for label, sweep, colour in (("FedAvg", average, COLOURS[0]), ("FedSpeed", speed, COLOURS[2])):
        right.plot(EPOCHS, [final(sweep[epochs]) for epochs in EPOCHS], "o-", color=colour, label=label)
    right.set(title=f"last {LAST} of {ROUNDS} rounds", xlabel="local epochs", ylabel="test accuracy", xscale="log")
    ticks(right, EPOCHS)
    for ax in (left, right):
        ax.legend(frameon=False, loc="lower right")
    return figure


def reproduce() -> Findings:
    """Measure the claims; about one and a half minutes on one core."""
    federations = digit_federations(20, shards(2))
    rows = []

    def measure(rule: FedAvg) -> Tensor:
        accuracy = scores(federations, rule, COHORT, ROUNDS, test_accuracy)
        rows.append([str(rule), f"{final(accuracy):.3f}", by_seed(accuracy[:, -LAST:].mean(1))])
        return accuracy

    # The rate is tuned for FedAvg and used for all; the proximal strength is tuned for FedProx; FedSpeed has its defaults.
    tuning = {rate: measure(FedAvg(lr=rate, epochs=5)) for rate in RATES}
    eta = max(RATES, key=lambda rate: final(tuning[rate]))
    proximal = {mu: measure(FedProx(lr=eta, epochs=5, mu=mu)) for mu in (0.001, 0.01, 0.1)}
    mu = max(proximal, key=lambda value: final(proximal[value]))
    average = {epochs: tuning[eta] if epochs == 5 else measure(FedAvg(lr=eta, epochs=epochs)) for epochs in EPOCHS}
    speed = {epochs: measure(FedSpeed(lr=eta, epochs=epochs)) for epochs in EPOCHS}
    drops = [max(map(final, sweep.values())) - final(sweep[EPOCHS[-1]]) for sweep in (speed, average)]
    ends = {mode: distance_to_optimum(FedSpeed(lr=0.1, steps=10, lam=1, rho=0, mode=mode), 3, 250) for mode in ("all", "selected")}
    stops = distance_to_optimum(FedAvg(lr=0.1, steps=10), 10, 80)

    properties = [
        Property(
            "against FedAvg",
            "accuracy at least that of FedAvg, at FedAvg's best rate",
            f"{final(speed[5]):.3f} against {final(average[5]):.3f} at rate {eta}",
            final(speed[5]) >= final(average[5]),
        ),
        Property(
            "against FedProx",
            "accuracy at least that of FedProx with its best mu, at the same rate",
            f"{final(speed[5]):.3f} against {final(proximal[mu]):.3f} with mu = {mu}",
            final(speed[5]) >= final(proximal[mu]),
        ),
        Property(
            "longer local training",
            f"from its best of {', '.join(map(str, EPOCHS))} local epochs to {EPOCHS[-1]} it loses less accuracy than FedAvg",
            f"loses {drops[0]:.3f}, FedAvg {drops[1]:.3f} (a test sample is 0.003)",
            drops[0] < drops[1],
        ),
        Property(
            "longest local training",
            f"accuracy with {EPOCHS[-1]} local epochs is above FedAvg's best over all of them",
            f"{final(speed[EPOCHS[-1]]):.3f} against {max(map(final, average.values())):.3f}",
            final(speed[EPOCHS[-1]]) > max(map(final, average.values())),
        ),
        Property(
            "quadratics, mode all",
            "reaches the optimum with 3 of 10 clients a round",
            f"{ends['all']:.0e} from it after 250 rounds; FedAvg with all clients stops at {stops:.2f}",
            ends["all"] < 1e-9,
        ),
        Property(
            "quadratics, mode selected",
            "does not converge with 3 of 10 clients a round",
            f"{ends['selected']:.1f} from the optimum after 250 rounds",
            ends["selected"] > 1,
        ),
    ]

    return Findings(
        "FedSpeed against FedAvg and FedProx",
        SETTING,
        properties,
        ("rule", "accuracy", "by seed"),
        rows,
        draw(eta, {"FedAvg": average[5], f"FedProx, mu = {mu}": proximal[mu], "FedSpeed": speed[5]}, average, speed),
    )
