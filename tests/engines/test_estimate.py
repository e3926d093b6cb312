"""What a run will cost, before it is run."""

import pytest
from small_networks import network, same

import hanse as hs
from hanse.engines.estimate import estimate

CASES = {
    "FedAvg": (hs.methods.FedAvg(), hs.codecs.identity()),
    "Scaffold": (hs.methods.Scaffold(), hs.codecs.identity()),
    "top-k": (hs.methods.FedAvg(), hs.codecs.topk(0.1)),
}


@pytest.mark.parametrize("case", CASES)
def test_bytes_and_virtual_time_are_right(case: str) -> None:
    rule, codec = CASES[case]
    federation = hs.Federation(hs.tasks.digits(), clients=20, fleet=hs.fleet.phones())
    engine, schedule = hs.engines.local("stacked", 5, 1, 1), hs.schedules.synchronous(5)
    net = network(federation, rule, codec, path="stacked")
    net.total_rounds = 10
    found = estimate(net, schedule)
    last = hs.run(federation, rule, schedule, rounds=10, codec=codec, engine=engine, evaluate=0).history[-1]
    assert found.down == pytest.approx(last["bytes_down"], rel=0.01)
    assert found.up == pytest.approx(last["bytes_up"], rel=0.01)
    assert found.virtual == pytest.approx(last["seconds"], rel=0.01)
    assert found.wall > 0 and found.memory > 0


SCHEDULES = [
    "synchronous(cohort=4, over=0.5, deadline=2.0)",
    "cyclic(cohort=5)",
    "fedbuff(buffer=3, cohort=6, patience=4.0)",
    "fedasync(weights='unbiased')",
    "fedfix(window=0.8)",
]


@pytest.fixture(scope="module")
def uneven() -> hs.Federation:
    trace = "crashes(every=20.0, lasts=2.0, slot=0.5)"
    fleet = hs.fleet.devices(job="exponential(1.0)", up=0.5, loss=0.2, duplicates=0.1, trace=trace)
    return hs.Federation(hs.tasks.digits(hidden=4), clients=12, partition=hs.dirichlet(0.5), fleet=fleet)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_conversation_is_rehearsed(uneven: hs.Federation, schedule: str) -> None:
    """Time and bytes are those of the run, losses and absences too, because both follow the same chance."""
    rule, how = hs.methods.Scaffold(), hs.schedules.Schedule.parse(schedule)
    net = network(uneven, rule)
    net.total_rounds = 10
    found = estimate(net, how)
    engine = hs.engines.local("stacked", 5, 1, 1)
    last = hs.run(uneven, rule, how, rounds=10, engine=engine, evaluate=0).history[-1]
    assert (found.virtual, found.down, found.up) == (last["seconds"], last["bytes_down"], last["bytes_up"])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_that_ends_by_time_is_estimated_to_end_then(schedule: str) -> None:
    """From its first rounds, which on a steady fleet are like the others."""
    fleet, how, end = hs.fleet.devices(job="evenly(1.0, 0.4)"), hs.schedules.Schedule.parse(schedule), 12.0
    steady = hs.Federation(hs.tasks.digits(hidden=4), clients=12, fleet=fleet)
    net = network(steady)
    net.total_rounds, net.seconds = 10_000, end
    found, engine = estimate(net, how), hs.engines.local("stacked", 5, 1, 1)
    last = hs.run(steady, hs.methods.FedAvg(), how, rounds=10_000, seconds=end, engine=engine, evaluate=0).history[-1]
    assert found.virtual == pytest.approx(last["seconds"], rel=0.1)
    assert found.up == pytest.approx(last["bytes_up"], rel=0.25)


def test_probing_leaves_the_network_alone(ragged: hs.Federation) -> None:
    net = network(ragged, hs.methods.Scaffold())
    before = net.snapshot()
    estimate(net, hs.schedules.synchronous(5))
    assert same(net.snapshot(), before) and net.round == 0 and net.arrangement == network(ragged).arrangement


def test_a_single_client_is_enough() -> None:
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=1)
    found = estimate(network(federation), hs.schedules.synchronous(1))
    assert found.wall > 0 and found.virtual == 0
