"""Devices and links."""

import math

import pytest
import torch

import hanse as hs
from hanse.core.streams import Streams
from hanse.fleet import Fleet, Population, Profile, Work, devices, ideal

N = 20_000
CLIENTS = torch.arange(N)
PEOPLE = Population(Streams(0), N)


def profile(fleet: Fleet, clients: torch.Tensor = CLIENTS, people: Population = PEOPLE) -> Profile:
    found = fleet.profile(people, clients)
    assert found is not None
    return found


def seconds(fleet: Fleet, steps: int, flops: float, memory: float = 0.0) -> float:
    """Computing time of client 0."""
    work = Work(torch.tensor([steps]), torch.tensor([flops], dtype=torch.float64), memory)
    return float(profile(fleet, torch.tensor([0])).compute(work))


def test_ideal_devices_take_no_time() -> None:
    assert ideal().profile(PEOPLE, CLIENTS) is None


def test_devices_of_which_nothing_is_said_take_no_time_either() -> None:
    found = profile(devices(), torch.tensor([0, 5]))
    assert found.compute(Work(torch.tensor([3, 4]), torch.tensor([1e15, 0.0]), 1e12)).tolist() == [0, 0]
    assert found.compute(Work(torch.tensor([3, 4]), torch.tensor([1e15, 0.0]), 0.0)).tolist() == [0, 0]
    assert (1e9 / found.down).tolist() == (1e9 / found.up).tolist() == found.latency.tolist() == [0, 0]
    assert found.loss.tolist() == found.duplicates.tolist() == [0, 0]


def test_computing_is_the_job_its_steps_and_its_arithmetic() -> None:
    assert seconds(devices(job=3), steps=7, flops=1e9) == 3
    assert seconds(devices(step=0.5), steps=7, flops=1e9) == 3.5
    assert seconds(devices(gflops=2), steps=7, flops=1e9) == 0.5
    assert seconds(devices(gflops=2, cores=4), steps=7, flops=1e9) == 0.125
    assert seconds(devices(job=3, step=0.5, gflops=2), steps=7, flops=1e9) == 7


def test_units_are_mbit_and_gb() -> None:
    found = profile(devices(memory=2, down=8, up=0.8), torch.tensor([0]))
    assert (found.memory.item(), found.down.item(), found.up.item()) == (2e9, 1e6, 1e5)


def test_work_that_does_not_fit_in_memory_is_slower() -> None:
    """1 + (paging - 1) * (1 - memory / need): a quarter of the work that does not fit runs ten times slower, the rest does not."""
    fleet = devices(job=1, step=1, memory=3)
    assert seconds(fleet, steps=1, flops=0, memory=3e9) == 2
    assert seconds(fleet, steps=1, flops=0, memory=4e9) == pytest.approx(2 * (0.75 + 0.25 * 10))
    assert seconds(devices(job=1, memory=3, paging=5), steps=1, flops=0, memory=4e9) == pytest.approx(2)
    assert seconds(devices(job=1, memory=3, paging=1), steps=1, flops=0, memory=4e9) == 1
    assert seconds(devices(job=1, memory=0), steps=1, flops=0, memory=4e9) == 10
    assert seconds(devices(job=1, memory=0), steps=1, flops=0, memory=0) == 1


def test_a_profile_without_paging_never_is_short_of_memory() -> None:
    one = Profile(*(torch.tensor([v]) for v in (1e9, 1.0, 0.0, 0.0, 1e6, 1e6, 0.0, 0.0, 0.0)))
    assert one.compute(Work(torch.tensor([1]), torch.tensor([2e9]), 1e9)).tolist() == [2]


def test_job_times_of_scenario_f_80() -> None:
    """FedFix: tau_i = 1 - 0.8 * i / 9 for ten clients, whatever the work."""
    ten = Population(Streams(0), 10)
    found = profile(devices(job="evenly(1.0, 0.2)"), torch.arange(10), ten)
    work = Work(torch.full((10,), 10), torch.full((10,), 1e9), 1e9)
    assert found.compute(work).tolist() == pytest.approx([1 - 0.8 * i / 9 for i in range(10)], abs=1e-12)


def test_slow_clients_may_own_a_class() -> None:
    classes = torch.tensor([[5, 0], [0, 5], [4, 6]])
    found = profile(devices(step="by_class((1,), inside=40, outside=1)"), torch.arange(3), Population(Streams(0), 3, classes))
    assert found.step.tolist() == [1, 40, 40]


def test_saying_one_more_thing_never_changes_another() -> None:
    few = profile(devices(gflops="lognormal(2, 0.4)"))
    more = profile(devices(gflops="lognormal(2, 0.4)", up="lognormal(2, 0.4)", down="lognormal(2, 0.4)", loss="uniform(0, 1)"))
    assert torch.equal(few.flops, more.flops)
    spread = torch.stack([more.flops.log(), more.up.log(), more.down.log(), more.loss])
    assert float((torch.corrcoef(spread) - torch.eye(4)).abs().max()) < 0.03


def test_a_device_is_its_clients_whoever_is_asked_about() -> None:
    fleet, some = devices(gflops="lognormal(2, 0.4)", step="exponential(1)", memory="uniform(1, 2)"), torch.tensor([17, 3, 19_000])
    everyone, few = profile(fleet), profile(fleet, some)
    for all_values, values in zip(everyone, few, strict=True):
        assert values.dtype == torch.float64 and torch.equal(all_values[some], values)
    other = profile(fleet, some, Population(Streams(5), N))
    assert not torch.equal(other.flops, few.flops)


@pytest.mark.parametrize(
    "text",
    [
        "devices",
        "devices(step=evenly(0.1, 0.4), trace=diurnal(slot=600))",
        'devices(gflops=mixture(parts=("lognormal(2, 0.4)", 10), shares=(0.5, 0.5)), memory=inf, loss=0.1)',
        "ideal(trace=bernoulli(0.1))",
        "ideal(trace=markov(by_labels(mean=0.2), on=0.1, slot=60, lost=True))",
    ],
)
def test_writing_it_down_and_reading_it_back_changes_nothing(text: str) -> None:
    once = Fleet.parse(text)
    assert Fleet.parse(str(once)) == once == Fleet.parse(once.full())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("devices(gflops=0)", "devices.gflops: 0 is not allowed: it has to be positive"),
        ("devices(up=-1)", "devices.up: -1 is not allowed: a number from 0 up"),
        ("devices(cores=0)", "devices.cores: 0 is not allowed"),
        ("devices(step=inf)", "devices.step: 'inf' is not allowed: it has to be finite"),
        ("devices(latency=-0.1)", "devices.latency: -0.1 is not allowed"),
        ("devices(loss=1.1)", "devices.loss: 1.1 is not allowed: it has to be a probability, from 0 to 1"),
        ("devices(duplicates=2)", "devices.duplicates: 2 is not allowed"),
        ("devices(paging=0.5)", "devices.paging: 0.5 is not allowed"),
        ("devices(loss=True)", "devices.loss: True is not allowed"),
        ("devices(speed=1)", "devices.speed: unknown field"),
    ],
)
def test_impossible_devices_are_refused(text: str, said: str) -> None:
    with pytest.raises(hs.ConfigError, match=said):
        Fleet.parse(text)


@pytest.mark.parametrize(
    ("fleet", "said"),
    [
        (
            devices(loss="listed((0.5, 1.5, 2))"),
            r"fleet.loss: 1.5, drawn from listed\(.*\) for client 1, is not allowed: .* from 0 to 1",
        ),
        (
            devices(gflops="evenly(2, 0)"),
            "fleet.gflops: 0, drawn from evenly.* for client 2, is not allowed: it has to be positive",
        ),
        (
            devices(job="listed((1, 1, inf))"),
            "fleet.job: inf, drawn from listed.* for client 2, is not allowed: it has to be finite",
        ),
    ],
)
def test_impossible_values_are_refused_when_drawn(fleet: Fleet, said: str) -> None:
    with pytest.raises(hs.ConfigError, match=said):
        fleet.profile(Population(Streams(0), 3), torch.arange(3))
    assert fleet.profile(Population(Streams(0), 3), torch.tensor([0])) is not None


def test_a_million_registered_clients_cost_what_is_asked_about() -> None:
    found = profile(
        devices(gflops="zipf(1, 0.5)", step="lognormal(1, 1)"), torch.tensor([999_999]), Population(Streams(0), 1_000_000)
    )
    assert found.flops.tolist() == [0.5e9] and math.isfinite(found.step.item())
