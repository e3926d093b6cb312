"""A federation of real clients equals a simulation of clients one at a time, whatever the order in which they reply."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.request import urlopen

import pytest
import torch
from loopback import Deed, Letters, loopback
from same_runs import CASES

import hanse as hs
from hanse.engines.deployment import Deployment, Returned
from hanse.track.status import status_of

ALONE: dict[str, Any] = {"path": "stacked", "chunk": 1, "workers": 1, "threads": 1, "shortcuts": False, "shards": 2}
SYNCHRONOUS = hs.schedules.synchronous(cohort=5)
BARRIERS = {n: c for n, c in CASES.items() if "schedule" not in c and not {"attack", "privacy"} & c.keys() and n != "one by one"}


def federation() -> hs.Federation:
    return hs.Federation(hs.tasks.digits(hidden=8), clients=7, partition=hs.dirichlet(0.5), dtype="float64")


def go(engine: hs.engines.Engine, **how: Any) -> hs.Run:
    how = {"method": hs.methods.FedAvg(), "schedule": SYNCHRONOUS, "rounds": 4, **how}
    how.pop("chunk", None)
    how.pop("path", None)
    return hs.run(federation(), how.pop("method"), how.pop("schedule"), engine=engine, **how)


@pytest.fixture
def deed() -> Iterator[list[Deed]]:
    """Something may be put here that becomes of replies."""
    before = [*loopback.deeds]
    yield loopback.deeds
    loopback.deeds[:] = before


def seen(run: hs.Run) -> list[Any]:
    """What a history says that does not depend on time or on who holds the clients' test samples."""
    names = ("round", "loss", "updates")
    scores = [{n: v for n, v in record["metrics"].items() if "client" not in n} for record in run.history]
    return [[record[n] for n in names] + [sorted(record["cohort"])] for record in run.history] + scores


def same_model(one: hs.Run, other: hs.Run) -> None:
    assert seen(one) == seen(other)
    assert [name for name, t in one.weights.items() if not torch.equal(t, other.weights[name])] == []


@pytest.mark.parametrize("case", BARRIERS)
def test_real_clients_equal_simulated_ones_and_so_do_their_bytes(case: str, tmp_path: Path) -> None:
    path = CASES[case].get("path", "stacked")
    simulated = go(hs.engines.local(**{**ALONE, "path": path}), **CASES[case])
    real = go(loopback(**{**ALONE, "path": path}, folder=str(tmp_path)), **CASES[case])
    same_model(real, simulated)
    assert [r["bytes_down"] for r in real.history] == [r["bytes_down"] for r in simulated.history]
    assert [r["bytes_up"] for r in real.history] == [r["bytes_up"] for r in simulated.history]
    post = loopback.made[-1]
    assert sum(size for _, size in post.sent) == real.history[-1]["bytes_down"]
    assert sum(size for _, size in post.received) == real.history[-1]["bytes_up"]


def test_the_order_of_replies_does_not_matter(tmp_path: Path) -> None:
    runs = [go(loopback(**ALONE, folder=str(tmp_path / str(order)), order=order), method=hs.methods.Scaffold()) for order in (1, 2)]
    same_model(*runs)


def spoiled(data: bytes) -> dict[str, bytes | None]:
    from safetensors.torch import load, save

    good = load(data)
    name = next(n for n in good if n not in ("weight", "loss"))
    return {
        "cut off": data[: len(data) // 2],
        "of another shape": save({**good, name: good[name][:-1].clone()}),
        "not finite": save({**good, name: good[name] * float("nan")}),
        "of another type": save({**good, name: good[name].float()}),
        "more than asked for": save({**good, "extra": good[name].clone()}),
        "without its weight": save({n: t for n, t in good.items() if n != "weight"}),
        "of negative weight": save({**good, "weight": -good["weight"]}),
        "of twice its weight": save({**good, "weight": 2 * good["weight"]}),
        "of weight of another type": save({**good, "weight": good["weight"].float()}),
        "too large to be added": save({**good, name: good[name] * 0 + 1e300}),
        "with a header that is none": (3).to_bytes(8, "little") + b'"x"',
        "with a header cut oddly": (13).to_bytes(8, "little") + b'{"x":{}}     ' + data,
        "nothing": b"",
        "no safetensors file": b"\x80\x04." * 100,
        "an error of its own": None,
    }


BAD = ["cut off", "of another shape", "not finite", "of another type", "more than asked for", "without its weight",
       "of negative weight", "of twice its weight", "of weight of another type", "too large to be added",
       "with a header that is none", "with a header cut oddly", "nothing", "no safetensors file",
       "an error of its own"]  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_reply_is_refused_in_one_line_and_the_run_goes_on(what: str, tmp_path: Path, deed: list[Deed], caplog: Any) -> None:
    def spoil(post: Letters, reply: Returned) -> list[Returned]:
        if reply.client != 3 or reply.data is None:
            return [reply]
        return [reply._replace(data=spoiled(reply.data)[what], why="its disk\nis full" * 1000)]

    deed.append(spoil)
    run = go(loopback(**ALONE, folder=str(tmp_path)), rounds=2, schedule=hs.schedules.synchronous(cohort=7))
    assert [sorted(record["cohort"]) for record in run.history] == [[0, 1, 2, 4, 5, 6]] * 2
    line = "client 3 did not do its work" if what == "an error of its own" else "client 3 is refused"
    lines = [r.getMessage() for r in caplog.records if line in r.getMessage()]
    assert len(lines) in (1, 2)  # it is not asked again at once
    assert all(len(said.splitlines()) == 1 and len(said) < 400 for said in lines)


def test_what_comes_twice_counts_once(tmp_path: Path, deed: list[Deed], caplog: Any) -> None:
    expected = go(hs.engines.local(**ALONE))
    deed.append(lambda post, reply: [reply, reply] if reply.client == 3 else [reply])
    same_model(go(loopback(**ALONE, folder=str(tmp_path))), expected)
    assert "client 3 is refused" in caplog.text


def test_who_says_it_is_another_is_refused(tmp_path: Path, deed: list[Deed], caplog: Any) -> None:
    expected = go(hs.engines.local(**ALONE))
    deed.append(lambda post, reply: [reply._replace(client=(reply.client + 1) % 7), reply])
    same_model(go(loopback(**ALONE, folder=str(tmp_path))), expected)
    assert "nothing is expected from it under number" in caplog.text


def test_who_cannot_be_reached_is_given_up_and_comes_back(tmp_path: Path, deed: list[Deed], caplog: Any) -> None:
    def leave(post: Letters, reply: Returned) -> list[Returned]:
        post.away = {3} if 4 < len(post.received) < 14 else set()
        return [reply]

    deed.append(leave)
    run = go(loopback(**ALONE, folder=str(tmp_path)), schedule=hs.schedules.synchronous(cohort=7))
    took_part = [3 in record["cohort"] for record in run.history]
    assert len(took_part) == 4 and took_part[-1] and not all(took_part)


def test_asynchronous_schedules_run_as_they_are(tmp_path: Path) -> None:
    run = go(loopback(**ALONE, folder=str(tmp_path)), method=hs.methods.Scaffold(), schedule=hs.schedules.fedbuff(buffer=3))
    assert run.history[-1]["updates"] == 12
    post = loopback.made[-1]
    assert sum(size for _, size in post.sent) == run.history[-1]["bytes_down"]


def test_a_server_that_was_stopped_goes_on_to_the_same_model(tmp_path: Path) -> None:
    from small_runs import stop_after

    how: dict[str, Any] = {"method": hs.methods.Scaffold(), "codec": hs.codecs.feedback(hs.codecs.topk(0.2))}
    whole = go(loopback(**ALONE, folder=str(tmp_path / "a")), **how)
    engine = loopback(**ALONE, folder=str(tmp_path / "b"))
    go(engine, **how, out=tmp_path / "run", on_start=stop_after(2))
    same_model(go(engine, **how, out=tmp_path / "run", resume=True), whole)


def test_a_busy_client_is_not_taken_for_a_dead_one(tmp_path: Path, deed: list[Deed]) -> None:
    nets: list[Any] = []

    def slowly(post: Letters, reply: Returned) -> list[Returned]:
        if reply.client == 3:
            assert nets[0].grace < 0.3
            time.sleep(0.3)  # while it can be reached all the time
        return [reply]

    deed.append(slowly)
    run = go(loopback(**ALONE, folder=str(tmp_path)), rounds=1, schedule=hs.schedules.synchronous(cohort=7), on_start=nets.append)
    assert sorted(run.history[0]["cohort"]) == [*range(7)] and nets[0].failures()["lost"] == 0


def test_it_says_what_every_client_does_and_what_went_wrong(tmp_path: Path, deed: list[Deed]) -> None:
    told: list[tuple[list[str], dict[str, int]]] = []

    def spoil(post: Letters, reply: Returned) -> list[Returned]:
        told.append(([standing.state for standing in nets[0].report()], nets[0].failures()))
        return [reply._replace(data=b"") if reply.client == 3 else reply]

    nets: list[Any] = []
    deed.append(spoil)
    everybody = hs.schedules.synchronous(cohort=7)
    go(loopback(**ALONE, folder=str(tmp_path / "kept")), rounds=1, schedule=everybody, on_start=nets.append, out=tmp_path / "run")
    assert told[0] == (["work"] * 7, {"lost": 0, "late": 0, "failed": 0, "refused": 0})
    assert sorted(told[-1][0]) in (sorted(["ready"] * 5 + ["refused", "work"]), ["ready"] * 6 + ["work"])
    assert nets[0].failures() == {"lost": 1, "late": 0, "failed": 0, "refused": 1}
    found = status_of(tmp_path / "run", 0.0)
    assert [client["name"] for client in found["clients"]] == [*"0123456"]
    assert [client["state"] for client in found["clients"]] == ["ready"] * 3 + ["refused"] + ["ready"] * 3
    assert found["clients"][3]["why"] and found["clients"][2]["why"] == "replied in round 1"
    assert found["spent"]["waiting"] > 0


def test_its_clients_are_counted_in_metrics(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    nets: list[Any] = []

    class Scraper:
        pages: ClassVar[list[str]] = []

        def write(self, record: Any) -> None:
            self.pages.append(urlopen(f"http://{nets[0].on_commit.metrics.address}/metrics", timeout=10).read().decode())

        def close(self) -> None:
            pass

    go(loopback(**ALONE, folder=str(tmp_path)), rounds=1, on_start=nets.append, writers=[Scraper()], metrics_port="0")
    assert 'hanse_clients{run="FedAvg",state="ready"} 7.0' in Scraper.pages[0]
    assert 'hanse_clients{run="FedAvg",state="refused"} 0.0' in Scraper.pages[0]
    assert 'hanse_failures_total{kind="refused",run="FedAvg"} 0.0' in Scraper.pages[0]


def test_what_is_logged_says_which_client_it_is_about(tmp_path: Path, deed: list[Deed], caplog: Any) -> None:
    deed.append(lambda post, reply: [reply._replace(data=b"") if reply.client == 3 else reply])
    go(loopback(**ALONE, folder=str(tmp_path)), rounds=1, schedule=hs.schedules.synchronous(cohort=7))
    (record,) = [r for r in caplog.records if "is refused" in r.getMessage()]
    assert (record.client, record.round) == (3, 1)


def test_a_message_for_all_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    module = sys.modules[Deployment.__module__]
    as_bytes = module.as_bytes

    def counting(letter: Any) -> Any:
        written.append(len(letter))
        return as_bytes(letter)

    monkeypatch.setattr(module, "as_bytes", counting)
    go(loopback(**ALONE, folder=str(tmp_path)), rounds=3)
    assert len(written) == 3


def test_a_resumed_run_that_fails_at_once_leaves_clients_where_the_checkpoint_has_them(tmp_path: Path) -> None:
    from small_runs import stop_after

    how: dict[str, Any] = {"method": hs.methods.Scaffold(), "out": tmp_path / "run"}
    engine = loopback(**ALONE, folder=str(tmp_path / "kept"))
    go(engine, **how, on_start=stop_after(2))
    seen: list[tuple[list[int], list[int]]] = []

    def fails(net: Any) -> None:
        before = net.based.tolist()
        net.take_back()
        seen.append((before, net.based.tolist()))

    go(engine, **how, resume=True, on_start=fails)
    assert seen[0][0] == seen[0][1] and max(seen[0][0]) >= 1


class Killed(BaseException):
    """What ends a server in the middle of anything."""


@pytest.mark.parametrize("schedule", ["synchronous(cohort=5)", "fedbuff(buffer=3)"])
def test_a_server_that_is_killed_again_and_again_goes_on_from_the_right_states(
    schedule: str, tmp_path: Path, deed: list[Deed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With work under way: no client goes on from work that the server has forgotten; with a barrier, the model is the same."""
    monkeypatch.setattr("hanse.experiment.CHECKPOINT_SECONDS", 0)
    how: dict[str, Any] = {"method": hs.methods.Scaffold(), "codec": hs.codecs.feedback(hs.codecs.topk(0.3)), "rounds": 8}
    how["schedule"] = hs.schedules.Schedule.parse(schedule)
    undisturbed = go(loopback(**ALONE, folder=str(tmp_path / "a")), **how)
    asked: list[tuple[int, int]] = []
    send = Letters.send

    def noting(post: Letters, letter: int, client: int, data: bytes, about: Any) -> None:
        asked.append((about["base"], about["key"]))
        send(post, letter, client, data, about)

    monkeypatch.setattr(Letters, "send", noting)
    left, kills = [0], 0

    def kill(post: Letters, reply: Returned) -> list[Returned]:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return [reply]

    deed.append(kill)
    run = None
    for replies in range(4, 40):  # each time a little further
        left[0] = replies
        try:
            engine = loopback(**ALONE, folder=str(tmp_path / "b"), order=replies)
            run = go(engine, **how, out=tmp_path / "run", resume=(tmp_path / "run" / "run.json").is_file())
            break
        except Killed:
            kills += 1
    assert run is not None and kills >= 2
    assert [record["round"] for record in run.history] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(base < key for base, key in asked)
    if schedule.startswith("synchronous"):
        same_model(run, undisturbed)
