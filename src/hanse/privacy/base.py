"""What every kind of privacy is."""

from __future__ import annotations

import importlib.util
from typing import ClassVar

from hanse.core.errors import MissingExtraError, PrivacyError
from hanse.core.messages import Upload
from hanse.core.part import Part


class Privacy(Part):
    """Base of what stands between the clients' uploads and the server."""

    kind: ClassVar[str] = "privacy"
    abstract: ClassVar[bool] = True

    def check(self, upload: Upload) -> None:
        """Raise ``PrivacyError`` if anything in ``upload`` is not a sum over all of the clients."""
        single = [*upload.rows, *upload.senders]
        if single:
            raise PrivacyError(
                f"{type(self).__name__}: the rule sends {single[0]!r} to be seen client by client; only sums are kept private"
            )

    def require(self, *packages: str) -> None:
        """Raise ``MissingExtraError`` unless the packages are installed."""
        if any(importlib.util.find_spec(package) is None for package in packages):
            raise MissingExtraError(f"privacy = {type(self).__name__}", "privacy")
