"""Who lies in a run, and what becomes of what they send."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hanse.attacks import Attack, Forging
from hanse.codecs.base import Codec, Sending
from hanse.core.errors import CodecError
from hanse.core.layout import Layout
from hanse.core.messages import Upload
from hanse.core.streams import Streams

log = logging.getLogger(__name__)

HONEST = {"buffers", "domain"}
"""What nobody lies about: batch-norm statistics, and whose they are."""


class Adversaries:
    """The liars of a run under one ``attack``: the same clients from the first round to the last."""

    def __init__(self, attack: Attack, clients: int, streams: Streams) -> None:
        self.attack, self.streams = attack, streams
        self.liars = attack.liars(clients, streams)
        """Who lies, bool ``[clients]``."""

    def forge(self, uploads: Sequence[Upload], rounds: Sequence[Tensor], layout_of: Callable[[str, int], Layout]) -> None:
        """Replace what liars send in the batches of one exchange, which they know all of; ``rounds`` int64 ``[C]`` a batch."""
        clients, rounds_, sizes = torch.cat([u.clients for u in uploads]), torch.cat([*rounds]), [len(u.clients) for u in uploads]
        lies = self.liars[clients]
        if not bool(lies.any()):
            return
        for kind in ("sums", "rows"):
            groups = [getattr(u, kind) for u in uploads]
            for name in [n for n in groups[0] if n not in HONEST]:
                each = torch.cat([group[name] for group in groups])
                forging = Forging(name, clients, rounds_, self.streams, layout_of(name, each.shape[1]))
                forged = self.attack.forge(each, lies, forging)
                for group, part in zip(groups, torch.split(forged, sizes), strict=True):
                    group[name] = part

    def deliver(self, upload: Upload, rounds: Tensor, codec: Codec, sending: Callable[[str, int], Sending]) -> Tensor:
        """What arrives of the vectors of ``upload``, in place, and who is refused, bool ``[C]``: whose message cannot be read, or
        is not finite. ``rounds`` and ``sending`` are those they were sent with.
        """
        refused = torch.zeros(len(upload.clients), dtype=torch.bool)
        for group in (upload.sums, upload.rows):
            for name in [n for n in group if n not in HONEST]:
                if self.attack.damages:
                    group[name] = self._damaged(name, group[name].clone(), upload.clients, rounds, codec, sending, refused)
                refused |= ~group[name].isfinite().flatten(1).all(1).cpu()
        for client, round in zip(upload.clients[refused].tolist(), rounds[refused].tolist(), strict=True):
            log.warning("round %d: what client %d sent is refused: it cannot be read, or is not finite", round, client)
        return refused

    def _damaged(
        self,
        name: str,
        values: Tensor,
        clients: Tensor,
        rounds: Tensor,
        codec: Codec,
        sending: Callable[[str, int], Sending],
        refused: Tensor,
    ) -> Tensor:
        how = sending(name, values.shape[1])
        for i in self.liars[clients].nonzero()[:, 0].tolist():
            generator = self.streams.numpy(f"attack.damaged.{name}", int(clients[i]), int(rounds[i]))
            try:
                values[i] = codec.decode(self.attack.damage(codec.encode(values[i].clone(), how.only(i)), generator), how.layout)
            except CodecError:
                refused[i] = True
        return values

    def models(self, before: Tensor, after: Tensor, nodes: Tensor, rounds: Tensor, layout: Layout) -> Tensor:
        """What ``nodes`` that went from ``before`` to ``after``, ``[C, P]``, say that their models are."""
        lies = self.liars[nodes]
        if not bool(lies.any()):
            return after
        told = before + self.attack.forge(after - before, lies, Forging("x", nodes, rounds, self.streams, layout))
        return torch.where(lies[:, None].to(after.device), told, after)
