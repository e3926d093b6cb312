"""What a check says."""

from __future__ import annotations

from typing import Literal, NamedTuple

RENEW = "write the federation anew with 'hanse deploy', or sign another certificate with its authority"


class Check(NamedTuple):
    """What was looked at, how it is, what was found, and what to do about it (nothing where it is ok)."""

    name: str
    state: Literal["ok", "warning", "problem"]
    found: str
    do: str = ""


def ok(name: str, found: str) -> Check:
    """Nothing to do."""
    return Check(name, "ok", found)


def warning(name: str, found: str, do: str) -> Check:
    """A run will do, but."""
    return Check(name, "warning", found, do)


def problem(name: str, found: str, do: str) -> Check:
    """A run will not do."""
    return Check(name, "problem", found, do)


def shown(check: Check) -> str:
    """A check as a line, and what to do as another."""
    line = f"{check.state:8} {check.name:12} {check.found}"
    return line + (f"\n{'':22}-> {check.do}" if check.do else "")
