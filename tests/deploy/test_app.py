"""What ``write`` puts where: Flower takes the app, keys stay out of what is sent, scripts are sound."""

from __future__ import annotations

import io
import re
import stat
import subprocess
import tomllib
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.config import Settings
from hanse.core.errors import ConfigError

pytest.importorskip("cryptography")
from hanse.deploy import app, keys

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
SETTINGS = Settings(clients=2, method=("FedAvg(lr=0.1)",), partition="dirichlet(0.3)")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    app.write(SETTINGS, tmp_path / "hospitals", ["ada", "bob"], "training.example.org:8443", days=30, now=NOW)
    return tmp_path / "hospitals"


def test_each_party_gets_what_is_its_own(folder: Path) -> None:
    found = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    node = ["ca.pem", "start.sh"]
    assert found == sorted(
        ["README.md", "app/pyproject.toml"]
        + [f"nodes/{name}/{file}" for name in ("ada", "bob") for file in [*node, f"{name}.key", f"{name}.pub"]]
        + [
            f"server/{file}"
            for file in ("ca.key", "ca.pem", "flwr.sh", "nginx.conf", "register.sh", "server.key", "server.pem", "start.sh")
        ]
        + ["server/nodes/ada.pub", "server/nodes/bob.pub"]
    )
    private = {file.name for file in folder.rglob("*") if file.is_file() and "PRIVATE KEY" in file.read_text()}
    assert private == {"ca.key", "server.key", "ada.key", "bob.key"}
    for name in private:
        assert [stat.S_IMODE(file.stat().st_mode) for file in folder.rglob(name)] == [0o600]


def test_certificates_are_for_the_address_and_this_machine(folder: Path) -> None:
    names = ["training.example.org", "localhost", "127.0.0.1", "::1"]
    assert keys.check_server(folder / "server", names, NOW).date().isoformat() == "2026-12-21"
    for name in ("ada", "bob"):
        keys.check_node(folder / "nodes" / name, name)
        assert (folder / "nodes" / name / f"{name}.pub").read_bytes() == (folder / "server" / "nodes" / f"{name}.pub").read_bytes()
    assert "until 2026-12-21" in (folder / "README.md").read_text()


def test_flower_sends_settings_and_nothing_else(folder: Path) -> None:
    """Flower itself bundles the app, with keys of all kinds laid beside it."""
    build = pytest.importorskip("flwr.cli.build")
    from flwr.common.config import get_fab_config, get_fused_config_from_dir

    bundle = build.build_fab_from_disk(folder / "app")
    with zipfile.ZipFile(io.BytesIO(bundle)) as files:
        assert sorted(files.namelist()) == [".info/CONTENT", "pyproject.toml"]
        assert not re.search(rb"PRIVATE|ecdsa|CERTIFICATE", b"".join(files.read(name) for name in files.namelist()))
    components = get_fab_config(bundle)["tool"]["flwr"]["app"]["components"]
    assert components == {"serverapp": "hanse.deploy.server:app", "clientapp": "hanse.deploy.client:app"}
    seen = get_fused_config_from_dir(folder / "app", {"folder": "elsewhere"})
    assert seen == {"folder": "elsewhere", "names": "ada bob", "settings": SETTINGS.toml()}


@given(text=st.text(), data=st.sampled_from(["", "'''", "''' + \"\"\"", "\\", "a'"]))
def test_settings_come_through_as_they_were(text: str, data: str) -> None:
    settings = Settings(clients=2, task=text.replace("\ud800", "") + data)
    pyproject = app.PYPROJECT.format(name="x", names="ada bob", settings=app._literal(settings.toml()))
    assert tomllib.loads(tomllib.loads(pyproject)["tool"]["flwr"]["app"]["config"]["settings"])["task"] == settings.task


def test_scripts_are_sound(folder: Path) -> None:
    scripts = sorted(folder.rglob("*.sh"))
    assert len(scripts) == 5
    for script in scripts:
        subprocess.run(["sh", "-n", str(script)], check=True)
        text = script.read_text()
        assert not re.search(r"(?<!\$)\{", text)  # everything is filled in
        if re.search("^ *(exec )?fl", text, re.M):
            assert "FLWR_TELEMETRY_ENABLED=0" in text and "FLWR_DISABLE_UPDATE_CHECK=1" in text
    start = (folder / "server" / "start.sh").read_text()
    for option in (
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        "--database state.db",
        '--host "${HOST:-127.0.0.1}" --port "${PORT:-8444}"',
    ):
        assert option in start
    assert "--insecure" not in "".join(script.read_text() for script in scripts)


def test_only_what_nodes_ask_for_is_let_in(folder: Path, tmp_path: Path) -> None:
    gate = (folder / "server" / "nginx.conf").read_text()
    assert "listen 8443 ssl;" in gate and "proxy_pass https://127.0.0.1:8444;" in gate
    assert re.findall(r"location (\S+)", gate) == ["/v1/fleet/", "/"] and "return 403;" in gate
    assert gate.count("{") == gate.count("}")
    app.write(SETTINGS, tmp_path / "here", ["ada", "bob"], "localhost:9000", now=NOW)
    assert not (tmp_path / "here" / "server" / "nginx.conf").exists()
    assert "nginx" not in (tmp_path / "here" / "README.md").read_text()
    assert "${PORT:-9000}" in (tmp_path / "here" / "server" / "start.sh").read_text()


def test_nodes_of_one_machine_do_not_collide(folder: Path) -> None:
    ports = [re.search(r"PORT:-(\d+)", (folder / "nodes" / name / "start.sh").read_text()) for name in ("ada", "bob")]
    assert [port and port[1] for port in ports] == ["9094", "9095"]


@pytest.mark.parametrize(
    "address, host, where",
    [
        ("example.org", "example.org", "example.org:8000"),
        ("10.0.0.7:9000", "10.0.0.7", "10.0.0.7:9000"),
        ("[2001:db8::1]:8001", "2001:db8::1", "[2001:db8::1]:8001"),
    ],
)
def test_addresses(tmp_path: Path, address: str, host: str, where: str) -> None:
    app.write(SETTINGS, tmp_path / "x", ["ada", "bob"], address, now=NOW)
    keys.check_server(tmp_path / "x" / "server", [host], NOW)
    assert f"--superlink {where} " in (tmp_path / "x" / "nodes" / "ada" / "start.sh").read_text()


@pytest.mark.parametrize(
    "address", ["", "host:0", "host:70000", "host:port", "a b", "https://host:8000", "2001:db8::1", "$(rm -r /)", "a;b"]
)
def test_addresses_that_are_none(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match=r"address: .* is not allowed: host:port"):
        app.write(SETTINGS, tmp_path / "x", ["ada", "bob"], address, now=NOW)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "names, message",
    [
        (["ada"], "clients: 2 is not allowed: 1 nodes are named"),
        (["ada", "Ada"], "names: ada, Ada is not allowed: each name once"),
        ([], "names: none is not allowed: at least one"),
        (["ada", "../bob"], "names: '../bob' is not allowed"),
        (["ada", "b ob"], "names: 'b ob' is not allowed"),
        (["ada", "-rf"], "names: '-rf' is not allowed"),
        (["ada", "bob\n"], "names: 'bob.n' is not allowed"),
        (["ada", "b" * 33], "at most 32"),
    ],
)
def test_names_that_are_none(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        app.write(SETTINGS, tmp_path / "x", names, "example.org", now=NOW)
    assert not (tmp_path / "x").exists()


def test_a_folder_in_use_is_left_alone(folder: Path) -> None:
    before = (folder / "server" / "ca.key").read_bytes()
    with pytest.raises(ConfigError, match="hospitals: not empty"):
        app.write(SETTINGS, folder, ["ada", "bob"], "example.org", now=NOW)
    assert (folder / "server" / "ca.key").read_bytes() == before
