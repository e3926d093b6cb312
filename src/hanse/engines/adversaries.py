"""Who lies in a run, and what becomes of what they send."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hanse.attacks import Attack, Forging
from hanse.codecs.base import Codec, Sending
from hanse.core.errors import CodecError, ConfigError
from hanse.core.layout import Layout
from hanse.core.messages import Upload
from hanse.core.streams import Streams

log = logging.getLogger(__name__)

HONEST = {"buffers", "domain"}
"""What nobody lies about: batch-norm statistics, and whose they are."""

MARKS = (".kept", ".overlap")
"""Endings of the names of sums that follow from what was sent."""


class Adversaries:
    """The liars of a run under one ``attack``: the same clients from the first round to the last."""

    def __init__(self, attack: Attack, clients: int, streams: Streams) -> None:
        self.attack, self.streams = attack, streams
        self.liars = attack.liars(clients, streams)
        """Who lies, bool ``[clients]``."""
        if bool(self.liars.all()):
            raise ConfigError(f"attack: {attack} is not allowed with {clients} clients: none of them would be honest")

    def forge(self, uploads: Sequence[Upload], rounds: Sequence[Tensor], layout_of: Callable[[str, int], Layout]) -> None:
        """Replace what liars send in the batches of one exchange, which they know all of; ``rounds`` int64 ``[C]`` a batch."""
        clients, rounds_, sizes = torch.cat([u.clients for u in uploads]), torch.cat([*rounds]), [len(u.clients) for u in uploads]
        if not self.attack.forges or not bool(self.liars[clients].any()):
            return
        everyone = torch.ones(len(clients), dtype=torch.bool)
        for kind in ("sums", "rows"):
            groups = [getattr(u, kind) for u in uploads]
            for name in [n for n in groups[0] if n not in HONEST]:
                each = torch.cat([group[name] for group in groups])
                sent = torch.cat([u.senders[name].cpu() for u in uploads]) if name in uploads[0].senders else everyone
                who, at = clients[sent], sent.to(each.device)
                forging = Forging(name, who, rounds_[sent], self.streams, layout_of(name, each.shape[1]))
                each[at] = self.attack.forge(each[at], self.liars[who], forging)
                for group, part in zip(groups, torch.split(each, sizes), strict=True):
                    group[name] = part

    def deliver(self, upload: Upload, rounds: Tensor, codec: Codec, sending: Callable[[str, int], Sending]) -> Tensor:
        """What arrives of the vectors of ``upload``, in place, and who is refused, bool ``[C]``: whose message cannot be read, or
        is not finite; nothing of theirs is left. ``rounds`` and ``sending`` are those they were sent with.
        """
        refused = torch.zeros(len(upload.clients), dtype=torch.bool)
        for group in (upload.sums, upload.rows):
            for name in [n for n in group if n not in HONEST and not n.endswith(MARKS)]:
                if self.attack.damages:
                    sent = upload.senders.get(name, ~refused).cpu() & self.liars[upload.clients]
                    group[name] = group[name].clone()
                    refused |= self._damaged(
                        name, group[name], sent, upload.clients, rounds, codec, sending(name, group[name].shape[1])
                    )
                refused |= ~group[name].isfinite().flatten(1).all(1).cpu()
        for client, round in zip(upload.clients[refused].tolist(), rounds[refused].tolist(), strict=True):
            said = "round %d: what client %d sent is refused: it cannot be read, or is not finite"
            log.warning(said, round, client, extra={"client": client, "round": round})
        if bool(refused.any()):
            for group in (upload.sums, upload.rows):
                group |= {n: t.masked_fill(refused.to(t.device).view(-1, *[1] * (t.dim() - 1)), 0) for n, t in group.items()}
        return refused

    def _damaged(
        self, name: str, values: Tensor, sent: Tensor, clients: Tensor, rounds: Tensor, codec: Codec, how: Sending
    ) -> Tensor:
        """Damage the rows ``sent`` bool ``[C]`` of ``values`` ``[C, P]``; which of them cannot be read, bool ``[C]``."""
        unread = torch.zeros_like(sent)
        for i in sent.nonzero()[:, 0].tolist():
            generator = self.streams.numpy(f"attack.damaged.{name}", int(clients[i]), int(rounds[i]))
            try:
                values[i] = codec.decode(self.attack.damage(codec.encode(values[i].clone(), how.only(i)), generator), how.layout)
            except CodecError:
                unread[i] = True
        return unread

    def models(self, before: Tensor, after: Tensor, nodes: Tensor, rounds: Tensor, layout: Layout) -> Tensor:
        """What ``nodes`` that went from ``before`` to ``after``, ``[C, P]``, say that their models are."""
        lies = self.liars[nodes]
        if not bool(lies.any()):
            return after
        told = before + self.attack.forge(after - before, lies, Forging("x", nodes, rounds, self.streams, layout))
        return torch.where(lies[:, None].to(after.device), told, after)
