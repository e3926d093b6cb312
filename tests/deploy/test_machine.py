"""Every problem of one machine is caused for real, and found with what to do about it."""

from __future__ import annotations

import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from healthy import CSV, NOW, RUN, is_problem

pytest.importorskip("cryptography")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from hanse.config import Settings
from hanse.deploy import keys, machine
from hanse.deploy.app import FLOWER
from hanse.deploy.check import Check, ok
from hanse.deploy.responder import installed

pytestmark = pytest.mark.usefixtures("nobodys_data")


def test_versions_that_differ_are_found() -> None:
    here = installed()
    there = {**here, "hanse": "9.9", "torch": "0.1"}
    found = {check.name: check for check in machine.versions(there)}
    is_problem(found["hanse"], "9.9 on the server")
    assert found["torch"].state == "warning" and found["python"].state == "ok"


def test_a_flower_that_is_missing_or_another_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, state in (("", "problem"), ("1.0.0", "warning"), (FLOWER, "ok")):
        monkeypatch.setattr(machine, "installed", lambda version=version: {"flwr": version})
        assert [check.state for check in machine.versions({})] == [state]


def test_keys_that_others_may_read_are_found(fed: Path) -> None:
    key = fed / "server" / "server.key"
    assert [check.state for check in machine.private_files([key])] == ["ok"]
    key.chmod(0o640)
    (check,) = machine.private_files([key, fed / "server" / "ca.key"])
    is_problem(check, "mode 640")
    assert check.do.startswith(f"chmod 600 {key}")


def test_certificates_that_end_are_found(tmp_path: Path) -> None:
    keys.authority(tmp_path, 100, NOW - timedelta(days=90))
    keys.server(tmp_path, ["fed.example.org"], 50, NOW - timedelta(days=90))
    is_problem(machine.certificate(tmp_path, "fed.example.org", NOW), "expired on")
    is_problem(machine.certificate(tmp_path, "fed.example.org", NOW - timedelta(days=91)), "not valid before")
    soon = machine.certificate(tmp_path, "fed.example.org", NOW - timedelta(days=50))
    assert soon.state == "warning" and "ends on" in soon.found
    assert machine.certificate(tmp_path, "fed.example.org", NOW - timedelta(days=80)).state == "ok"
    is_problem(machine.certificate(tmp_path, "other.example.org", NOW - timedelta(days=80)), "not for 'other.example.org'")


def test_a_key_of_another_certificate_is_found(fed: Path, tmp_path: Path) -> None:
    keys.authority(tmp_path / "other", 10, NOW)
    keys.server(tmp_path / "other", ["127.0.0.1"], 10, NOW)
    shutil.copy(tmp_path / "other" / "server.key", fed / "server" / "server.key")
    is_problem(machine.certificate(fed / "server", "127.0.0.1", NOW), "not the key of")


def test_private_keys_that_lie_about_are_warned_of(fed: Path) -> None:
    check = machine.put_away(fed)
    assert check.state == "warning" and check.found == "server/ca.key, nodes/ada/ada.key, nodes/bob/bob.key"
    for file in (fed / "server" / "ca.key", fed / "nodes" / "ada" / "ada.key", fed / "nodes" / "bob" / "bob.key"):
        file.unlink()
    assert machine.put_away(fed).state == "ok"


def test_nodes_that_cannot_join_are_found(fed: Path) -> None:
    folder = fed / "server" / "nodes"
    assert machine.registered(folder, 2) == ok("nodes", "ada, bob")
    is_problem(machine.registered(folder, 3), "2 public keys for 3 clients")
    another = ed25519.Ed25519PrivateKey.generate().public_key()  # what ssh-keygen makes unasked, and Flower does not take
    for text in (b"no key", another.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)):
        (folder / "bob.pub").write_bytes(text)
        is_problem(machine.registered(folder, 2), "bob.pub: not a public key of an elliptic curve")


def test_a_node_with_the_wrong_keys_is_found(fed: Path) -> None:
    ada = fed / "nodes" / "ada"
    assert machine.pair(ada, NOW).state == "ok"
    public = (ada / "ada.pub").rename(ada / "ada.key.pub")  # as ssh-keygen calls it; a node needs the private one alone
    assert machine.pair(ada, NOW).state == "ok"
    public.rename(ada / "ada.pub")
    is_problem(machine.pair(ada, NOW + timedelta(days=400)), "expired on")
    is_problem(machine.pair(ada, NOW - timedelta(days=1)), "not valid before")
    shutil.copy(fed / "nodes" / "bob" / "bob.pub", ada / "ada.pub")
    is_problem(machine.pair(ada, NOW), "not the other half")
    (ada / "ca.pem").write_text("no certificate")
    shutil.copy(fed / "server" / "nodes" / "ada.pub", ada / "ada.pub")
    is_problem(machine.pair(ada, NOW), "ca.pem: not a certificate")
    shutil.copy(fed / "nodes" / "bob" / "bob.key", ada / "bob.key")
    is_problem(machine.pair(ada, NOW), "2 private keys")


def test_data_that_will_not_do_are_found(fed: Path) -> None:
    ada = fed / "nodes" / "ada"
    check, size = machine.own_data(ada, 0, ada / "data", RUN)
    assert check.state == "ok" and size > 0
    (ada / "data" / "points.csv").write_text("a,b,label\n1,2\n")
    is_problem(machine.own_data(ada, 0, ada / "data", RUN)[0], "points.csv")
    (ada / "data" / "points.csv").unlink()
    is_problem(machine.own_data(ada, 0, ada / "data", RUN)[0], "points.csv")
    for nowhere in (ada / "nowhere", ada / ("long" * 99)):
        is_problem(machine.own_data(ada, 0, nowhere, RUN)[0], f"{nowhere}: no folder")
    assert machine.own_data(ada, 0, ada / "data", None)[0].state == "warning"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_data_of_somebody_else_are_found(fed: Path) -> None:
    ada = fed / "nodes" / "ada"
    (ada / "data").chmod(0o000)
    try:
        is_problem(machine.own_data(ada, 0, ada / "data", RUN)[0], "cannot be read by this user")
    finally:
        (ada / "data").chmod(0o700)


def test_settings_that_will_not_do_are_found(tmp_path: Path) -> None:
    def check(**how: Any) -> Check:
        return machine.task(Settings(**{"task": "points('points.csv')", "clients": 2, "engine": "flower", **how}), tmp_path)

    assert check(task="digits(hidden=4)").state == "ok"
    is_problem(check(method=("FedAvg", "FedProx")), "one")
    is_problem(check(task="table('nowhere.csv', 'label')"), "nowhere.csv")
    is_problem(check(engine="local"), "engine: local")
    is_problem(check(task="table('points.csv', 'label')"), "points.csv")
    (tmp_path / "points.csv").write_text(CSV)  # where the server runs
    assert "8 test samples here" in check(task="table('points.csv', 'label')").found


def test_a_full_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = shutil.disk_usage(tmp_path).free
    for least, scarce, state in ((left * 2, left * 2, "problem"), (1, left * 2, "warning"), (1, 1, "ok")):
        monkeypatch.setattr(machine, "LEAST_FREE", least)
        monkeypatch.setattr(machine, "SCARCE", scarce)
        assert machine.disk(tmp_path).state == state
