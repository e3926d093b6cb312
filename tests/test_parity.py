"""What ``hanse parity`` says. That all engines agree is shown where each of them is tested."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hanse as hs
from hanse import parity
from hanse.config import Settings
from hanse.core.errors import ConfigError

SETTINGS: dict[str, Any] = {"task": "digits(hidden=8)", "clients": 20, "method": "FedAvg", "cohort": 10, "rounds": 50}


@pytest.fixture
def here_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither Ray nor Flower is installed."""
    monkeypatch.setattr(parity, "PACKAGES", {"ray": "no_such_package", "flower": "no_such_package"})


def test_engines_that_are_installed_agree_and_others_are_named(here_alone: None) -> None:
    found = parity.parity(Settings.read(None, SETTINGS), rounds=2, clients=3)
    assert [(v.engine, v.agrees) for v in found] == [("local", True), ("processes", True), ("ray", None), ("flower", None)]
    assert found[1].text == "histories and weights are the same bit for bit"
    assert found[2].text == "not installed: pip install 'hanse[ray]'"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"schedule": "fedbuff(buffer=2)", "cohort": None}, "who is first decides what fedbuff does"),
        ({"attack": "sign_flip(share=0.3)"}, "privacy and attacks are simulated"),
    ],
)
def test_what_a_real_federation_does_not_do_is_said(given: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "PACKAGES", {"ray": "no_such_package", "flower": "torch"})
    found = parity.parity(Settings.read(None, {**SETTINGS, **given}), rounds=1, clients=4)
    assert found[-1].agrees is None and why in found[-1].text
    assert found[1].agrees


def test_what_differs_is_named() -> None:
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=4)
    engine = hs.engines.local("stacked", 4, 1, 1)
    one, other = (
        hs.run(federation, hs.methods.FedAvg(lr=lr), hs.schedules.synchronous(cohort=2), rounds=1, engine=engine)
        for lr in (0.1, 0.2)
    )
    verdict = parity._judge("processes", other, one, 0.0)
    assert verdict.agrees is False and verdict.text.startswith("histories differ in loss; weights differ by up to 0.")
    far = max(float((t - other.weights[n]).abs().max()) for n, t in one.weights.items())
    assert f"{far:.3g}" in verdict.text
    same = parity._judge("processes", one, one, 0.0)
    assert same.agrees and all(torch.equal(t, one.weights[n]) for n, t in one.weights.items())


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="method: unknown name"):
        parity.parity(Settings.read(None, {**SETTINGS, "method": "NoSuch"}), rounds=1, clients=2)
