"""What the experiment on FedZip measures with; the experiment itself takes a minute."""

from __future__ import annotations

import pytest
import torch

from hanse.codecs import Codec
from hanse.data.partition import dirichlet
from hanse.reproduce import fedzip as experiment
from hanse.reproduce.base import digit_federations
from hanse.reproduce.fedzip import CLIENTS, ENTRIES, FED, FEDAVG, OTHERS, PLAIN, RATES, Sweep


@pytest.fixture(scope="module")
def federations():
    return digit_federations(CLIENTS, dirichlet(0.5))[:1]


def test_every_codec_reads_back_from_its_name():
    for text in (*OTHERS, *PLAIN.values(), *FED.values()):
        assert Codec.parse(str(Codec.parse(text))) == Codec.parse(text)


def test_the_ratio_is_that_of_the_coded_updates_alone(federations):
    """Of codes whose length follows from z: the frame, and every tensor's count, centres, count of one centre, and addresses."""
    assert federations[0].problem.layout.size == ENTRIES
    sizes = {"4096": (81, 12), "64": (1, 6), "640": (12, 10), "10": (1, 4)}
    coded = 16 + sum(1 + 8 + 1 + -(-m * bits // 8) for m, bits in sizes.values())
    found = experiment.measure(federations, "fedzip(0.02, encoding='positions')", RATES[0], rounds=1)
    assert found.ratio == pytest.approx(4 * ENTRIES / coded)
    assert found.accuracy.shape == (1, 1)
    plain = experiment.measure(federations, FEDAVG, RATES[0], rounds=1)
    assert plain.message > 4 * ENTRIES and plain.ratio == pytest.approx(1, abs=0.01)


def test_no_message_is_shorter_than_one_with_an_entry_of_each_tensor(federations):
    assert experiment.largest_ratio(federations[0]) == 4 * ENTRIES / (16 + 13 + 12 + 13 + 12)


def test_a_codec_is_matched_by_one_that_is_no_worse_in_both():
    def sweep(accuracy: float, message: float) -> Sweep:
        return Sweep(0.5, torch.full((2, 30), accuracy, dtype=torch.float64), message)

    other = sweep(0.9, 500)
    assert experiment.matched(other, [sweep(0.8, 100), sweep(0.9, 500)])
    assert not experiment.matched(other, [sweep(0.95, 501), sweep(0.89, 100)])
    assert not experiment.matched(other, [])
