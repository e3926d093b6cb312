"""Fleets with a name."""

import math

import pytest
import torch

import hanse as hs
from hanse.core.streams import Streams
from hanse.fleet import Fleet, Population, Work, laptops, phones, silos

N = 20_000
PEOPLE, CLIENTS = Population(Streams(0), N), torch.arange(N)


def test_phones_are_slow_or_fast() -> None:
    found = phones().profile(PEOPLE, CLIENTS)
    assert found is not None
    log = (found.flops / 1e9).log()
    assert float(log.mean()) == pytest.approx(math.log(20) / 2, abs=0.02)
    assert float(log.var()) == pytest.approx(
        0.4**2 + math.log(10 / 2) ** 2 / 4, rel=0.03
    )  # spread within, and between the two kinds
    assert float(found.down.median()) == pytest.approx(20e6 / 8, rel=0.03)
    assert float(found.up.median()) == pytest.approx(5e6 / 8, rel=0.03)
    assert float(found.down.log().std()) == pytest.approx(0.4, rel=0.03)
    assert float(torch.corrcoef(torch.stack([found.down.log(), found.up.log()]))[0, 1]) == pytest.approx(0, abs=0.03)
    assert found.latency.unique().tolist() == [0.05]


def test_the_mixture_of_phones_can_be_another() -> None:
    fleet = Fleet.parse("phones(gflops=mixture((1, 1000), (0.3, 0.7)), latency=0.1)")
    found = fleet.profile(PEOPLE, CLIENTS)
    assert found is not None and found.flops.unique().tolist() == [1e9, 1e12] and found.latency.unique().tolist() == [0.1]
    assert float((found.flops == 1e9).double().mean()) == pytest.approx(0.3, abs=0.015)
    assert torch.equal(found.up, phones().profile(PEOPLE, CLIENTS).up)  # type: ignore[union-attr]


def test_silos_beat_laptops_beat_phones() -> None:
    work = Work(torch.ones(N), torch.full((N,), 1e12), 1e9)
    medians = []
    for fleet in (silos(), laptops(), phones()):
        found = fleet.profile(PEOPLE, CLIENTS)
        assert found is not None
        times = (found.compute(work), 1e6 / found.down, 1e6 / found.up, found.latency)
        medians.append(torch.stack([time.median() for time in times]))
    assert (medians[0] < medians[1]).all() and (medians[1] < medians[2]).all()


@pytest.mark.parametrize("fleet", [phones(), laptops(), silos()])
def test_writing_it_down_and_reading_it_back_changes_nothing(fleet: Fleet) -> None:
    assert str(fleet) == type(fleet).__name__
    assert Fleet.parse(str(fleet)) == fleet == Fleet.parse(fleet.full())


@pytest.mark.parametrize("wrong", ["phones(loss=1.1)", "phones(gflops=0)", "phones(up=0)", "phones(latency=-0.1)"])
def test_impossible_phones_are_refused(wrong: str) -> None:
    with pytest.raises(hs.ConfigError, match="not allowed"):
        Fleet.parse(wrong)
