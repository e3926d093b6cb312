"""What server and clients of a deployed run both do with its settings."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from hanse.config import Parts, Settings
from hanse.core.errors import ConfigError
from hanse.core.samples import Samples
from hanse.data import Split
from hanse.engines import flower, local
from hanse.federation import Federation


def one_of_each(settings: Settings) -> Parts:
    """The parts of settings that describe one run; raises ``ConfigError`` where they describe several."""
    for name in ("method", "schedule", "codec", "seed"):
        several = getattr(settings, name)
        if len(several) > 1:
            raise ConfigError(f"{name}: {', '.join(map(str, several))} is not allowed in a deployed run: one")
    return settings.parts()


def run_name(settings: Settings) -> str:
    """A name for a run, the same for all who have the same settings, as far as these decide what it comes to."""
    decisive = settings.model_dump(exclude={"metrics_port", "track"})
    return hashlib.blake2b(json.dumps(decisive, sort_keys=True).encode(), digest_size=12).hexdigest()


def deployed(settings: Settings) -> Settings:
    """Settings as they are sent to everybody who takes part: with the engine ``flower`` if they name none that can be.

    Raises ``ConfigError`` on what only a simulation can do.
    """
    parts = one_of_each(settings)
    if parts.engine != local() and type(parts.engine) is not flower:
        raise ConfigError(f"engine: {parts.engine} is not allowed in a deployed run: flower, or nothing")
    for simulated in ("privacy", "attack"):
        if getattr(settings, simulated):
            raise ConfigError(f"{simulated}: {getattr(settings, simulated)} is not allowed in a deployed run: it is simulated")
    if type(parts.engine) is flower:
        return settings
    return settings.model_copy(update={"engine": "flower"})


def with_own_data(settings: Settings, client: int, data: Path) -> Federation:
    """The federation as client ``client`` sees it, whose data are in the folder ``data``: paths of the task are relative to it, and
    everything that is found there is this client's.

    Where there is no such folder, the client has its part of a task that is split as in a simulation.
    """
    federation = settings.federation(settings.seed[0])
    if not data.is_dir():
        return federation
    os.environ["HANSE_DATA"] = str(data.resolve())
    held = federation.task.data(federation.streams)
    count, clients = torch.tensor(len(held.x)), torch.arange(federation.clients + 1)
    train = Samples(held.x, held.y, torch.where(clients > client, count, 0))
    none = Samples(held.x[:0], held.y[:0], torch.zeros_like(train.offsets))
    split = Split(train, none, held.test_x, held.test_y, held.names)
    federation.split = split.to(federation.device, federation.dtype)
    return federation
