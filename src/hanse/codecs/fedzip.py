"""FedZip: the largest changes of each layer, replaced by a few centres, in the shortest of three lossless codes.

Malekijoo, Fadaeieslam, Malekijou, Homayounfar, Alizadeh-Shabdiz, Rawassizadeh: "FEDZIP: A Compression Framework for
Communication-Efficient Federated Learning", arXiv 2102.01593. Of each layer d of n entries:

    1  S = the m entries of largest |d_j|, m = z n;    d_j <- 0 outside S
    2  cluster d by k-means with k centres, one of them near 0;    d_j <- its centre
    3  write the ids of the centres by (a) Huffman's code, (b) addresses, or (c) differences of addresses, by centre

It is the chain ``layers | topk(z) | kmeans(k - 1) | shortest``. What the paper leaves open, and our choice:

    the centre near 0    is 0 and costs nothing; the other k - 1 are of the entries in S alone. Else all that is pruned would arrive
                         as a small constant: a bias
    m                    rounded down, at least 1; of equal entries the first
    start of k-means     one mean for each sign, see ``kmeans``; nothing is drawn
    which of the codes   the shortest, layer by layer, which a byte names ("auto")
    what is not sent     is lost, as in the paper; ``feedback(fedzip)`` adds it to the next message

A layer with a number that is not finite travels as it is. With m of n entries sent, c_g of them for centre g, it takes

    varint(m + 1) + 4 (k - 1) + 1 if auto + the code                        bytes, for float32
    (a)  k + varint(p) + p,   p = ceil(sum_s c_s len_s / 8)                 over all k symbols, zero too, in codes of len_s bits
    (b)  sum_{g < k - 1} varint(c_g) + ceil(m w / 8)                        w the bits of n - 1
    (c)  sum_{g < k - 1} varint(c_g) + (k - 1) + ceil(sum_g c_g w_g / 8)    w_g the bits of the largest gap, at least 1

where varint(.) is the bytes of such a number, and a message 16 more. For k = 3 and m <= n / 2 the codes of (a) take n + m bits if
both centres occur. An entry takes a bit at least, so (a) alone cannot make float32 more than 32 times smaller.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hanse.codecs.base import Codec
from hanse.codecs.chain import Coder, Composed, layers
from hanse.codecs.coders import gaps, positions
from hanse.codecs.huffman import huffman, shortest
from hanse.codecs.kmeans import kmeans
from hanse.codecs.sparse import Fraction, topk

CODERS: dict[str, Coder] = {
    "auto": shortest(),
    "huffman": huffman(),
    "positions": positions(grouped=True),
    "gaps": gaps(grouped=True),
}


class fedzip(Composed):
    """Of each layer the largest entries, replaced by a few centres, losslessly written (Malekijoo et al., arXiv 2102.01593).

    The chain ``layers | topk(z) | kmeans(k - 1) | shortest``, and in every respect equal to it.
    """

    z: Fraction = 0.1
    """Share of each layer's entries that is kept, rounded down but at least one."""
    k: Annotated[int, Field(ge=2, le=256)] = 3
    """Centres of each layer; one of them is zero."""
    encoding: Literal["auto", "huffman", "positions", "gaps"] = "auto"
    """Lossless code; auto: the shortest of the three for each layer."""

    def chained(self) -> tuple[Codec, ...]:
        return layers(), topk(self.z), kmeans(self.k - 1), CODERS[self.encoding]
