"""The matrix of gossip, ``x_i <- w_ii x_i + sum_j w_ij x_j``, its gap, and its product with all models at once.

Symbols are those of Shi et al.: "Improving the Model Consistency of Decentralized Federated Learning", ICML 2023, arXiv 2302.04083.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from hanse.core.errors import ConfigError
from hanse.core.streams import Streams

CHUNK = 1 << 20
"""Numbers that are mixed at a time, 4 MB of float32."""
COLUMNS = 512
"""Columns that are mixed at a time, at least: shorter pieces of rows cost more than the cache saves."""
DENSE = 2000
"""Nodes up to which the spectrum is taken from the dense matrix, in less than a second."""


@dataclass(frozen=True, eq=False)
class Mixing:
    """Weights W over N nodes: of the others by rows, without the diagonal, and the diagonal ``own``.

    Row i has the entries from ``offsets[i]`` to ``offsets[i + 1]``: ``weights`` w_ij for the nodes j in ``neighbours``, in order.
    """

    offsets: Tensor
    """int64 ``[N + 1]``."""
    neighbours: Tensor
    """int64 ``[E]``, E twice the number of edges: who each weight is for."""
    weights: Tensor
    """float64 ``[E]``, positive."""
    own: Tensor
    """float64 ``[N]``: w_ii."""

    @classmethod
    def metropolis(cls, graph: nx.Graph) -> Mixing:
        """Metropolis-Hastings: ``w_ij = 1 / (1 + max(deg_i, deg_j))``, w_ii the rest; symmetric and doubly stochastic."""
        offsets, neighbours = _adjacency(graph)
        degrees = offsets.diff()
        receivers = _rows(degrees)
        weights = 1 / (1 + torch.maximum(degrees[receivers], degrees[neighbours]).double())
        return cls(offsets, neighbours, weights, 1 - _row_sums(receivers, weights, len(degrees)))

    @classmethod
    def leaning(cls, graph: nx.Graph, own: float) -> Mixing:
        """``w_ii = own``, the neighbours share the rest equally; a node without any keeps its model.

        Rows sum to 1. Where nodes differ in their number of neighbours, columns do not, and mixing moves the mean. Raises
        ``ConfigError`` unless ``own`` is in [0, 1).
        """
        if not 0 <= own < 1:
            raise ConfigError(f"own: {own!r} is not allowed: at least 0 and less than 1")
        offsets, neighbours = _adjacency(graph)
        degrees = offsets.diff()
        weights = (1 - own) / degrees[_rows(degrees)].double()
        return cls(offsets, neighbours, weights, (degrees == 0).double().clamp(min=own))

    @classmethod
    def proportional(cls, graph: nx.Graph, counts: Tensor) -> Mixing:
        """In proportion to ``counts``, int64 ``[N]``, of oneself and one's neighbours; rows sum to 1, columns need not."""
        offsets, neighbours = _adjacency(graph)
        receivers, counts = _rows(offsets.diff()), counts.double()
        total = counts + _row_sums(receivers, counts[neighbours], len(counts))
        lone = total == 0  # nobody near has any
        total = torch.where(lone, 1.0, total)
        return cls(offsets, neighbours, counts[neighbours] / total[receivers], torch.where(lone, 1.0, counts / total))

    @classmethod
    def into_one(cls, models: int, own: float) -> Mixing:
        """Node 0 has received as many ``models``, of nodes 1, 2, ..., which keep theirs; ``own`` as in ``leaning``."""
        offsets = torch.full((models + 2,), models).index_fill(0, torch.tensor([0]), 0)
        keeps = torch.ones(models + 1, dtype=torch.float64).index_fill(0, torch.tensor([0]), own if models else 1.0)
        return cls(
            offsets, torch.arange(1, models + 1), torch.full((models,), (1 - own) / max(1, models), dtype=torch.float64), keeps
        )

    @property
    def degrees(self) -> Tensor:
        """Number of neighbours of each node, int64 ``[N]``."""
        return self.offsets.diff()

    @cached_property
    def receivers(self) -> Tensor:
        """Whose row each weight is in, int64 ``[E]``; ``neighbours`` are the senders."""
        return _rows(self.degrees)

    def without(self, away: Tensor) -> Mixing:
        """The weights of a round in which the nodes ``away``, bool ``[N]``, neither send nor receive.

        They keep their models; those they are missed by add the missing weight to their own. Symmetry and row sums stay.
        """
        return self.losing(away[self.receivers] | away[self.neighbours])

    def losing(self, lost: Tensor) -> Mixing:
        """The weights where the messages ``lost``, bool ``[E]``, do not arrive: receivers add what is missing to their own."""
        nodes, receivers = len(self.own), self.receivers[~lost]
        missing = _row_sums(self.receivers[lost], self.weights[lost], nodes)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(receivers, minlength=nodes).cumsum(0)])
        own = torch.where(offsets.diff() > 0, self.own + missing, 1.0)
        return Mixing(offsets, self.neighbours[~lost], self.weights[~lost], own)

    def mix(self, own: Tensor, sent: Tensor | None = None) -> Tensor:
        """``w_ii own_i + sum_j w_ij sent_j`` of models ``[N, P]``, finite float32 or float64, into a new ``[N, P]``.

        ``sent``: what arrives of each node at its neighbours, if not the model itself. The same numbers for the same number of
        threads; equal to ``matrix() @ own`` up to rounding.
        """
        if sent is None:
            return self._times(self.own, self.weights, own)
        return self._times(torch.zeros_like(self.own), self.weights, sent).addcmul_(own, self.own.to(own)[:, None])

    def average(self, sent: Tensor) -> Tensor:
        """``sum_j w_ij sent_j / sum_j w_ij``, the mean of what a node receives, ``[N, P]``; zeros for a node without neighbours."""
        received = _row_sums(self.receivers, self.weights, len(self.own))
        return self._times(torch.zeros_like(self.own), self.weights / received[self.receivers], sent)

    def _times(self, diagonal: Tensor, weights: Tensor, x: Tensor) -> Tensor:
        """The product of a matrix, whose other entries are ``weights``, with ``x`` ``[N, P]``.

        Sparse on all columns at once reads rows from memory as often as they have neighbours. On some columns at a time, all N
        pieces stay in the cache, and torch's product of a matrix in CSR reads and writes them where they are. It was the fastest
        of those tried: 'embedding_bag' wants copies of the pieces, scipy one thread.
        """
        nodes = len(x)
        if len(weights) == nodes * (nodes - 1) > 0 and bool((weights == weights[0]).all()):
            common = weights[0].to(x)  # every node gets the same sum, but for its own part in it
            return torch.addcmul(x.sum(0) * common, x, (diagonal.to(x) - common)[:, None])
        if 8 * len(weights) > nodes * nodes:  # then the dense product is faster, which does more work a second
            return self._dense(diagonal, weights).to(x) @ x
        matrix = self._sparse(diagonal, weights).to(x)
        if x.device.type != "cpu":
            return matrix @ x
        out, step = torch.empty_like(x), max(CHUNK // nodes, COLUMNS)
        for some, into in zip(torch.split(x, step, 1), torch.split(out, step, 1), strict=True):
            torch.addmm(into, matrix, some, beta=0, out=into)
        return out

    def _dense(self, diagonal: Tensor, weights: Tensor) -> Tensor:
        matrix = torch.diag(diagonal)
        matrix[self.receivers, self.neighbours] = weights
        return matrix

    def _sparse(self, diagonal: Tensor, weights: Tensor) -> Tensor:
        """With the diagonal first in every row."""
        nodes, entries = len(diagonal), len(diagonal) + len(weights)
        first, rest = self.offsets[:-1] + torch.arange(nodes), torch.arange(len(weights)) + self.receivers + 1
        columns, values = torch.empty(entries, dtype=torch.int64), torch.empty(entries, dtype=torch.float64)
        columns[first], columns[rest] = torch.arange(nodes), self.neighbours
        values[first], values[rest] = diagonal, weights
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says once that CSR is in beta
            return torch.sparse_csr_tensor(self.offsets + torch.arange(nodes + 1), columns, values, (nodes, nodes))

    def matrix(self) -> Tensor:
        """W, float64 ``[N, N]``."""
        return self._dense(self.own, self.weights)

    @cached_property
    def second(self) -> float:
        """``lambda = max(|lambda_2|, |lambda_N|)``, by which the distance from consensus shrinks in a step, at least.

        W must be reversible, ``pi_i w_ij = pi_j w_ji`` for some positive pi, as all that are made here are; it then has the real
        eigenvalues of the symmetric matrix of ``sqrt(w_ij w_ji)``. If W is not symmetric, the distance meant is from the mean
        weighted by pi, in the norm weighted by pi. Beyond 2,000 nodes Lanczos iterations find the ends of the spectrum: quickly,
        unless the gap is tiny (a ring of 5,000 takes half a minute).
        """
        from scipy.sparse import csr_array, diags_array
        from scipy.sparse.linalg import eigsh

        nodes = len(self.own)
        if nodes == 1:
            return 0.0
        others = csr_array((self.weights.numpy(), self.neighbours.numpy(), self.offsets.numpy()), shape=(nodes, nodes))
        similar = others.multiply(others.T).sqrt() + diags_array(self.own.numpy())
        if nodes <= DENSE:
            values = np.linalg.eigvalsh(similar.toarray())
        else:
            start = Streams(0).numpy("topology.spectrum").normal(size=nodes)  # any but an eigenvector; eigsh would draw its own
            values = np.sort(eigsh(similar, k=3, which="BE", v0=start, return_eigenvectors=False))
        return float(max(abs(values[0]), abs(values[-2])))

    @property
    def gap(self) -> float:
        """The spectral gap, ``1 - lambda``."""
        return 1 - self.second


def _adjacency(graph: nx.Graph) -> tuple[Tensor, Tensor]:
    """Offsets and neighbours, in order, of the nodes 0 to N - 1."""
    rows = nx.to_scipy_sparse_array(graph, nodelist=range(len(graph)), dtype=np.float64, weight=None, format="csr")
    rows.sort_indices()
    return torch.from_numpy(rows.indptr).long(), torch.from_numpy(rows.indices).long()


def _rows(degrees: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(degrees)), degrees)


def _row_sums(receivers: Tensor, weights: Tensor, nodes: int) -> Tensor:
    return torch.zeros(nodes, dtype=torch.float64).index_add_(0, receivers, weights)


def consensus_distance(models: Tensor) -> float:
    """``mean_i ||x_i - mean x||^2`` of ``models`` ``[N, P]``."""
    centre, few = models.mean(0), max(1, CHUNK // max(1, models.shape[1]))
    return sum(float((rows - centre).double().square().sum()) for rows in torch.split(models, few)) / len(models)
