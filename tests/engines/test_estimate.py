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


def test_probing_leaves_the_network_alone(ragged: hs.Federation) -> None:
    net = network(ragged, hs.methods.Scaffold())
    before = net.snapshot()
    estimate(net, hs.schedules.synchronous(5))
    assert same(net.snapshot(), before) and net.round == 0 and net.arrangement == network(ragged).arrangement


def test_a_single_client_is_enough() -> None:
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=1)
    found = estimate(network(federation), hs.schedules.synchronous(1))
    assert found.wall > 0 and found.virtual == 0
