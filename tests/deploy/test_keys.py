"""Certificates are such that TLS takes them, and whatever is wrong with them is said in one line."""

from __future__ import annotations

import socket
import ssl
import stat
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.core.errors import ConfigError

pytest.importorskip("cryptography")
from hanse.deploy import keys

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
NAMES = ["training.example.org", "127.0.0.1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    keys.authority(tmp_path, days=100, now=NOW)
    keys.server(tmp_path, NAMES, days=10, now=NOW)
    keys.node(tmp_path, "ada")
    return tmp_path


def greeted(server: Path, authority: Path, name: str) -> None:
    """Greet a server that has the certificate of ``server`` as a client that trusts ``authority`` and wants ``name``."""
    there, here = socket.socketpair()
    side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    side.load_cert_chain(server / "server.pem", server / "server.key")

    def serve() -> None:
        try:
            side.wrap_socket(there, server_side=True).close()
        except (ssl.SSLError, OSError):
            there.close()

    thread = threading.Thread(target=serve)
    thread.start()
    client = ssl.create_default_context(cafile=authority / "ca.pem")
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # as newer versions of Python do
    try:
        client.wrap_socket(here, server_hostname=name).close()
    finally:
        here.close()
        thread.join()


def test_tls_takes_them_for_their_names_alone(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    for name in ("ours", "theirs"):
        keys.authority(tmp_path / name, 1, now)
        keys.server(tmp_path / name, NAMES, 1, now)
    for name in NAMES:
        greeted(tmp_path / "ours", tmp_path / "ours", name)
    for server, authority, name in (
        ("ours", "ours", "other.example.org"),
        ("ours", "ours", "127.0.0.2"),
        ("theirs", "ours", NAMES[0]),
    ):
        with pytest.raises(ssl.SSLCertVerificationError):
            greeted(tmp_path / server, tmp_path / authority, name)


def test_good_ones_pass_and_say_when_they_end(folder: Path) -> None:
    assert keys.check_server(folder, NAMES, NOW) == NOW + timedelta(days=10)
    keys.check_node(folder, "ada")


def test_private_files_are_for_their_owner_alone(folder: Path) -> None:
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    assert {name for name, mode in modes.items() if mode == 0o600} == {"ca.key", "server.key", "ada.key"}
    (folder / "ada.key").chmod(0o640)
    with pytest.raises(ConfigError, match=r"ada\.key: mode 640 is not allowed"):
        keys.check_node(folder, "ada")


@pytest.mark.parametrize(
    "days, message", [(-1, "not valid before 2026-11-21 11:55 UTC"), (11, "server.pem: expired on 2026-12-01")]
)
def test_certificates_out_of_their_time(folder: Path, days: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        keys.check_server(folder, NAMES, NOW + timedelta(days=days))


def test_an_expired_authority_signs_nothing(folder: Path) -> None:
    (folder / "server.pem").unlink()
    (folder / "server.key").unlink()
    with pytest.raises(ConfigError, match=r"ca\.pem: expired on 2027-03-01"):
        keys.server(folder, NAMES, 10, NOW + timedelta(days=101))


def test_no_certificate_outlives_its_authority(tmp_path: Path) -> None:
    keys.authority(tmp_path, days=3, now=NOW)
    keys.server(tmp_path, NAMES, days=10, now=NOW)
    assert keys.check_server(tmp_path, NAMES, NOW) == NOW + timedelta(days=3)


def test_a_wrong_name_is_told_with_the_right_ones(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"not for 'localhost'; it is for: training\.example\.org, 127\.0\.0\.1"):
        keys.check_server(folder, ["127.0.0.1", "localhost"], NOW)


def test_files_that_do_not_belong_together(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    keys.authority(other, 100, NOW)
    keys.server(other, NAMES, 10, NOW)
    keys.node(other, "ada")
    for name, message in (
        ("ca.pem", r"server\.pem: not signed by .*ca\.pem"),
        ("server.key", r"server\.key: not the key of .*server\.pem"),
        ("ada.key", r"ada\.pub: not the other half of .*ada\.key"),
    ):
        own = (folder / name).read_bytes()
        (folder / name).write_bytes((other / name).read_bytes())
        with pytest.raises(ConfigError, match=message):
            keys.check_server(folder, NAMES, NOW)
            keys.check_node(folder, "ada")
        (folder / name).write_bytes(own)
    (folder / "ca.key").write_bytes((other / "ca.key").read_bytes())
    with pytest.raises(ConfigError, match=r"ca\.key: not the key of .*ca\.pem"):
        keys.server(folder, NAMES, 1, NOW)


def test_nothing_is_written_over(folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for again in (
        lambda: keys.authority(folder, 1, NOW),
        lambda: keys.server(folder, NAMES, 1, NOW),
        lambda: keys.node(folder, "ada"),
    ):
        with pytest.raises(ConfigError, match="there already"):
            again()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("names", [[], ["a b\u00fc"]])
def test_names_that_no_certificate_has(tmp_path: Path, names: list[str]) -> None:
    keys.authority(tmp_path, 1, NOW)
    with pytest.raises(ConfigError, match="names: "):
        keys.server(tmp_path, names, 1, NOW)


def test_days_must_be_some(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="days: 0 is not allowed"):
        keys.authority(tmp_path, 0, NOW)


def test_a_pair_of_ssh_keygen_is_taken(tmp_path: Path) -> None:
    """A node may make its own."""
    try:
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", "", "-f", str(tmp_path / "bob.key")], check=True
        )
    except FileNotFoundError:
        pytest.skip("no ssh-keygen here")
    (tmp_path / "bob.key.pub").rename(tmp_path / "bob.pub")
    keys.check_node(tmp_path, "bob")


@given(raw=st.binary(max_size=200), name=st.sampled_from(["ca.pem", "server.pem", "server.key", "ada.key", "ada.pub"]))
def test_no_file_is_trusted(tmp_path_factory: pytest.TempPathFactory, raw: bytes, name: str) -> None:
    folder = tmp_path_factory.mktemp("broken")
    keys.authority(folder, 100, NOW)
    keys.server(folder, NAMES, 10, NOW)
    keys.node(folder, "ada")
    (folder / name).write_bytes(raw)
    with pytest.raises(ConfigError, match=name):
        keys.check_server(folder, NAMES, NOW)
        keys.check_node(folder, "ada")


@given(cut=st.floats(0, 0.95), name=st.sampled_from(["ca.pem", "server.pem", "server.key", "ada.key", "ada.pub"]))
def test_files_that_were_cut_off(tmp_path_factory: pytest.TempPathFactory, cut: float, name: str) -> None:
    folder = tmp_path_factory.mktemp("cut")
    keys.authority(folder, 100, NOW)
    keys.server(folder, NAMES, 10, NOW)
    keys.node(folder, "ada")
    raw = (folder / name).read_bytes()
    (folder / name).write_bytes(raw[: int(cut * (len(raw) - 12))])
    with pytest.raises(ConfigError, match=name):
        keys.check_server(folder, NAMES, NOW)
        keys.check_node(folder, "ada")


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "server.pem").unlink()
    with pytest.raises(ConfigError, match=r"server\.pem: cannot be read: No such file or directory"):
        keys.check_server(folder, NAMES, NOW)
