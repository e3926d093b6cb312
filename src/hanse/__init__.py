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
    from hanse import aggregators, codecs, data, engines, fleet, methods, schedules
    from hanse.core.errors import CheckpointError, CodecError, ConfigError, DataError, DivergedError, HanseError
    from hanse.data import tasks
    from hanse.data.partition import dirichlet, feature_shift, iid, natural, quantity, shards
    from hanse.experiment import resume, run
    from hanse.federation import Federation
    from hanse.track.run import Run

__version__ = "0.1.0"

_HOME = {
    **dict.fromkeys(("aggregators", "codecs", "data", "engines", "fleet", "methods", "schedules"), ""),
    **dict.fromkeys(("CheckpointError", "CodecError", "ConfigError", "DataError", "DivergedError", "HanseError"), "core.errors"),
    "tasks": "data",
    **dict.fromkeys(("dirichlet", "feature_shift", "iid", "natural", "quantity", "shards"), "data.partition"),
    **dict.fromkeys(("resume", "run"), "experiment"),
    "Federation": "federation",
    "Run": "track.run",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hanse' has no attribute {name!r}")
    home = _HOME[name]
    if not home:
        return importlib.import_module(f"hanse.{name}")
    if name == "tasks":
        return importlib.import_module("hanse.data.tasks")
    value = getattr(importlib.import_module(f"hanse.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
