"""Every problem that the doctor knows is caused for real, and found with what to do about it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from command import hanse, refused

pytest.importorskip("cryptography")

from hanse.config import Settings
from hanse.core.errors import ConfigError
from hanse.deploy import doctor, keys, responder
from hanse.deploy.app import FLOWER, NODE_PORT, write
from hanse.deploy.doctor import Check, Server
from hanse.deploy.responder import Responder, installed

NOW = datetime.now(UTC)
TOKEN = "not a secret"
CSV = "a,b,label\n" + "".join(f"{i},{i % 3},{'xy'[i % 2]}\n" for i in range(40))
RUN = Settings(task='table("points.csv", "label")', clients=2, cohort=2, engine="flower")


with_flower = pytest.mark.skipif(not installed()["flwr"], reason="without Flower nothing is well")


def port_for() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def port() -> int:
    return port_for()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, port: int) -> Path:
    """A federation as 'hanse deploy' writes it, with data at its nodes."""
    folder = tmp_path_factory.mktemp("doctor") / "fed"
    write(RUN, folder, ["ada", "bob"], f"127.0.0.1:{port}", now=NOW)
    for name in ("ada", "bob"):
        data = folder / "nodes" / name / "data"
        data.mkdir()
        (data / "points.csv").write_text(CSV)
    return folder


@pytest.fixture
def fed(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "fed"))


@pytest.fixture(autouse=True)
def nobodys_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever reads a node's own data names their folder in the environment."""
    monkeypatch.setenv("HANSE_DATA", str(tmp_path / "nobody's"))


@contextmanager
def answering(own: Path, port: int, handler: type[BaseHTTPRequestHandler] | None = None) -> Iterator[None]:
    """A ``Responder`` with the certificate in a folder."""
    with Responder(own, "127.0.0.1", port, TOKEN, RUN) as server:
        server.RequestHandlerClass = handler or server.RequestHandlerClass
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def at(fed: Path, port: int) -> Server:
    return Server("127.0.0.1", port, fed / "nodes" / "ada" / "ca.pem")


def on_node(fed: Path, token: str | None = None, settings: Settings | None = None) -> dict[str, Check]:
    folder = fed / "nodes" / "ada"
    found = [*doctor.node(folder, doctor.server_for(folder, None), folder / "data", settings, token, datetime.now(UTC))]
    return {check.name: check for check in found}


def is_problem(check: Check, *words: str) -> None:
    assert check.state == "problem" and check.do, check
    assert all(word in check.found for word in words), check


# ---- where all is well


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
        found = on_node(fed, settings=RUN)
    assert found["bandwidth"].state == "warning" and "not measured" in found["bandwidth"].found
    assert found["data"].state == "ok" and "server" not in found


# ---- this machine


def test_versions_that_differ_are_found() -> None:
    here = installed()
    there = {**here, "hanse": "9.9", "torch": "0.1"}
    found = {check.name: check for check in doctor.versions(there)}
    is_problem(found["hanse"], "9.9 on the server")
    assert found["torch"].state == "warning" and found["python"].state == "ok"


def test_a_flower_that_is_missing_or_another_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, state in (("", "problem"), ("1.0.0", "warning"), (FLOWER, "ok")):
        monkeypatch.setattr(doctor, "installed", lambda version=version: {"flwr": version})
        assert [check.state for check in doctor.versions({})] == [state]


def test_keys_that_others_may_read_are_found(fed: Path) -> None:
    key = fed / "server" / "server.key"
    assert [check.state for check in doctor.private_files([key])] == ["ok"]
    key.chmod(0o640)
    (check,) = doctor.private_files([key, fed / "server" / "ca.key"])
    is_problem(check, "mode 640")
    assert check.do.startswith(f"chmod 600 {key}")


def test_certificates_that_end_are_found(tmp_path: Path) -> None:
    keys.authority(tmp_path, 100, NOW - timedelta(days=90))
    keys.server(tmp_path, ["fed.example.org"], 50, NOW - timedelta(days=90))
    is_problem(doctor.certificate(tmp_path, "fed.example.org", NOW), "expired on")
    is_problem(doctor.certificate(tmp_path, "fed.example.org", NOW - timedelta(days=91)), "not valid before")
    soon = doctor.certificate(tmp_path, "fed.example.org", NOW - timedelta(days=50))
    assert soon.state == "warning" and "ends on" in soon.found
    assert doctor.certificate(tmp_path, "fed.example.org", NOW - timedelta(days=80)).state == "ok"
    is_problem(doctor.certificate(tmp_path, "other.example.org", NOW - timedelta(days=80)), "not for 'other.example.org'")


@pytest.mark.parametrize(("address", "host"), [("fed.example.org:8100", "fed.example.org"), ("[2001:db8::1]:8100", "2001:db8::1")])
def test_nodes_and_server_look_for_the_same_place(address: str, host: str, tmp_path: Path) -> None:
    write(RUN, tmp_path / "fed", ["ada", "bob"], address, now=NOW)
    ada = tmp_path / "fed" / "nodes" / "ada"
    assert doctor.server_of(tmp_path / "fed" / "server")[:2] == (host, 8100)
    assert doctor.server_for(ada, None) == Server(host, 8100, ada / "ca.pem")
    assert responder.listens(host) in ("0.0.0.0", "::")
    names = [check.name for check in doctor.server(tmp_path / "fed", NOW)]
    assert [name for name in names if name.startswith("port")] == ["port 8100", "port 8101"]


def test_a_key_of_another_certificate_is_found(fed: Path, tmp_path: Path) -> None:
    keys.authority(tmp_path / "other", 10, NOW)
    keys.server(tmp_path / "other", ["127.0.0.1"], 10, NOW)
    shutil.copy(tmp_path / "other" / "server.key", fed / "server" / "server.key")
    is_problem(doctor.certificate(fed / "server", "127.0.0.1", NOW), "not the key of")


def test_private_keys_that_lie_about_are_warned_of(fed: Path) -> None:
    check = doctor.put_away(fed)
    assert check.state == "warning" and check.found == "server/ca.key, nodes/ada/ada.key, nodes/bob/bob.key"
    for file in (fed / "server" / "ca.key", fed / "nodes" / "ada" / "ada.key", fed / "nodes" / "bob" / "bob.key"):
        file.unlink()
    assert doctor.put_away(fed).state == "ok"


def test_nodes_that_cannot_join_are_found(fed: Path) -> None:
    folder = fed / "server" / "nodes"
    assert doctor.registered(folder, 2) == doctor.ok("nodes", "ada, bob")
    is_problem(doctor.registered(folder, 3), "2 public keys for 3 clients")
    (folder / "bob.pub").write_text("no key")
    is_problem(doctor.registered(folder, 2), "bob.pub: not a public key")


def test_a_node_with_the_wrong_keys_is_found(fed: Path) -> None:
    ada = fed / "nodes" / "ada"
    assert doctor.pair(ada, NOW).state == "ok"
    is_problem(doctor.pair(ada, NOW + timedelta(days=400)), "expired on")
    is_problem(doctor.pair(ada, NOW - timedelta(days=1)), "not valid before")
    shutil.copy(fed / "nodes" / "bob" / "bob.pub", ada / "ada.pub")
    is_problem(doctor.pair(ada, NOW), "not the other half")
    (ada / "ca.pem").write_text("no certificate")
    shutil.copy(fed / "server" / "nodes" / "ada.pub", ada / "ada.pub")
    is_problem(doctor.pair(ada, NOW), "ca.pem: not a certificate")
    shutil.copy(fed / "nodes" / "bob" / "bob.key", ada / "bob.key")
    is_problem(doctor.pair(ada, NOW), "2 private keys")


def test_data_that_will_not_do_are_found(fed: Path) -> None:
    ada = fed / "nodes" / "ada"
    check, size = doctor.own_data(ada, ada / "data", RUN)
    assert check.state == "ok" and size > 0
    (ada / "data" / "points.csv").write_text("a,b,label\n1,2\n")
    is_problem(doctor.own_data(ada, ada / "data", RUN)[0], "points.csv")
    (ada / "data" / "points.csv").unlink()
    is_problem(doctor.own_data(ada, ada / "data", RUN)[0], "points.csv")
    is_problem(doctor.own_data(ada, ada / "nowhere", RUN)[0], "nowhere: no folder")
    assert doctor.own_data(ada, ada / "data", None)[0].state == "warning"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_data_of_somebody_else_are_found(fed: Path) -> None:
    ada = fed / "nodes" / "ada"
    (ada / "data").chmod(0o000)
    try:
        is_problem(doctor.own_data(ada, ada / "data", RUN)[0], "cannot be read by this user")
    finally:
        (ada / "data").chmod(0o700)


def test_settings_that_will_not_do_are_found(tmp_path: Path) -> None:
    def check(**how: Any) -> Check:
        return doctor.task(Settings(**{"task": "points('points.csv')", "clients": 2, "engine": "flower", **how}), tmp_path)

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
        monkeypatch.setattr(doctor, "LEAST_FREE", least)
        monkeypatch.setattr(doctor, "SCARCE", scarce)
        assert doctor.disk(tmp_path).state == state


# ---- the way between


def test_a_name_without_an_address_is_found() -> None:
    is_problem(doctor.resolves("fed.invalid"), "fed.invalid: ")
    assert doctor.resolves("127.0.0.1").found == "127.0.0.1 is 127.0.0.1"


def test_a_closed_port_is_found_and_nothing_more_is_asked(fed: Path, port: int) -> None:
    found = on_node(fed, TOKEN)
    is_problem(found["port"], f"nothing listens at 127.0.0.1:{port}")
    assert not {"TLS", "clock", "server", "bandwidth"} & found.keys()


def test_a_port_that_nobody_accepts_on_is_found(fed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PATIENCE", 0.2)
    with socket.socket() as silent:  # connections beyond its queue get no answer, as behind a firewall that drops them
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        where = at(fed, silent.getsockname()[1])
        waiting = [socket.socket() for _ in range(3)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex((where.host, where.port))
        is_problem(doctor.reaches(where), "does not answer within 0.2 s")
        for each in waiting:
            each.close()


def certified(folder: Path, names: list[str], began: datetime = NOW, days: float = 10) -> Path:
    keys.authority(folder, 1000, began)
    keys.server(folder, names, days, began)
    return folder


@pytest.mark.parametrize(
    ("names", "began", "found", "do"),
    [
        (["127.0.0.1"], NOW - timedelta(days=20), "expired", "set the clock"),
        (["127.0.0.1"], NOW + timedelta(days=20), "not yet valid", "clocks"),
        (["fed.example.org"], NOW, "IP address mismatch", "address in its certificate"),
    ],
)
def test_a_certificate_that_will_not_do_is_found(
    names: list[str], began: datetime, found: str, do: str, tmp_path: Path, port: int
) -> None:
    own = certified(tmp_path, names, began)
    with answering(own, port):
        check = doctor.handshake(Server("127.0.0.1", port, own / "ca.pem"))
    is_problem(check, found)
    assert do in check.do


def test_a_server_by_another_name_is_found(tmp_path: Path, port: int) -> None:
    own = certified(tmp_path, ["fed.example.org"])
    with answering(own, port):
        is_problem(doctor.handshake(Server("localhost", port, own / "ca.pem")), "Hostname mismatch")


def test_another_authority_is_found(fed: Path, tmp_path: Path, port: int) -> None:
    with answering(certified(tmp_path / "other", ["127.0.0.1"]), port):
        check = doctor.handshake(at(fed, port))
        is_problem(check, "127.0.0.1: ")
        assert "another authority" in check.do
        assert "clock" not in on_node(fed, TOKEN)  # nothing is told to a server that is not ours


def test_something_that_speaks_no_tls_is_found(fed: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as plain:
        where = at(fed, plain.getsockname()[1])

        def greet() -> None:
            for _ in range(3):
                other, _ = plain.accept()
                other.sendall(b"220 mail.example.org\r\n")
                other.close()

        thread = threading.Thread(target=greet)
        thread.start()
        is_problem(doctor.handshake(where), "but not so")
        is_problem(doctor.free(where), "something else listens")
        thread.join()


def test_a_port_of_this_machine_is_free_taken_or_ours(fed: Path, port: int) -> None:
    where = Server("127.0.0.1", port, fed / "server" / "ca.pem")
    assert doctor.free(where).found == "free"
    with answering(fed / "server", port):
        assert "the server answers there already" in doctor.free(where).found
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        is_problem(doctor.open_to_us("127.0.0.1", bound.getsockname()[1]), "Address already in use")


@pytest.mark.parametrize(("off", "state"), [(-600, "problem"), (-60, "ok"), (-200, "warning"), (4, "warning"), (30, "problem")])
def test_clocks_that_differ_are_found(off: float, state: str, fed: Path, port: int) -> None:
    """``off``: seconds that this machine is ahead of the server."""

    class Wrong(responder.Answers):
        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate(time.time() - off, usegmt=True)

    with answering(fed / "server", port, Wrong):
        check = doctor.clock(at(fed, port))
    assert check.state == state, check
    if state == "problem":
        assert "Flower lets a node be 5 s ahead and 305 s behind" in check.found


def test_a_server_without_a_clock_is_warned_of(fed: Path, port: int) -> None:
    class Timeless(responder.Answers):
        def send_header(self, keyword: str, value: str) -> None:
            if keyword != "Date":
                super().send_header(keyword, value)

    with answering(fed / "server", port, Timeless):
        assert doctor.clock(at(fed, port)).state == "warning"


def test_who_does_not_know_the_token_learns_nothing(fed: Path, port: int) -> None:
    with answering(fed / "server", port):
        found = on_node(fed, "a guess")
        is_problem(found["server"], "does not know this token")
        assert "bandwidth" not in found and found["data"].state == "warning"
        is_problem(doctor.bandwidth(at(fed, port), "a guess", 1), "")


def test_a_link_that_is_too_slow_for_the_model_is_warned_of(fed: Path, port: int) -> None:
    with answering(fed / "server", port):
        assert doctor.bandwidth(at(fed, port), TOKEN, 1).state == "ok"
        assert doctor.bandwidth(at(fed, port), TOKEN, 1 << 60).state == "warning"


def test_a_connection_that_breaks_under_load_is_found(fed: Path, port: int) -> None:
    class Breaks(responder.Answers):
        def do_POST(self) -> None:  # noqa: N802
            self.rfile.read(1 << 16)
            self.connection.close()

    with answering(fed / "server", port, Breaks):
        is_problem(doctor.bandwidth(at(fed, port), TOKEN, 1), "broke")


def test_it_takes_no_more_than_it_says(fed: Path, port: int) -> None:
    with answering(fed / "server", port), doctor._line(at(fed, port)) as line:
        line.request("POST", "/up", headers={"Authorization": f"Bearer {TOKEN}", "Content-Length": str(1 << 40)})
        assert line.getresponse().status == 413


def test_who_says_nothing_holds_up_nobody(fed: Path, port: int) -> None:
    with answering(fed / "server", port), socket.create_connection(("127.0.0.1", port)):
        assert doctor.handshake(at(fed, port)).state == "ok"


# ---- the command


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
    while doctor.handshake(at(fed, port)).state != "ok":
        assert time.monotonic() < end
    about = doctor.asked(at(fed, port), token)
    assert isinstance(about, dict) and about["versions"] == installed() and about["settings"] == RUN.toml()
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
        (spoiled(lambda fed: (fed / "server" / "start.sh").write_text("")), "start.sh: not as 'hanse deploy' writes it"),
    ],
)
def test_the_wrong_folder_is_one_line(
    spoil: Callable[[Path], Path], words: str, fed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(hanse(capsys, "doctor", spoil(fed)), 2, words)


@pytest.mark.parametrize("address", ["", "host", "host:port", "host:99999", "[::1"])
def test_what_is_no_address_is_one_line(address: str, fed: Path) -> None:
    with pytest.raises(ConfigError, match="server: "):
        doctor.server_for(fed / "nodes" / "ada", address)


def test_what_cannot_be_listened_on_is_one_line(fed: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match=r"listen: .* Address already in use"):
        Responder(fed / "server", "127.0.0.1", taken.getsockname()[1], TOKEN, RUN)
