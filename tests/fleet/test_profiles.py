"""Devices and links."""

import pytest
import torch

import hanse as hs
from hanse.core.streams import Streams
from hanse.fleet import Profile, ideal, phones

CLIENTS = torch.arange(20_000)


def test_ideal_devices_take_no_time() -> None:
    assert ideal().profile(Streams(0), CLIENTS) is None


def test_seconds_are_transfers_and_arithmetic() -> None:
    one = Profile(*(torch.tensor([v]) for v in (1e9, 1000.0, 100.0, 0.5)))
    assert one.seconds(torch.tensor([2e9]), 3000, torch.tensor([400])).tolist() == [2 * 0.5 + 3 + 2 + 4]


def test_a_device_is_its_clients_whoever_is_asked_about() -> None:
    fleet, some = phones(), torch.tensor([17, 3, 19_000])
    everyone, few = fleet.profile(Streams(4), CLIENTS), fleet.profile(Streams(4), some)
    assert everyone is not None and few is not None
    for all_values, values in zip(everyone, few, strict=True):
        assert torch.equal(all_values[some], values)
    other = fleet.profile(Streams(5), some)
    assert other is not None and not torch.equal(other.flops, few.flops)


def test_medians_spread_and_share_are_those_asked_for() -> None:
    fleet = phones(slow=0.3, gflops_slow=1, gflops_fast=1000, down_mbit=8, up_mbit=4, latency=0.1, spread=0.5)
    found = fleet.profile(Streams(0), CLIENTS)
    assert found is not None
    slow = found.flops < 3e10
    assert float(slow.double().mean()) == pytest.approx(0.3, abs=0.015)
    assert float(found.flops[slow].median()) == pytest.approx(1e9, rel=0.03)
    assert float(found.flops[~slow].median()) == pytest.approx(1e12, rel=0.03)
    assert float(found.down.median()) == pytest.approx(1e6, rel=0.03) and float(found.up.median()) == pytest.approx(5e5, rel=0.03)
    assert float(found.down.log().std()) == pytest.approx(0.5, rel=0.03)
    assert float(torch.corrcoef(torch.stack([found.down.log(), found.up.log()]))[0, 1]) == pytest.approx(0, abs=0.03)
    assert found.latency.unique().tolist() == [0.1]


def test_no_spread_gives_two_kinds_of_phone() -> None:
    found = phones(spread=0).profile(Streams(0), CLIENTS)
    assert found is not None and found.flops.unique().tolist() == [2e9, 1e10] and len(found.up.unique()) == 1


@pytest.mark.parametrize("wrong", ["phones(slow=1.1)", "phones(spread=-1)", "phones(up_mbit=0)", "phones(latency=-0.1)"])
def test_impossible_phones_are_refused(wrong: str) -> None:
    with pytest.raises(hs.ConfigError, match="not allowed"):
        hs.fleet.Fleet.parse(wrong)
