"""Zstandard over all the bytes of a message."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hanse.codecs.chain import Squeeze
from hanse.core.errors import CodecError


class zstd(Squeeze):
    """General-purpose compression by Zstandard (RFC 8878)."""

    level: Annotated[int, Field(ge=-7, le=22)] = 3
    """From fast (negative) to small."""

    def squeeze(self, data: bytes) -> bytes:
        import zstandard

        return zstandard.ZstdCompressor(level=self.level).compress(data)

    def restore(self, data: bytes, most: int) -> bytes:
        import zstandard

        try:
            promised = zstandard.get_frame_parameters(data).content_size
            if promised > most:
                raise CodecError(f"zstd: {promised} bytes are promised, at most {most} are allowed")
            if not promised and data != self.squeeze(b""):  # which the library would not look at any further
                raise CodecError(f"zstd: {len(data)} bytes for nothing")
            found: bytes = zstandard.ZstdDecompressor().decompress(data, max_output_size=most, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise CodecError(f"zstd: {error}") from None
        return found
