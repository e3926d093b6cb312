"""Every problem on the way between node and server is caused for real, and found with what to do about it."""

from __future__ import annotations

import socket
import threading
import time
from datetime import datetime, timedelta
from email.utils import formatdate
from pathlib import Path

import pytest
from healthy import NOW, TOKEN, answering, at, is_problem, on_node

pytest.importorskip("cryptography")

from hanse.deploy import keys, responder, way
from hanse.deploy.way import Server


def test_a_name_without_an_address_is_found() -> None:
    is_problem(way.resolves("fed.invalid"), "fed.invalid: ")
    assert way.resolves("127.0.0.1").found == "127.0.0.1 is 127.0.0.1"


def test_a_port_that_nobody_accepts_on_is_found(fed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(way, "PATIENCE", 0.2)
    with socket.socket() as silent:  # connections beyond its queue get no answer, as behind a firewall that drops them
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        where = at(fed, silent.getsockname()[1])
        waiting = [socket.socket() for _ in range(3)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex((where.host, where.port))
        is_problem(way.reaches(where), "does not answer within 0.2 s")
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
        check = way.handshake(Server("127.0.0.1", port, own / "ca.pem"))
    is_problem(check, found)
    assert do in check.do


def test_a_server_by_another_name_is_found(tmp_path: Path, port: int) -> None:
    own = certified(tmp_path, ["fed.example.org"])
    with answering(own, port):
        is_problem(way.handshake(Server("localhost", port, own / "ca.pem")), "Hostname mismatch")


def test_another_authority_is_found(fed: Path, tmp_path: Path, port: int) -> None:
    with answering(certified(tmp_path / "other", ["127.0.0.1"]), port):
        check = way.handshake(at(fed, port))
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
        is_problem(way.handshake(where), "but not so")
        is_problem(way.free(where), "something else listens")
        thread.join()


def test_a_port_of_this_machine_is_free_taken_or_ours(fed: Path, port: int) -> None:
    where = Server("127.0.0.1", port, fed / "server" / "ca.pem")
    assert way.free(where).found == "free"
    with answering(fed / "server", port):
        assert "the server answers there already" in way.free(where).found
    with socket.create_server(("", port)):
        assert "PORT=" not in way.free(where).do  # nodes would not follow it
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        is_problem(way.open_to_us("127.0.0.1", bound.getsockname()[1], "stop it"), "Address already in use")


@pytest.mark.parametrize(("off", "state"), [(-600, "problem"), (-60, "ok"), (-200, "warning"), (4, "warning"), (30, "problem")])
def test_clocks_that_differ_are_found(off: float, state: str, fed: Path, port: int) -> None:
    """``off``: seconds that this machine is ahead of the server."""

    class Wrong(responder.Answers):
        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate(time.time() - off, usegmt=True)

    with answering(fed / "server", port, Wrong):
        check = way.clock(at(fed, port))
    assert check.state == state, check
    if state == "problem":
        assert "Flower lets a node be 5 s ahead and 305 s behind" in check.found


@pytest.mark.parametrize("date", [None, "yesterday"])
def test_a_server_without_a_clock_is_warned_of(date: str | None, fed: Path, port: int) -> None:
    class Timeless(responder.Answers):
        def send_header(self, keyword: str, value: str) -> None:
            if keyword != "Date":
                super().send_header(keyword, value)
            elif date:
                super().send_header(keyword, date)

    with answering(fed / "server", port, Timeless):
        assert way.clock(at(fed, port)).state == "warning"


def test_a_link_that_is_too_slow_for_the_model_is_warned_of(fed: Path, port: int) -> None:
    with answering(fed / "server", port):
        assert way.bandwidth(at(fed, port), TOKEN, 1).state == "ok"
        assert way.bandwidth(at(fed, port), TOKEN, 1 << 60).state == "warning"


def test_a_connection_that_breaks_under_load_is_found(fed: Path, port: int) -> None:
    class Breaks(responder.Answers):
        def do_POST(self) -> None:  # noqa: N802
            self.rfile.read(1 << 16)
            self.connection.close()

    with answering(fed / "server", port, Breaks):
        is_problem(way.bandwidth(at(fed, port), TOKEN, 1), "broke")
