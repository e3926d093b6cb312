"""A real federation, from one end to the other: Flower's processes, TLS, registered keys, bytes there and back."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("flwr")
pytest.importorskip("cryptography")

from hanse.config import Settings
from hanse.deploy import app
from hanse.deploy.here import BIN, LINK, OnThisMachine, free_ports

ECHO = Path(__file__).parent / "echo"


def echoes(log: str) -> dict[str, dict[str, object]]:
    lines = [json.loads(line) for line in re.findall("^echo (.*)$", log, re.M)]
    return {line.pop("name"): line for line in lines}


def test_bytes_go_there_and_back(tmp_path: Path) -> None:
    """To every node and back, whole; a client that fails is told of; and nothing is left running."""
    with OnThisMachine(tmp_path, config={"ada": "data='/data of/ada'", "bob": "fails=true"}) as federation:
        ended = federation.run(ECHO, "--run-config", "size=6000000")
        assert (ended.status, ended.details) == ("completed", "N/A"), ended
        found = echoes(ended.log)
        assert found["ada"] == {"same": True, "told": "ada", "data": "/data of/ada", "cwd": str(tmp_path / "ada")}
        assert found["bob"] == {"error": 2, "reason": "<class 'ValueError'>:<'no data today'>"}
        federation.kill("bob")
        federation.kill(LINK)
    assert federation.processes() == []


def test_the_folder_works_as_its_readme_says(tmp_path: Path) -> None:
    """Every command of README.md, in its order, on one machine; the app's components are an echo's."""
    folder, home, ports = tmp_path / "two", tmp_path / "home", free_ports(3)
    app.write(Settings(clients=2), folder, ["ada", "bob"], f"localhost:{ports[0]}", days=1)
    pyproject = folder / "app" / "pyproject.toml"
    text = re.sub(r"hanse\.deploy\.(server|client):app", r"echo_\1:app", pyproject.read_text())
    pyproject.write_text(text.replace("[tool.flwr.app.config]", "[tool.flwr.app.config]\nsize = 10"))
    for module in ECHO.glob("*.py"):
        (folder / "app" / module.name).write_text(module.read_text())
    commands = re.findall("`sh ([^`]*)`", (folder / "README.md").read_text())
    start, register, ada, bob, run = commands[:5]
    assert (start, register, run) == ("server/start.sh", "server/register.sh", "server/flwr.sh run ../app --stream")
    for name in ("ada", "bob"):
        (tmp_path / name).mkdir()
    home.mkdir()
    environment = {"PATH": f"{BIN}:/usr/bin:/bin", "HOME": str(home), "FEDERATION": str(folder)}

    def begin(command: str, log: str, **more: str) -> psutil.Popen:
        with open(tmp_path / log, "wb") as out:
            return psutil.Popen(["sh", *command.split()], cwd=folder, env={**environment, **more}, stdout=out, stderr=out)

    def say(command: str) -> str:
        done = subprocess.run(["sh", *command.split()], cwd=folder, env=environment, text=True, capture_output=True, timeout=90)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    running = [begin(start, "server.log")]
    try:
        for node, name, port in ((ada, "ada", ports[1]), (bob, "bob", ports[2])):
            running.append(begin(node.replace("/path/to/its/data", str(tmp_path / name)), f"{name}.log", PORT=str(port)))
        _until(lambda: "Uvicorn running" in (tmp_path / "server.log").read_text(), "the server is there")
        assert say(register).count("registered successfully") == 2
        taken = [tmp_path / "ada.log", tmp_path / "bob.log"]
        _until(lambda: all("SuperNode ID" in log.read_text() for log in taken), "both nodes are there, if refused at first")
        found = echoes(say(run))
        assert {name: (seen["told"], seen["data"]) for name, seen in found.items()} == {
            n: (n, str(tmp_path / n)) for n in ("ada", "bob")
        }
        assert "finished:completed" in say("server/flwr.sh ls --format json")
    finally:
        for process in reversed(running):
            process.terminate()
        _, stuck = psutil.wait_procs(running, timeout=20)
        left = _left(folder)
        for process in left:
            process.kill()
    assert stuck == [] and left == []
    assert list(home.iterdir()) == []  # nothing of the user's own is touched


def _left(folder: Path, seconds: float = 10) -> list[psutil.Process]:
    """Processes that carry the folder in their environment, after those that are about to end have ended."""
    end = time.monotonic() + seconds
    while True:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("FEDERATION") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.1)


def _until(true: object, what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end, what
        time.sleep(0.2)
