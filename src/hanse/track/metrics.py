"""Metrics of a run over HTTP, in the format of Prometheus; nothing listens unless asked for.

What is served is read when somebody asks, from what ``status.json`` says too; only the histograms are kept up round by round.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hanse.core.errors import ConfigError, MissingExtraError
from hanse.track.run import Record

HOST = "127.0.0.1"
"""Where to listen if nothing is said: nobody but this machine can ask."""
BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)
"""Bounds of histograms, seconds."""


class Metrics:
    """Serves what ``tell`` says of the run called ``run`` on ``where``, ``[host:]port``; a writer that is given every round.

    Raises ``ConfigError`` where it cannot listen there, ``MissingExtraError`` without the extra ``metrics``.
    """

    def __init__(self, where: str, run: str, tell: Callable[[], dict[str, Any]]) -> None:
        try:
            from prometheus_client import core, start_http_server
        except ImportError:
            raise MissingExtraError("metrics_port", "metrics") from None
        self.run, self.tell, self.core = run, tell, core
        registry = core.CollectorRegistry()
        registry.register(self)
        self.rounds = core.Histogram(
            "hanse_round_seconds", "Seconds from one committed round to the next.", ["run"], registry=registry, buckets=BUCKETS
        )
        text = "Seconds of a round in each phase: waiting for clients, stepping, evaluating, saving."
        self.phases = core.Histogram("hanse_phase_seconds", text, ["run", "phase"], registry=registry, buckets=BUCKETS)
        self.before: dict[str, float] = {}
        self.committed = time.perf_counter()
        host, _, port = where.rpartition(":")
        try:
            self.server, self.thread = start_http_server(int(port), host.strip("[]") or HOST, registry)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"metrics_port: {where} is not allowed: it cannot be listened on: {reason}") from None
        self.address = f"{host or HOST}:{self.server.server_port}"

    def write(self, record: Record) -> None:
        """One round: how long it took, and its phases."""
        now, spent = time.perf_counter(), self.tell()["spent"]
        self.rounds.labels(self.run).observe(now - self.committed)
        for phase, seconds in spent.items():
            self.phases.labels(self.run, phase).observe(seconds - self.before.get(phase, 0.0))
        self.committed, self.before = now, spent

    def close(self) -> None:
        """Listen no more; may be called twice."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def collect(self) -> Iterator[Any]:
        """What is true now, for prometheus_client."""
        found = self.tell()
        yield self._one("counter", "hanse_rounds", "Committed rounds.", {"": found["round"]})
        yield self._one("gauge", "hanse_rounds_planned", "Rounds that the run is to have.", {"": found["rounds"]})
        moved = {way: found[f"bytes_{way}"] for way in ("down", "up")}
        yield self._one("counter", "hanse_bytes", "Bytes of messages to clients (down) and from them (up).", moved, "direction")
        text = "Jobs lost, replies too late or refused, workers replaced."
        yield self._one("counter", "hanse_failures", text, found["failures"], "kind")
        states = Counter(client["state"] for client in found["clients"])
        every = {state: states[state] for state in ("ready", "work", "away", "refused")} if found["clients"] else {}
        yield self._one("gauge", "hanse_clients", "Real clients by what they are doing; none in a simulation.", every, "state")

    def _one(self, kind: str, name: str, text: str, values: Mapping[str, float], label: str = "") -> Any:
        """A metric with a value for each of the values of its label, if it has one beside the run."""
        family = self.core.CounterMetricFamily if kind == "counter" else self.core.GaugeMetricFamily
        made = family(name, text, labels=["run", label] if label else ["run"])
        for which, value in values.items():
            made.add_metric([self.run, which] if label else [self.run], value)
        return made
