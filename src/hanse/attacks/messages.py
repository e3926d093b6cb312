"""What happens to messages on their way: bytes that are not what was sent."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import PositiveInt

from hanse.attacks.base import Attack


class damaged(Attack):
    """Liars' messages arrive with some of their bits turned over.

    What a codec refuses to read, the server does without. The tensors as they are, without a codec, have no checksum: what can be
    read is taken for what was sent.
    """

    damages: ClassVar[bool] = True

    bits: PositiveInt = 8
    """Bits turned over in every vector."""

    def damage(self, message: bytes, generator: np.random.Generator) -> bytes:
        found = np.frombuffer(message, np.uint8).copy()
        places = generator.integers(0, 8 * len(found), self.bits)
        np.bitwise_xor.at(found, places // 8, (1 << places % 8).astype(np.uint8))
        return found.tobytes()
