"""All checks together, on a node and on the server, and the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import hanse, refused
from healthy import NOW, RUN, TOKEN, answering, at, is_problem, on_node

pytest.importorskip("cryptography")

from hanse.core.errors import ConfigError
from hanse.deploy import doctor, responder, way
from hanse.deploy.app import NODE_PORT, write
from hanse.deploy.responder import installed
from hanse.deploy.way import Server

with_flower = pytest.mark.skipif(not installed()["flwr"], reason="without Flower nothing is well")


@with_flower
def test_a_healthy_node_and_its_server(fed: Path, port: int) -> None:
    with answering(fed / "server", port):
        found = on_node(fed, TOKEN)
    assert {check.state for check in found.values()} <= {"ok", "warning"}
    warned = {name for name, check in found.items() if check.state == "warning"}
    assert warned <= {"disk", "flwr", f"port {NODE_PORT}"}  # another federation may be at work on this machine
    assert found["data"].found == '32 samples, 2 of 2 classes, for table("points.csv", "label")'
    assert found["hanse"].found.endswith("as on the server")
    assert "Mbit/s down" in found["bandwidth"].found and "a model takes" in found["bandwidth"].found
    assert found["clock"].found == "as the server's"


def test_without_a_token_what_takes_both_ends_is_not_claimed(fed: Path, port: int) -> None:
    with answering(fed / "server", port):
        assert on_node(fed, "", RUN)["bandwidth"].state == "warning"
        found = on_node(fed, settings=RUN)
    assert found["bandwidth"].state == "warning" and "not measured" in found["bandwidth"].found
    assert found["data"].state == "ok" and "server" not in found


@pytest.mark.parametrize(("address", "host"), [("fed.example.org:8100", "fed.example.org"), ("[2001:db8::1]:8100", "2001:db8::1")])
def test_nodes_and_server_look_for_the_same_place(address: str, host: str, tmp_path: Path) -> None:
    write(RUN, tmp_path / "fed", ["ada", "bob"], address, now=NOW)
    ada = tmp_path / "fed" / "nodes" / "ada"
    assert doctor.server_of(tmp_path / "fed" / "server")[:2] == (host, 8100)
    assert doctor.server_for(ada, None) == Server(host, 8100, ada / "ca.pem")
    assert responder.listens(host) in ("0.0.0.0", "::")
    names = [check.name for check in doctor.server(tmp_path / "fed", NOW)]
    assert [name for name in names if name.startswith("port")] == ["port 8100", "port 8101"]


def test_a_closed_port_is_found_and_nothing_more_is_asked(fed: Path, port: int) -> None:
    found = on_node(fed, TOKEN)
    is_problem(found["port"], f"nothing listens at 127.0.0.1:{port}")
    assert not {"TLS", "clock", "server", "bandwidth"} & found.keys()


def test_who_does_not_know_the_token_learns_nothing(fed: Path, port: int) -> None:
    with answering(fed / "server", port):
        found = on_node(fed, "a guess")
        is_problem(found["server"], "does not know this token")
        assert "bandwidth" not in found and found["data"].state == "warning"
        is_problem(way.bandwidth(at(fed, port), "a guess", 1), "")


def test_a_server_of_another_version_is_found(fed: Path, port: int) -> None:
    class Newer(responder.Answers):
        def _send(self, data: bytes) -> None:
            super()._send(data.replace(b"clients =", b"members ="))

    with answering(fed / "server", port, Newer):
        found = on_node(fed, TOKEN)
    is_problem(found["settings"], "unknown name 'members'")
    assert found["data"].state == "warning" and "bandwidth" in found


@with_flower
def test_the_command_on_a_node(fed: Path, port: int, capsys: pytest.CaptureFixture[str]) -> None:
    ada = fed / "nodes" / "ada"
    outcome = hanse(capsys, "doctor", ada)
    assert outcome.status == 1 and f"problem  port         nothing listens at 127.0.0.1:{port}\n" in outcome.out
    with answering(fed / "server", port):
        told = hanse(capsys, "doctor", ada, "--data", ada / "data", "--settings", fed / "app" / "pyproject.toml", "--json")
        assert hanse(capsys, "doctor", ada, "--server", f"127.0.0.1:{port}", "--token", TOKEN).status == 0
    found = {check["name"]: check for check in json.loads(told.out)}
    assert told.status == 0 and found["data"]["state"] == "ok" and found["TLS"]["found"].startswith("TLSv1.3")


@with_flower
def test_the_command_on_the_server(fed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANSE_DATA", str(fed / "nodes" / "ada" / "data"))
    outcome = hanse(capsys, "doctor", fed)
    assert outcome.status == 0, outcome.out
    assert "FedAvg on table" in outcome.out and "nodes        ada, bob" in outcome.out
    (fed / "server" / "server.key").chmod(0o644)
    (fed / "app" / "pyproject.toml").write_text("[tool]")
    outcome = hanse(capsys, "doctor", fed)
    assert outcome.status == 1
    assert "problem  key files" in outcome.out and "problem  settings" in outcome.out and "not an app of hanse" in outcome.out


def test_the_server_answers_until_it_is_interrupted(fed: Path, port: int) -> None:
    command = [sys.executable, "-c", "from hanse.cli import main; main()", "doctor", str(fed), "--listen"]
    environment = {**os.environ, "HANSE_DATA": str(fed / "nodes" / "ada" / "data"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    said = process.stderr.readline()
    assert said.startswith("on each node: hanse doctor ") and f"answering at 127.0.0.1:{port}" in process.stderr.readline()
    token = said.split()[-1]
    end = time.monotonic() + 20
    while way.handshake(at(fed, port)).state != "ok":
        assert time.monotonic() < end
    about = way.asked(at(fed, port), token)
    assert about["versions"] == installed() and about["settings"] == RUN.toml()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0
    assert process.stderr.read() == "stopped answering\n"


def spoiled(change: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def spoil(fed: Path) -> Path:
        change(fed)
        return fed

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda fed: fed / "nowhere", "neither what 'hanse deploy' wrote"),
        (lambda fed: fed / "app", "neither what 'hanse deploy' wrote"),
        (spoiled(lambda fed: (fed / "server" / "server.pem").unlink()), "server.pem: cannot be read"),
        (spoiled(lambda fed: (fed / "server" / "start.sh").write_text("${PORT:-70000}")), "start.sh: port 70000 is not allowed"),
        (spoiled(lambda fed: (fed / "server" / "start.sh").write_text("")), "start.sh: not as 'hanse deploy' writes it"),
    ],
)
def test_the_wrong_folder_is_one_line(
    spoil: Callable[[Path], Path], words: str, fed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(hanse(capsys, "doctor", spoil(fed)), 2, words)


@pytest.mark.parametrize("address", ["", "host", "host:port", "host:99999", "[::1", f"{'h' * 64}:80", "a..b:80"])
def test_what_is_no_address_is_one_line(address: str, fed: Path) -> None:
    with pytest.raises(ConfigError, match="server: "):
        doctor.server_for(fed / "nodes" / "ada", address)
