"""What there is to choose from, with parameters, as plain data."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic.fields import FieldInfo

from hanse import aggregators, attacks, codecs, data, engines, fleet, llm, methods, privacy, schedules, topologies
from hanse.core.optim import Optimizer, Rate
from hanse.core.part import Part

KINDS: dict[str, type[Part]] = {
    "methods": methods.Method,
    "schedules": schedules.Schedule,
    "topologies": topologies.Topology,
    "codecs": codecs.Codec,
    "aggregators": aggregators.Aggregator,
    "pre-aggregations": aggregators.PreAggregation,
    "merges": aggregators.Merge,
    "attacks": attacks.Attack,
    "privacy": privacy.Privacy,
    "tasks": data.Task,
    "tunings": llm.Tuning,
    "templates": llm.Template,
    "partitions": data.Partition,
    "fleets": fleet.Fleet,
    "traces": fleet.Trace,
    "distributions": fleet.Distribution,
    "staleness": schedules.Staleness,
    "engines": engines.Engine,
    "optimizers": Optimizer,
    "rates": Rate,
}


def catalogue(kind: str) -> list[dict[str, Any]]:
    """Name, first line of the docstring and fields of every part of a kind."""
    return [
        {"name": name, "text": (inspect.getdoc(part) or "").split("\n")[0], "fields": fields(part)}
        for name, part in KINDS[kind].registry().items()
    ]


def fields(part: type[Part]) -> list[dict[str, str]]:
    """Name, default and meaning of every field."""
    return [
        {"name": name, "default": default(field), "text": " ".join((field.description or "").split())}
        for name, field in part.model_fields.items()
    ]


def default(field: FieldInfo) -> str:
    """A field's default as text."""
    return "required" if field.is_required() else str(field.get_default(call_default_factory=True))
