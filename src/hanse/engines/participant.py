"""A client of a real federation: it works on its own data when it is asked to, and keeps what is its own in its own folder."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hanse.codecs.base import Codec
from hanse.core.errors import CheckpointError, ConfigError
from hanse.core.gradients import paths
from hanse.core.messages import Tensors
from hanse.core.streams import Streams
from hanse.engines.base import Arrangement, Engine
from hanse.engines.execution import Executor, Orders, keep_freed_memory
from hanse.engines.letters import as_bytes, opened, upload_letter
from hanse.engines.rounds import ruled
from hanse.engines.simulation import client_state
from hanse.federation import Federation
from hanse.methods.base import Method

NOTHING = -1
"""The key of work that a client has not done: before its first."""


class Participant:
    """Client ``client`` of the run called ``run``, of which only its own samples are read.

    What it keeps lies in ``folder``, a file for each piece of work: the server says which of them it is to go on from, and which
    nobody will come back to.
    """

    def __init__(
        self,
        federation: Federation,
        method: Method,
        codec: Codec,
        down: Codec,
        engine: Engine,
        *,
        client: int,
        seed: int,
        run: str,
        folder: Path,
    ) -> None:
        if not 0 <= client < federation.clients:
            raise ConfigError(f"client: {client} is not allowed: 0 to {federation.clients - 1}")
        keep_freed_memory()
        self.client, self.run, self.folder, self.problem = client, run, folder, federation.problem
        self.down = ruled(method.down, down, "down", method)
        found = paths(self.problem, engine.precision == "bf16")
        if engine.path is not None and engine.path not in found:
            raise ConfigError(f"{engine.short_name}.path: {engine.path!r} is not allowed for this model: {', '.join(found)}")
        self.how = Arrangement(engine.path or next(iter(found)), 1, 1, engine.threads or torch.get_num_threads())
        self.kept = client_state(federation, method, None)
        own = torch.arange(federation.clients) == client
        self.executor = Executor(
            self.problem,
            federation.split.train.some(own),
            federation.split.test.some(own),
            method,
            ruled(method.codec, codec, "codec", method),
            Streams(seed),
            self.kept,
            found,
            shortcuts=False,
        )

    def hello(self) -> dict[str, Any]:
        """What the server has to know of a client before it asks it anything."""
        count = int(self.executor.samples.counts()[self.client])
        return {"client": self.client, "samples": count, "hanse": version("hanse"), "model": self.problem.layout.size}

    def work(self, data: bytes, about: Mapping[str, Any]) -> bytes:
        """Do what a letter asks for; the letter in reply. The same letter always gets the same reply."""
        torch.set_num_threads(self.how.threads)
        message = opened(data, about["coded"], self.down, self.problem.layout_of)
        me, key = torch.tensor([self.client]), torch.tensor([about["key"]])
        since, steps, zero = torch.tensor([about["version"]]), torch.tensor([about["steps"]]), torch.zeros(1, dtype=torch.long)
        share = None if about["share"] is None else torch.tensor([about["share"]], dtype=torch.float64)
        orders = Orders(about["work"], [message], zero, me, key, since, steps, zero, share)
        trained = self.executor.train(orders, self.how, self._state(about["base"]))
        letter = as_bytes(upload_letter(self.executor, trained))
        self._keep(about["key"], trained.state)
        self._forget(min(about["safe"], about["base"]))
        return letter

    # ---- what it keeps

    @property
    def _files(self) -> Path:
        return self.folder / self.run

    def _state(self, key: int) -> Tensors:
        """What it kept after the work called ``key``."""
        if key == NOTHING:
            return self.executor.what_is_kept(torch.tensor([self.client]))
        from safetensors import SafetensorError
        from safetensors.torch import load

        file = self._files / f"{key}.safetensors"
        try:
            return load(file.read_bytes()) if self.kept.widths or self.executor.codec.keeps else {}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: what this client kept of its work {key} cannot be read: {error}") from None

    def _keep(self, key: int, state: Tensors) -> None:
        from safetensors.torch import save

        if not state:
            return
        self._files.mkdir(parents=True, exist_ok=True)
        part, file = self._files / f".{key}.part", self._files / f"{key}.safetensors"
        part.write_bytes(save({n: t.contiguous() for n, t in state.items()}))
        part.replace(file)

    def _forget(self, before: int) -> None:
        """Remove what nobody will go on from."""
        for file in self._files.glob("*.safetensors"):
            if int(file.stem) < before:
                file.unlink(missing_ok=True)
