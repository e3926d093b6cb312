"""byzfl, an independent implementation of robust rules, as a judge; it is not needed otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from hanse.bench import aggregators


def byzfl() -> Any:
    """Its rules and pre-aggregations; skips the test where it is not installed."""
    found = aggregators.byzfl()
    if found is None:
        pytest.skip("byzfl is not installed")
    return found
