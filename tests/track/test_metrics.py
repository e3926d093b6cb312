"""Metrics of real runs, asked for over HTTP as Prometheus does."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

import hanse as hs
from hanse.core.errors import ConfigError, MissingExtraError
from hanse.track.run import Record

parser = pytest.importorskip("prometheus_client.parser")

Values = dict[tuple[str, ...], float]


def scraped(address: str) -> dict[str, Values]:
    """What is served, by name and then by the values of the labels but the run's, in the order of their names."""
    found: dict[str, Values] = {}
    with urlopen(f"http://{address}/metrics", timeout=10) as reply:
        for family in parser.text_string_to_metric_families(reply.read().decode()):
            for sample in family.samples:
                labels = tuple(value for name, value in sorted(sample.labels.items()) if name != "run")
                found.setdefault(sample.name, {})[labels] = sample.value
    return found


class Scraper:
    """A writer that asks for metrics after every round."""

    def __init__(self) -> None:
        self.net: Any = None
        self.seen: list[tuple[Record, dict[str, Values]]] = []

    def start(self, net: Any) -> None:
        self.net = net

    @property
    def address(self) -> str:
        found: str = self.net.on_commit.metrics.address
        return found

    def write(self, record: Record) -> None:
        self.seen.append((record, scraped(self.address)))

    def close(self) -> None:
        pass


def go(port: str | None, writer: Any = None, **how: Any) -> hs.Run:
    federation = hs.Federation(hs.tasks.digits(hidden=4), clients=6)
    engine = hs.engines.local(path="stacked", chunk=3, workers=1, threads=1)
    writers = [] if writer is None else [writer]
    start = (lambda net: None) if writer is None else writer.start
    schedule = hs.schedules.synchronous(cohort=3)
    return hs.run(
        federation,
        hs.methods.FedAvg(),
        schedule,
        rounds=3,
        engine=engine,
        metrics_port=port,
        writers=writers,
        on_start=start,
        **how,
    )


def test_a_run_tells_how_it_goes_while_it_goes(tmp_path: Path) -> None:
    scraper = Scraper()
    go("0", scraper, out=tmp_path / "mine")
    assert len(scraper.seen) == 3
    for record, found in scraper.seen:
        assert found["hanse_rounds_total"] == {(): record["round"]}
        assert found["hanse_rounds_planned"] == {(): 3}
        assert found["hanse_bytes_total"] == {("down",): record["bytes_down"], ("up",): record["bytes_up"]}
        assert found["hanse_failures_total"] == {("late",): 0, ("lost",): 0, ("replaced",): 0}
        assert "hanse_clients" not in found  # simulated ones do nothing that one could wait for
    last = scraper.seen[-1][1]
    assert last["hanse_round_seconds_count"] == {(): 2}  # writers come in their order, and this one is before
    phases = last["hanse_phase_seconds_sum"]
    assert {name for (name,) in phases} == {"waiting", "stepping", "evaluating", "saving"}
    assert min(phases.values()) > 0
    assert sum(phases.values()) <= last["hanse_round_seconds_sum"][()] + 0.5
    with pytest.raises(URLError):
        scraped(scraper.address)


def test_the_run_has_a_label() -> None:
    scraper = Scraper()

    def write(record: Record) -> None:
        with urlopen(f"http://{scraper.address}/metrics", timeout=10) as reply:
            assert f'hanse_rounds_total{{run="FedAvg"}} {record["round"]}.0' in reply.read().decode()
        scraper.seen.append((record, {}))

    scraper.write = write  # type: ignore[method-assign]
    go("0", scraper)
    assert len(scraper.seen) == 3


def test_nothing_listens_unless_asked_to() -> None:
    scraper = Scraper()
    scraper.write = lambda record: scraper.seen.append((record, {}))  # type: ignore[method-assign]
    go(None, scraper)
    assert scraper.net.on_commit.metrics is None


def test_the_same_model_with_and_without() -> None:
    one, other = go(None).weights, go("localhost:0").weights
    assert all(one[name].equal(other[name]) for name in one)


def test_a_port_that_is_taken_is_one_line_before_any_work(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=f"metrics_port: {port} is not allowed: it cannot be listened on: Address already in use"
        ):
            go(str(port), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("port", ["http", "1.2.3.4:", ":80", "::1:80", "80000000", "a b:80"])
def test_what_is_no_port_is_one_line(port: str) -> None:
    with pytest.raises(ConfigError, match="metrics_port: "):
        go(port)


def test_too_large_a_port_is_one_line() -> None:
    with pytest.raises(ConfigError, match="metrics_port: 70000 is not allowed"):
        go("70000")


def test_without_the_package_it_says_which_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'hanse\[metrics\]'"):
        go("0")
