"""How much travels: vectors to bytes and back."""

from hanse.codecs.base import Codec, Links, Sending, Sent, identity
from hanse.codecs.chain import chain, layers
from hanse.codecs.coders import bitmap, gaps, packed, positions
from hanse.codecs.fedzip import fedzip
from hanse.codecs.feedback import feedback
from hanse.codecs.huffman import huffman, shortest
from hanse.codecs.kmeans import kmeans
from hanse.codecs.lowrank import lowrank
from hanse.codecs.projections import projections
from hanse.codecs.quantise import cast, int8, nf4, sign, ternary, uniform
from hanse.codecs.ranks import ranks
from hanse.codecs.sparse import bcrs, randomk, threshold, topk
from hanse.codecs.unary import elias, golomb
from hanse.codecs.zstd import zstd

__all__ = [
    "Codec",
    "Links",
    "Sending",
    "Sent",
    "bcrs",
    "bitmap",
    "cast",
    "chain",
    "elias",
    "fedzip",
    "feedback",
    "gaps",
    "golomb",
    "huffman",
    "identity",
    "int8",
    "kmeans",
    "layers",
    "lowrank",
    "nf4",
    "packed",
    "positions",
    "projections",
    "randomk",
    "ranks",
    "shortest",
    "sign",
    "ternary",
    "threshold",
    "topk",
    "uniform",
    "zstd",
]
