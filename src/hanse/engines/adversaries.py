"""Who lies in a run, and what becomes of what they send."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hanse.attacks import Attack, Forging
from hanse.core.layout import Layout
from hanse.core.messages import Upload
from hanse.core.streams import Streams

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

    def models(self, before: Tensor, after: Tensor, nodes: Tensor, rounds: Tensor, layout: Layout) -> Tensor:
        """What ``nodes`` that went from ``before`` to ``after``, ``[C, P]``, say that their models are."""
        lies = self.liars[nodes]
        if not bool(lies.any()):
            return after
        told = before + self.attack.forge(after - before, lies, Forging("x", nodes, rounds, self.streams, layout))
        return torch.where(lies[:, None], told, after)
