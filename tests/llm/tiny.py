"""A model that has learned nothing, in a folder of its own, made in a second."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from hanse.llm.pretrain import Recipe, pretrain

RECIPE = Recipe(vocabulary=320, width=16, layers=3, heads=2, length=16, longest=256, batch=4, steps=2)
TEXT = ["the quick brown fox jumps over the lazy dog, and again over the log.\n" * 40]


@cache
def folder(architecture: str = "decoder") -> str:
    """Where it is."""
    path = Path(mkdtemp(prefix="hanse-tiny-")) / architecture
    pretrain(RECIPE.model_copy(update={"architecture": architecture}), TEXT, path)
    return str(path)
