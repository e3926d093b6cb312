"""The attacks of ByzFL, as a judge of ours."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest


def judge() -> ModuleType:
    """``byzfl.attacks``; skips the test where byzfl is not installed.

    The package's own ``__init__`` also loads benchmarks, which need torchvision, so a bare package takes its place.
    """
    if "byzfl" not in sys.modules:
        spec = importlib.util.find_spec("byzfl")
        if spec is None or spec.submodule_search_locations is None:
            pytest.skip("byzfl is not installed")
        bare = ModuleType("byzfl")
        bare.__spec__, bare.__path__ = spec, list(spec.submodule_search_locations)
        sys.modules["byzfl"] = bare
    return importlib.import_module("byzfl.attacks")
