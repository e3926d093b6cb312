"""How much travels: vectors to bytes and back."""

from hanse.codecs.base import Codec, identity
from hanse.codecs.topk import topk

__all__ = ["Codec", "identity", "topk"]
