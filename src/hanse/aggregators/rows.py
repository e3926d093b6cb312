"""Linear combinations of rows that nobody has computed yet."""

from __future__ import annotations

import torch
from torch import Tensor

from hanse.aggregators.gram import gram, near, spread, symmetric, taken, wide


class Rows:
    """``matrix @ data``, ``[p, C]`` times ``[C, P]``, computed chunk by chunk where it is needed (``matrix`` None: the data).

    Rows of the data whose column in ``matrix`` is 0 are never read, so a matrix of ones and zeros selects rows. ``exact``: inner
    products in float64, because those in float32 were not finite.
    """

    def __init__(self, data: Tensor, matrix: Tensor | None = None, exact: bool = False) -> None:
        self.data, self.matrix, self.exact, self.dtype = data, matrix, exact, wide(data.dtype)
        self._grams: dict[bool, Tensor] = {}
        self._used = None if matrix is None else _nonzero((matrix != 0).any(0))
        part = matrix if matrix is None or self._used is None else matrix[:, self._used]
        selects = part is not None and part.shape[0] == part.shape[1] and torch.equal(part, torch.eye(len(part)).to(part))
        self._mix = None if part is None or selects else part

    def __len__(self) -> int:
        return len(self.data) if self.matrix is None else len(self.matrix)

    def __getitem__(self, span: slice) -> Tensor:
        """Columns ``span``, ``[p, n]``; to be read only."""
        x = taken(self.data[:, span], self._used).to(self.dtype)
        return x if self._mix is None else self._mix.to(x) @ x

    def gram(self, centred: bool) -> Tensor | None:
        """Inner products, float64 ``[p, p]``; with ``centred`` possibly those of the differences from some vector.

        None if they are not finite.
        """
        # Rows of a matrix that do not sum to 1 leave no meaning to centred products; who had it made asked for the others.
        centred = centred and False not in self._grams
        if centred not in self._grams:
            reference = near(self.data, self._used) if centred else None
            found = gram(self.data, reference, self._used, self.exact)
            self._grams[centred] = found if self._mix is None else symmetric(self._mix @ found @ self._mix.T)
        found = self._grams[centred]
        return found if bool(found.isfinite().all()) else None

    def mixed(self, m: Tensor) -> Rows:
        """``m @ self``, for ``m`` float64 ``[B, p]``. Where its rows do not sum to 1, centred inner products have no meaning."""
        found = Rows(self.data, m if self.matrix is None else m @ self.matrix, self.exact)
        found._grams = {centred: symmetric(m @ known @ m.T) for centred, known in self._grams.items()}
        return found

    def combined(self, c: Tensor) -> Tensor:
        """``sum_i c_i x_i`` ``[P]`` for ``c`` float64 ``[p]``, in the type of the data. One row alone, with 1, is a copy of it."""
        c = c if self.matrix is None else c @ self.matrix
        used = _nonzero(c != 0)
        if used is not None:
            c = c[used]
        if used is not None and len(used) == 1 and bool(c == 1):
            return self.data[used[0]].clone()
        if used is None and self.data.dtype == self.dtype:
            return c.to(self.dtype) @ self.data
        out, c = self.data.new_empty(self.data.shape[1]), c.to(self.dtype)

        def some(spans: list[slice]) -> None:
            for span in spans:
                out[span] = c @ taken(self.data[:, span], used).to(self.dtype)

        spread(some, self.data)
        return out


def _nonzero(which: Tensor) -> Tensor | None:
    """Where ``which`` is true; None: everywhere."""
    return None if bool(which.all()) else which.nonzero()[:, 0]
