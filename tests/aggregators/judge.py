"""byzfl, an independent implementation of robust rules, as a judge; it is not needed otherwise."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest


def byzfl() -> Any:
    """Its rules and pre-aggregations; skips the test where it is not installed."""
    if "byzfl" not in sys.modules:  # its own __init__ asks for data sets and networks, which the rules do not need
        spec = find_spec("byzfl")
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("byzfl is not installed")
        bare = ModuleType("byzfl")
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules["byzfl"] = bare
    from byzfl import aggregators

    return aggregators
