"""What travels: named tensors, and the declaration of what the server may see.

On any wire or disk a message is a safetensors file (``wire.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hanse.core.problem import Problem
from hanse.core.wire import Tensors as Tensors


@dataclass
class Upload:
    """What a batch of clients sends, axis 0 = client.

    ``sums`` are only ever used through ``sum_i weight_i v_i`` (so they may be added in a tree, in chunks, under secure aggregation
    or with noise); one without a client axis has been added to the running totals already. ``rows`` are seen one by one.
    ``senders`` says of a name that only some clients send who they are, bool ``[C]``; the others' values are zeros and cost no
    bytes. ``loss`` ``[C]`` is each client's mean training loss.
    """

    clients: Tensor
    weight: Tensor
    sums: Tensors
    rows: Tensors
    senders: Tensors
    loss: Tensor


@dataclass
class Reply:
    """What the server sees of some clients.

    ``sums[name] = sum_i weight_i v_i`` is for books that must balance, such as the mean of what all clients remember. The step
    itself uses ``mean``, in which a schedule may count late or rare clients less or more: ``scale`` ``[C]`` (None: all alike)
    multiplies their contributions, and ``total`` (None: the sum of the weights) is what the sum is divided by. ``rows[name]``
    ``[C, ...]`` are seen one by one. ``versions`` int64 ``[C]`` is the round of the model each started from, and
    ``starts[version]`` what was sent then. ``loss`` ``[C]`` is each client's mean training loss, ``population`` the number N of
    registered clients and ``everyone`` the sum of their weights. ``problem`` is for servers that compute gradients themselves.
    ``noised``: the sums have been made differentially private; ``total`` is the expected number of clients. Where a rule averages
    by something more robust than the mean, ``each[name]`` ``[C, P]`` are the single contributions and ``aggregate`` takes them and
    the weights ``[C]`` to one ``[P]``; among peers, who have no server, it leaves everyone its own.
    """

    clients: Tensor
    versions: Tensor
    weight: Tensor
    sums: Tensors
    rows: Tensors
    senders: Tensors
    loss: Tensor
    population: int
    starts: dict[int, Tensors]
    scaled: Tensors | None = None
    scale: Tensor | None = None
    total: float | None = None
    everyone: float = math.nan
    problem: Problem | None = None
    noised: bool = False
    each: Tensors = field(default_factory=dict)
    aggregate: Callable[[Tensor, Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.clients)

    @property
    def counts(self) -> bool:
        """Whether the model moves by it: somebody came, or noise is to hide that nobody did."""
        return self.noised or len(self) > 0

    def without(self, refused: Tensor) -> Reply:
        """As if those ``refused``, bool ``[C]``, whose weight in the sums is 0, had not replied."""
        stays = ~refused

        def some(tensors: Tensors) -> Tensors:
            return {n: t[stays] for n, t in tensors.items()}

        return replace(
            self,
            clients=self.clients[stays],
            versions=self.versions[stays],
            weight=self.weight[stays],
            loss=self.loss[stays],
            rows=some(self.rows),
            senders=some(self.senders),
            each=some(self.each),
            scale=None if self.scale is None else self.scale[stays],
        )

    @property
    def shares(self) -> Tensor:
        """With what each contribution counts in ``mean``: ``scale_i weight_i / total``, ``[C]``."""
        weight = self.weight if self.scale is None else self.weight * self.scale
        return weight / (self.weight.sum() if self.total is None else self.total)

    def mean(self, name: str) -> Tensor:
        """``sum_i scale_i weight_i v_i / total``, over those who sent ``name``; zeros if nobody did.

        With an ``aggregate``, that of ``scale_i v_i``, times ``sum_i weight_i / total``.
        """
        if self.aggregate is not None:
            return self._robust_mean(name, self.aggregate)
        total = self.weight.sum() if self.total is None else torch.as_tensor(self.total, dtype=self.weight.dtype)
        if name in self.senders:
            sent = self.weight[self.senders[name]].sum()
            if not bool(sent):
                return torch.zeros_like(self.sums[name])
            total = total * (sent / self.weight.sum())
        return (self.sums if self.scaled is None else self.scaled)[name] / total

    def _robust_mean(self, name: str, aggregate: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        values, weight = self.each[name], self.weight
        counted = self.senders.get(name, torch.ones(len(self), dtype=torch.bool))
        if self.scale is not None:
            values, counted = values * self.scale[:, None].to(values), counted & (self.scale != 0).to(counted.device)
        if not bool(counted.all()):
            values, weight = values[counted], weight[counted.to(weight.device)]
            if not len(values):
                return values.new_zeros(values.shape[1:])
        found = aggregate(values, weight)
        return found if self.total is None else found * (float(self.weight.sum()) / self.total)
