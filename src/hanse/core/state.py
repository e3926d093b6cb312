"""What clients keep between rounds: one matrix per name, a row per client that has ever written one.

A client that never took part costs four bytes. Rows live in memory or in a memory-mapped file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hanse.core.errors import CheckpointError
from hanse.core.messages import Tensors


class ClientState:
    """Rows of ``widths[name]`` numbers for ``clients`` clients; a row not yet written reads as ``initial[name]`` (default zeros),
    which is ``[width]`` for all or ``[clients, width]``.

    Names that are written but were not announced get rows of zeros for everyone. ``folder`` keeps the rows in memory-mapped files
    there instead of in memory.
    """

    def __init__(
        self,
        clients: int,
        widths: Mapping[str, int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        initial: Tensors | None = None,
        folder: Path | None = None,
    ) -> None:
        self.widths, self.dtype, self.device, self.folder = dict(widths), dtype, torch.device(device), folder
        self.initial = initial or {}
        self.slot = torch.full((clients,), -1, dtype=torch.int32)
        self.used = 0
        self.rows: Tensors = {}
        self._grow(0)

    def _grow(self, needed: int) -> None:
        capacity = max(needed, 2 * len(next(iter(self.rows.values()))) if self.rows else 0)
        for name, width in self.widths.items():
            if self.folder is None:
                new = torch.zeros(capacity, width, dtype=self.dtype, device=self.device)
            else:
                new = _mapped(self.folder / f"{name}.{capacity}.rows", (capacity, width), self.dtype)
            if name in self.rows:
                new[: self.used] = self.rows[name][: self.used]
            self.rows[name] = new
            if self.folder is not None:
                for old in self.folder.glob(f"{name}.*.rows"):
                    if old.name != f"{name}.{capacity}.rows":
                        old.unlink()

    def read(self, ids: Tensor) -> Tensors:
        """A copy of the rows of ``ids``, ``{name: [len(ids), width]}``."""
        slots = self.slot[ids.cpu()].long()
        fresh = slots < 0
        found = {}
        for name, rows in self.rows.items():
            if bool(fresh.all()):
                found[name] = self._first(name, ids)
                continue
            found[name] = rows[slots.clamp(min=0)].to(self.device)
            if bool(fresh.any()):
                found[name][fresh] = self._first(name, ids[fresh])
        return found

    def _first(self, name: str, ids: Tensor) -> Tensor:
        """A copy of the rows of ``ids`` as they are before anything is written."""
        start = self.initial.get(name)
        if start is None:
            return torch.zeros(len(ids), self.widths[name], dtype=self.dtype, device=self.device)
        return start[ids.to(start.device)] if start.dim() > 1 else start.expand(len(ids), -1).clone()

    def write(self, ids: Tensor, rows: Tensors) -> None:
        """Replace the rows of ``ids``, creating those that are new. ``rows`` holds every name that was announced."""
        ids = ids.cpu()
        fresh = {name: values.shape[1] for name, values in rows.items() if name not in self.widths}
        if fresh:
            self.widths |= fresh
            self._grow(len(next(iter(self.rows.values()))) if self.rows else self.used)
        new = ids[self.slot[ids] < 0]
        if len(new):
            end = self.used + len(new)
            if self.rows and end > len(next(iter(self.rows.values()))):
                self._grow(end)
            self.slot[new] = torch.arange(self.used, end, dtype=torch.int32)
            self.used = end
        slots = self.slot[ids].long()
        for name, values in rows.items():
            self.rows[name][slots] = values.to(self.rows[name].device)

    def snapshot(self) -> Tensors:
        """Named tensors from which ``restore`` brings everything back; copies only rows in use."""
        if not self.widths:
            return {}
        owners = torch.empty(self.used, dtype=torch.int64)
        held = (self.slot >= 0).nonzero().squeeze(1)
        owners[self.slot[held].long()] = held
        return {"owners": owners, **{name: rows[: self.used].to("cpu", copy=True) for name, rows in self.rows.items()}}

    def restore(self, saved: Tensors) -> None:
        """Bring a snapshot back; raises ``CheckpointError`` if it is of other rows."""
        if not self.widths and not saved:
            return
        wrong = [n for n, w in self.widths.items() if n not in saved or saved[n].shape[1:] != (w,) or saved[n].dtype != self.dtype]
        if "owners" not in saved or wrong:
            raise CheckpointError(f"client state: the checkpoint lacks rows {wrong or ['owners']} of the expected width and type")
        owners = saved["owners"]
        fits = owners.dtype == torch.int64 and bool(((owners >= 0) & (owners < len(self.slot))).all())
        rows = {name: values for name, values in saved.items() if name != "owners"}
        fits = fits and all(r.dim() == 2 and len(r) == len(owners) and r.dtype == self.dtype for r in rows.values())
        if not fits or len(set(owners.tolist())) < len(owners):
            raise CheckpointError(f"client state: the checkpoint's rows are not of {len(self.slot)} clients")
        self.slot.fill_(-1)
        self.used = 0
        if len(owners):
            self.write(owners, rows)


def _mapped(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    if not shape[0]:
        return torch.empty(shape, dtype=dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {torch.float32: np.float32, torch.float64: np.float64}[dtype]
    return torch.from_numpy(np.memmap(path, dtype=kind, mode="w+", shape=shape))
