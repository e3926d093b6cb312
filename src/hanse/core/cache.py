"""Where things are kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``HANSE_CACHE``, else ``hanse`` in the user's folder for caches; it may not be there yet."""
    return Path(os.environ.get("HANSE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hanse")
