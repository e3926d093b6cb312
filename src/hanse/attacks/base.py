"""What every attack is: who lies, what liars train on, and what they send instead of what they computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hanse.core.layout import Layout
from hanse.core.part import Part
from hanse.core.samples import Samples
from hanse.core.streams import Streams

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Forging:
    """One vector of an upload, axis 0 = client: its ``name``, its ``layout``, and what its noise is keyed by.

    ``clients`` and ``rounds`` are int64 ``[C]`` on the CPU.
    """

    name: str
    clients: Tensor
    rounds: Tensor
    streams: Streams
    layout: Layout


@dataclass(frozen=True)
class Cohort:
    """The rows of one cohort as its liars see them: ``values`` ``[C, P]``, and who of them lies, ``lies`` bool ``[C]``.

    L of them lie. ``attack`` is the name that keys their noise. Rows are taken apart on first use, as most attacks need only their
    own.
    """

    values: Tensor
    lies: Tensor
    forging: Forging
    attack: str

    @cached_property
    def own(self) -> Tensor:
        """What the liars computed themselves, ``[L, P]``."""
        return self.values[self.lies]

    @cached_property
    def _witnesses(self) -> Tensor:
        """Places of the rows that an omniscient attack goes by, int64 ``[H]``."""
        seen = (self.lies if bool(self.lies.all()) else ~self.lies).nonzero()[:, 0]
        return seen[self.forging.clients[seen].argsort(stable=True)]

    @cached_property
    def honest(self) -> Tensor:
        """The rows of the honest, ``[H, P]``, in the order of their numbers; the liars' own where nobody is honest."""
        return self.values[self._witnesses]

    @property
    def honest_clients(self) -> Tensor:
        """Whose rows ``honest`` holds, int64 ``[H]``."""
        return self.forging.clients[self._witnesses]

    @property
    def purpose(self) -> str:
        """What keys this attack's noise on this vector."""
        return f"attack.{self.attack}.{self.forging.name}"

    def uniform(self) -> Tensor:
        """A number in (0, 1] for every entry of ``own``, ``[L, P]``: the same for a client and round whoever else is there."""
        return self._drawn(self.forging.streams.uniform)

    def normal(self) -> Tensor:
        """A standard normal number for every entry of ``own``, ``[L, P]``, keyed likewise."""
        return self._drawn(self.forging.streams.normal)

    def _drawn(self, draw: Callable[[str, Tensor, Tensor, int], Tensor]) -> Tensor:
        clients, rounds = self.forging.clients[self.lies], self.forging.rounds[self.lies]
        return draw(self.purpose, clients, rounds, self.values.shape[1]).to(self.values)


class Attack(Part):
    """Base of all attacks. One that changes updates defines ``forged``, one that changes data ``poison``."""

    kind: ClassVar[str] = "attack"
    abstract: ClassVar[bool] = True

    damages: ClassVar[bool] = False
    """Whether it changes encoded messages."""

    share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the clients that lie, rounded to whole clients."""
    together: bool = False
    """The liars agree on one message: the mean of what they would send one by one."""

    def liars(self, clients: int, streams: Streams) -> Tensor:
        """Who lies during the whole run, bool ``[clients]``: ``round(share * clients)`` of them, the same under every attack."""
        chosen = streams.sample("attack.liars", clients, round(self.share * clients), 0).cpu()
        return torch.zeros(clients, dtype=torch.bool).index_fill_(0, chosen, True)

    def poison(self, samples: Samples, liars: Tensor, streams: Streams) -> Samples:
        """What everybody trains on when ``liars`` (bool ``[clients]``) have changed what is theirs; ``samples`` stay as they are.

        Raises ``ConfigError`` where the attack does not fit the data.
        """
        return samples

    def forge(self, values: Tensor, lies: Tensor, forging: Forging) -> Tensor:
        """``values`` ``[C, P]`` of one cohort, as everybody computed them, with the rows of those that lie, bool ``[C]``, replaced.

        Rows of the honest keep their bits, and ``values`` is not changed in place.
        """
        lies = lies.to(forging.clients.device)
        if not bool(lies.any()):
            return values
        cohort = Cohort(values, lies, forging, type(self).__name__)
        sent = self.forged(cohort)
        if self.together:
            sent = sent.mean(0).expand_as(sent)
        elif sent is cohort.own:
            return values
        return values.index_copy(0, lies.nonzero()[:, 0].to(values.device), sent)

    @property
    def forges(self) -> bool:
        """Whether liars send anything but what they have computed."""
        return self.together or type(self).forged is not Attack.forged

    def forged(self, cohort: Cohort) -> Tensor:
        """What each liar of a cohort would send by itself, ``[L, P]``."""
        return cohort.own

    def damage(self, message: bytes, generator: np.random.Generator) -> bytes:
        """What arrives of a liar's encoded vector, if the attack ``damages``."""
        return message

    def probe(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """Test samples, made from ``x`` ``[N, ...]`` and ``y`` ``[N]``, on which the attack has succeeded where the model answers
        the second tensor; None where there is nothing to measure. Raises ``ConfigError`` where the attack does not fit the data.
        """
        return None
