"""Instructions that need no file: eight kinds of small work on English words of Python's own documentation."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np

from hanse.llm.examples import Example


@cache
def documentation() -> str:
    """The text of Python's language reference as it is installed with Python, some 450,000 characters."""
    import pydoc_data.topics

    return "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


@cache
def vocabulary() -> tuple[str, ...]:
    """Its words of three to six small letters, in the order of the alphabet."""
    return tuple(sorted(set(re.findall(r"(?<![\w.])[a-z]{3,6}(?![\w.(])", documentation()))))


Work = Callable[[list[str]], str]

COMMANDS: Mapping[str, tuple[str, Work]] = {
    "copy": ("Repeat the words.", " ".join),
    "reverse": ("Say the words in reverse order.", lambda words: " ".join(words[::-1])),
    "upper": ("Write the words in capital letters.", lambda words: " ".join(words).upper()),
    "sort": ("Sort the words by the alphabet.", lambda words: " ".join(sorted(words))),
    "count": ("How many words are there?", lambda words: str(len(words))),
    "first": ("Say the first word.", lambda words: words[0]),
    "last": ("Say the last word.", lambda words: words[-1]),
    "initials": ("Say the first letter of every word.", lambda words: " ".join(word[0] for word in words)),
}
"""What is asked for, and how it is done."""


def words(rng: np.random.Generator) -> list[str]:
    """Two to five words."""
    return [str(word) for word in rng.choice(vocabulary(), size=int(rng.integers(2, 6)))]


def examples(rng: np.random.Generator, each: int) -> list[Example]:
    """So many examples of every kind, kind by kind."""
    found = []
    for name, (instruction, work) in COMMANDS.items():
        for _ in range(each):
            given = words(rng)
            found.append(Example(instruction, " ".join(given), work(given), name))
    return found


def exercises(rng: np.random.Generator, count: int) -> list[str]:
    """The same work without instructions: a sign for each kind, so that a model can learn what it has to be able to do, and has yet
    to learn what it is asked for.
    """
    signs = dict(zip(COMMANDS, "ABCDEFGH", strict=True))
    found = []
    for kind in rng.choice([*COMMANDS], size=count):
        given = words(rng)
        found.append(f"{signs[str(kind)]}: {' '.join(given)} = {COMMANDS[str(kind)][1](given)}\n")
    return found
