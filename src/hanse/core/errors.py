"""The one family of errors that hanse raises on purpose.

Every message names the field or file, the value found and what is allowed, so that the command line can print it as it is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HanseError(Exception):
    """Base of all errors a user can cause or meet. ``exit_status`` is what the command line leaves with."""

    exit_status = 2


class ConfigError(HanseError):
    """A setting is wrong: unknown name, value out of range, settings that contradict each other."""


class DataError(HanseError):
    """Data are missing, malformed or do not fit the task."""


class CodecError(HanseError):
    """Bytes that are not a valid encoding: truncated, foreign, or inconsistent."""


class CheckpointError(HanseError):
    """A checkpoint or run folder is missing, truncated, foreign or cannot be written."""


class PrivacyError(HanseError):
    """What was promised to be kept private would not be: a message that breaks a protocol, too few clients, an unbounded value."""


class DivergedError(HanseError):
    """Training produced NaN or infinity."""


class StalledError(HanseError):
    """Nothing can happen any more in a run that is not over: everybody waits for somebody else."""


class TransportError(HanseError):
    """Bytes could not be moved: no connection, a peer that is gone or breaks the protocol, no memory to share."""


class MissingExtraError(HanseError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs the extra {extra!r}: pip install 'hanse[{extra}]'")


def unknown(field: str, value: str, allowed: Iterable[str]) -> ConfigError:
    """The error for a name that is not in ``allowed``, with the nearest names first."""
    names = sorted(allowed)
    folded = {name.casefold(): name for name in names}
    near = [folded[n] for n in difflib.get_close_matches(value.casefold(), list(folded), n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return ConfigError(f"{field}: unknown name {value!r}; {hint}allowed: {', '.join(names)}")
