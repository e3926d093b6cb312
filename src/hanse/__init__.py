"""hanse: train, fine-tune, compress and serve models together.

    import hanse as hs

    fed = hs.Federation(hs.tasks.digits(), clients=100, partition=hs.dirichlet(0.3), fleet=hs.fleet.phones())
    run = hs.run(fed, hs.methods.FedSpeed(), hs.schedules.synchronous(cohort=10), rounds=100, codec=hs.codecs.topk(0.1))
    run.plot("accuracy", against="bytes")

Names are loaded on first use, so that importing hanse does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hanse import aggregators as aggregators
    from hanse import attacks as attacks
    from hanse import codecs as codecs
    from hanse import data as data
    from hanse import engines as engines
    from hanse import fleet as fleet
    from hanse import llm as llm
    from hanse import methods as methods
    from hanse import privacy as privacy
    from hanse import schedules as schedules
    from hanse import topologies as topologies
    from hanse.core.errors import CheckpointError as CheckpointError
    from hanse.core.errors import CodecError as CodecError
    from hanse.core.errors import ConfigError as ConfigError
    from hanse.core.errors import DataError as DataError
    from hanse.core.errors import DivergedError as DivergedError
    from hanse.core.errors import HanseError as HanseError
    from hanse.core.errors import PrivacyError as PrivacyError
    from hanse.core.errors import StalledError as StalledError
    from hanse.data import tasks as tasks
    from hanse.data.partition import dirichlet as dirichlet
    from hanse.data.partition import feature_shift as feature_shift
    from hanse.data.partition import iid as iid
    from hanse.data.partition import natural as natural
    from hanse.data.partition import neighbouring as neighbouring
    from hanse.data.partition import quantity as quantity
    from hanse.data.partition import shards as shards
    from hanse.experiment import resume as resume
    from hanse.experiment import run as run
    from hanse.federation import Federation as Federation
    from hanse.track import figures as figures
    from hanse.track.run import Run as Run

__version__ = "0.1.0"

_HOME = {
    **dict.fromkeys(
        ("aggregators", "attacks", "codecs", "data", "engines", "fleet", "llm", "methods", "privacy", "schedules", "topologies"), ""
    ),
    **dict.fromkeys(
        (
            "CheckpointError",
            "CodecError",
            "ConfigError",
            "DataError",
            "DivergedError",
            "HanseError",
            "PrivacyError",
            "StalledError",
        ),
        "core.errors",
    ),
    "tasks": "data",
    "figures": "track",
    **dict.fromkeys(("dirichlet", "feature_shift", "iid", "natural", "neighbouring", "quantity", "shards"), "data.partition"),
    **dict.fromkeys(("resume", "run"), "experiment"),
    "Federation": "federation",
    "Run": "track.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hanse' has no attribute {name!r}")
    home = _HOME[name]
    if not home:
        return importlib.import_module(f"hanse.{name}")
    if name in ("tasks", "figures"):
        return importlib.import_module(f"hanse.{home}.{name}")
    value = getattr(importlib.import_module(f"hanse.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*_HOME, "__version__"]
