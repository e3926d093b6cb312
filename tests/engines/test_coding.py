"""Codecs in a run: what clients keep for them, and the one to the clients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from small_networks import ask, at_once, network, traffic
from small_runs import stop_after

import hanse as hs
from hanse.codecs import Codec
from hanse.core.errors import ConfigError
from hanse.engines.simulation import Simulation

ENGINE = hs.engines.local(path="stacked", chunk=3, workers=1, threads=1)
FEEDBACK = "feedback(topk(0.05) | sign)"


def federation() -> hs.Federation:
    return hs.Federation(hs.tasks.digits(4), 8, hs.dirichlet(0.5), hs.fleet.devices(job="exponential(1)", loss=0.1))


@pytest.mark.parametrize("barrier", [True, False])
def test_what_a_message_could_not_carry_goes_with_the_clients_next_one(ragged: hs.Federation, barrier: bool) -> None:
    """Every client's residual, and what arrives, against the formula with the same clients sending everything."""
    codec = Codec.parse("feedback(topk(0.1))")
    plain, net = network(ragged), network(ragged, codec=codec)
    message = net.method.message(net.begin(net.method.init(net.problem))[0])
    plain.begin(net.method.init(net.problem))
    kept = torch.zeros(12, net.problem.shared, dtype=torch.float64)
    for clients in ([0, 1, 2, 3], [2, 3, 4, 5], [0, 2, 7, 11]):
        who = torch.tensor(clients)
        wanted = torch.stack([ask(plain, who[i : i + 1], message).mean("delta") for i in range(4)]) + kept[who]
        sent = torch.stack([codec.codec.decode(codec.codec.encode(row)) for row in wanted])
        if barrier:
            reply = ask(net, who, message)
        else:
            net.send(who, "train", message)
            at_once(net.wait(4))
            reply = net.collect(net.arrived)
        kept[who] = wanted - sent
        order = torch.tensor([clients.index(int(c)) for c in reply.clients])  # those with most steps come first
        torch.testing.assert_close(reply.mean("delta"), reply.shares @ sent[order], rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(net.kept.read(torch.arange(12))["codec.delta.residual"], kept, rtol=1e-10, atol=1e-13)
        for each in (plain, net):
            at_once(each.commit(each.state))


@pytest.mark.parametrize("schedule", ["synchronous(3)", "fedbuff(2, cohort=4)"])
def test_a_resumed_run_repeats_with_what_clients_kept_for_the_codec(tmp_path: Path, schedule: str) -> None:
    fed, how = federation(), {"rounds": 8, "codec": Codec.parse(FEEDBACK), "down": Codec.parse("cast"), "engine": ENGINE}
    whole = hs.run(fed, hs.methods.FedAvg(lr=0.2), hs.schedules.Schedule.parse(schedule), **how)

    hs.run(fed, hs.methods.FedAvg(lr=0.2), hs.schedules.Schedule.parse(schedule), **how, out=tmp_path, on_start=stop_after(4))
    resumed = hs.resume(tmp_path, fed)
    assert len(resumed.history) == 8
    assert all(torch.equal(w, resumed.weights[n]) for n, w in whole.weights.items())


def test_error_feedback_learns_where_topk_alone_does_not() -> None:
    fed = hs.Federation(hs.tasks.digits(16), 8, hs.dirichlet(0.5))
    found = {
        codec: hs.run(
            fed, hs.methods.FedAvg(lr=0.2), hs.schedules.synchronous(8), rounds=30, codec=Codec.parse(codec), engine=ENGINE
        )
        for codec in ("topk(0.003)", "feedback(topk(0.003))")
    }
    alone, fed_back = (run.history[-1]["metrics"]["accuracy"] for run in found.values())
    assert fed_back > alone + 0.05


@pytest.mark.parametrize("text", ["cast", "uniform(8)", "layers | int8", "cast('float16') | zstd"])
def test_clients_start_from_what_the_codec_left_of_the_model(ragged: hs.Federation, text: str) -> None:
    """And the bytes down are those of the encoded model, whoever gets it."""
    down = Codec.parse(text)
    how = {"seed": 0, "rounds": 9}
    net = Simulation(
        ragged, hs.methods.FedAvg(), hs.engines.local(path="loop", chunk=4, workers=1, threads=1), hs.codecs.identity(), down, **how
    )
    state, _ = net.begin(net.method.init(net.problem))
    reply = ask(net, torch.arange(5), net.method.message(state))
    layout = net.problem.shared_layout
    data = down.encode(state["x"], hs.codecs.Sending(layout, torch.tensor([0])))
    start = down.decode(data, layout)
    assert torch.equal(reply.starts[0]["x"], start)
    assert traffic(net)[0] == 5 * len(save({"x": torch.zeros(len(data), dtype=torch.uint8)}))
    other = network(ragged)
    other.begin(state)
    torch.testing.assert_close(reply.mean("delta"), ask(other, torch.arange(5), {"x": start}).mean("delta"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", ["synchronous(3)", "fedbuff(2, cohort=4)"])
def test_a_model_is_encoded_once_a_version(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = hs.codecs.chain.roundtrip
    monkeypatch.setattr(hs.codecs.chain, "roundtrip", lambda *args: calls.append(1) or original(*args))
    hs.run(federation(), hs.methods.FedAvg(), hs.schedules.Schedule.parse(schedule), rounds=6, down=hs.codecs.cast(), engine=ENGINE)
    assert len(calls) <= 7


@pytest.mark.parametrize("down", ["topk(0.1)", "feedback(sign)", "randomk(0.5) | uniform(8)"])
def test_a_codec_that_leaves_entries_out_cannot_carry_the_model(down: str) -> None:
    with pytest.raises(ConfigError, match=r"down: .* is not allowed: it carries the model itself"):
        hs.run(federation(), hs.methods.FedAvg(), rounds=1, down=Codec.parse(down))


def test_who_does_not_send_a_vector_does_not_send_what_is_left_of_it(ragged: hs.Federation) -> None:
    """FedAMD's anchors and miners send different vectors; each keeps what is left until it sends that one again."""
    net = network(ragged, hs.methods.FedAMD(p=0.5, steps=2), Codec.parse("feedback(topk(0.1))"))
    state, _ = net.begin(net.method.init(net.problem))
    before: dict[str, torch.Tensor] = {}
    silent = 0
    for t in range(4):
        reply = ask(net, torch.arange(12), net.method.message(state))
        kept = {n: rows for n, rows in net.kept.read(torch.arange(12)).items() if n.startswith("codec.")}
        for name, there in reply.senders.items():
            key, absent = f"codec.{name}.residual", reply.clients[~there]
            old = before.get(key, torch.zeros_like(kept[key]))
            assert torch.equal(kept[key][absent], old[absent])
            silent += int(old[absent].any(1).sum())  # those who had something left that they must not send now
        before = kept
        state = net.method.step(state, reply, t)
        at_once(net.commit(state))
    assert silent > 5 and len(before) == 2


def test_a_resumed_run_draws_the_way_down_anew_after_a_round_of_nobody(tmp_path: Path) -> None:
    fed = hs.Federation(hs.tasks.digits(4), 4, fleet=hs.fleet.devices(loss=0.6))
    how = {"rounds": 8, "down": Codec.parse("uniform(2, stochastic=True)"), "engine": ENGINE}
    whole = hs.run(fed, hs.methods.FedAvg(lr=0.2), hs.schedules.synchronous(1), **how)
    for stop in (1, 2, 3):

        def started(net: Simulation, stop: int = stop) -> None:
            before = net.on_commit

            def committed(net: Simulation) -> None:
                net.stopping = net.round == stop
                before(net)

            net.on_commit = committed

        out = tmp_path / str(stop)
        hs.run(fed, hs.methods.FedAvg(lr=0.2), hs.schedules.synchronous(1), **how, out=out, on_start=started)
        assert all(torch.equal(w, hs.resume(out, fed).weights[n]) for n, w in whole.weights.items())
