"""A real federation of Flower's processes on this machine: a SuperLink, SuperNodes, TLS, keys that are registered.

    with OnThisMachine(folder, nodes=["ada", "bob"]) as federation:
        ended = federation.run(app)
        assert ended.status == "completed", ended.log

Everything lies in ``folder``: keys, logs, what Flower writes. No process outlives the ``with``: all that were started, by whom
ever, carry the folder in their environment and are looked for there.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, NamedTuple, Self

import psutil

from hanse.config import Settings
from hanse.core.errors import TransportError
from hanse.deploy import keys
from hanse.deploy.app import bundle
from hanse.track.folder import Folder
from hanse.track.run import Run

BIN = Path(sys.executable).parent
LINK = "superlink"


class Ended(NamedTuple):
    """How a run ended: Flower's status (completed, failed, stopped), what it says about it, and the ServerApp's log."""

    id: int
    status: str
    details: str
    log: str


class OnThisMachine:
    """The processes of a federation, to be started, submitted to, hurt and stopped."""

    def __init__(
        self,
        folder: Path,
        nodes: Sequence[str] = ("ada", "bob"),
        secure: bool = True,
        database: bool = False,
        poll: float = 0.05,
        config: Mapping[str, str] = {},
        environment: Mapping[str, str] = {},
    ) -> None:
        """``secure`` is TLS and keys; ``database`` a SuperLink that remembers; ``poll`` seconds between looks for new work.

        ``config`` maps nodes to their ``--node-config``; ``environment`` is added to all processes.
        """
        self.folder, self.names, self.secure, self.database = folder.resolve(), list(nodes), secure, database
        self.config, self.poll, self.extra = config, poll, environment
        self.ports = dict(zip([LINK, *nodes], free_ports(1 + len(self.names)), strict=True))
        self.running: dict[str, psutil.Popen] = {}
        self.ids: dict[str, int] = {}
        self.keys = self.folder / "keys"

    def __enter__(self) -> Self:
        try:
            if self.secure:
                now = datetime.now(UTC)
                keys.authority(self.keys, 1, now)
                keys.server(self.keys, ["localhost", "127.0.0.1"], 1, now)
            self._connection()
            self.start(LINK)
            for name in self.names:
                self.register(name)
                self.start(name)
            # What they log costs nothing to look at; each of Flower's commands takes a second of a core.
            self.until(lambda: all("SuperNode ID" in self.log(name) for name in self.names), 60, "all nodes online")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in [*self.names, LINK]:
            if name in self.running:
                self.signal(name, signal.SIGCONT)
                self.signal(name, signal.SIGTERM)
        psutil.wait_procs(list(self.running.values()), timeout=5)
        while left := self.processes():
            for process in left:
                with _gone():
                    process.kill()
            psutil.wait_procs(left, timeout=5)
        for process in self.running.values():
            process.wait()

    # What there is

    def processes(self) -> list[psutil.Process]:
        """All processes alive that belong to this federation, children of children too."""
        found = []
        for process in psutil.process_iter():
            with _gone():
                mine = Path(process.environ().get("FLWR_HOME", "/")).is_relative_to(self.folder)
                if mine and process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                    found.append(process)
        return found

    def below(self, name: str, command: str = "") -> list[psutil.Process]:
        """The processes started below ``name``, such as its ``flwr-clientapp``, oldest first."""
        home = str(self.folder / name)
        found = []
        for process in self.processes():
            with _gone():
                if process.environ().get("FLWR_HOME") == home and command in " ".join(process.cmdline()):
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def log(self, name: str) -> str:
        """What ``name`` and the processes below it have written."""
        file = self.folder / f"{name}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def online(self) -> list[str]:
        """Names of the nodes that the SuperLink holds to be online."""
        nodes = json.loads(self.flwr("supernode", "list", "--format", "json").stdout)["nodes"]
        known = {str(id): name for name, id in self.ids.items()}
        return [known.get(str(node["node-id"]), str(node["node-id"])) for node in nodes if node["status"] == "online"]

    # Processes

    def start(self, name: str) -> None:
        """Start the SuperLink, or a node by its name."""
        command = self._link() if name == LINK else self._node(name)
        with open(self.folder / f"{name}.log", "ab") as out:
            self.running[name] = self._spawn(name, command, out)
        if name == LINK:
            self.until(lambda: _listens(self.ports[LINK]), 60, "SuperLink listens")

    def signal(self, name: str, number: int) -> None:
        """Send a signal to one process; what it started is left alone."""
        with _gone():
            self.running[name].send_signal(number)

    def kill(self, name: str) -> None:
        """SIGKILL, and wait for it."""
        self.signal(name, signal.SIGKILL)
        self.running[name].wait(timeout=10)

    def stop(self, name: str, seconds: float = 20) -> int:
        """SIGTERM, and the exit status."""
        self.signal(name, signal.SIGTERM)
        status: int = self.running[name].wait(timeout=seconds)
        return status

    def restart(self, name: str) -> None:
        """SIGKILL, then start again with the same key, port and (if there is one) database."""
        self.kill(name)
        self.start(name)

    def register(self, name: str, key: Path | None = None) -> None:
        """Make a node's key pair and register it; with ``key``, register that public key instead."""
        if not self.secure:
            return
        if key is None:
            keys.node(self.keys, name)
        told = self.flwr("supernode", "register", str(key or self.keys / f"{name}.pub"), "--name", name, "--format", "json")
        self.ids[name] = int(json.loads(told.stdout)["node-id"])

    # Runs

    def submit(self, app: Path, *options: str) -> int:
        """``flwr run``: the number of the run."""
        told = json.loads(self.flwr("run", str(app), *options, "--format", "json").stdout)
        return int(told["run-id"])

    def run(self, app: Path, *options: str, seconds: float = 60) -> Ended:
        """Submit an app and wait for its end."""
        return self.wait(self.submit(app, *options), seconds)

    def wait(self, run: int, seconds: float = 60) -> Ended:
        """The end of a run. A ServerApp that was killed is missed by the SuperLink after a minute."""
        looked = time.monotonic()

        def over() -> bool:
            nonlocal looked
            if re.search(f"Finished task [0-9]+ of run {run}", self.log(LINK)):
                return True
            if time.monotonic() < looked + 5:
                return False
            looked = time.monotonic()
            return self.status(run)[0] == "finished"

        self.until(over, seconds, f"run {run} is finished")
        _, status, details = self.status(run)
        return Ended(run, status, details, self.flwr("log", str(run), "--show").stdout)

    def status(self, run: int) -> tuple[str, str, str]:
        """Where a run is (pending, starting, running, finished), how it ended, and why."""
        told = json.loads(self.flwr("ls", "--run-id", str(run), "--format", "json").stdout)["runs"][0]
        first, _, second = str(told["status"]).partition(":")
        return first, second, str(told.get("status-details", ""))

    def flwr(self, *arguments: str, check: bool = True, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """One of Flower's own commands, as the user of this federation gives it."""
        command = [str(BIN / "flwr"), *arguments]
        done = subprocess.run(command, env=self.environment("user"), text=True, capture_output=True, timeout=seconds, check=False)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.log(LINK)}")
        return done

    def until(self, true: Callable[[], bool], seconds: float, what: str, every: float = 0.1) -> None:
        """Wait until something is true; fails with all logs."""
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                logs = "\n".join(f"--- {name}\n{self.log(name)[-4000:]}" for name in self.ports)
                raise AssertionError(f"not within {seconds:g} s: {what}\n{logs}")
            time.sleep(every)

    def environment(self, name: str) -> dict[str, str]:
        """The environment of ``name``: a home of its own, nothing told to anybody, nothing looked up on the net."""
        home = self.folder / name
        home.mkdir(parents=True, exist_ok=True)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")}
        return {
            **kept,
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
            "HOME": str(home),
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(self.poll),
            **self.extra,
        }

    def _spawn(self, name: str, command: list[str], out: IO[bytes]) -> psutil.Popen:
        home = self.environment(name)
        options = {"cwd": home["HOME"], "stdin": subprocess.DEVNULL, "stdout": out, "stderr": out, "start_new_session": True}
        return psutil.Popen(command, env=home, **options)

    def _link(self) -> list[str]:
        command = [str(BIN / "flower-superlink"), "--host", "127.0.0.1", "--port", str(self.ports[LINK])]
        command += ["--disable-runtime-dependency-installation"]
        if self.database:
            command += ["--database", str(self.folder / "state.db")]
        if not self.secure:
            return [*command, "--insecure"]
        command += ["--ssl-ca-certfile", str(self.keys / "ca.pem"), "--enable-supernode-auth"]
        return [*command, "--ssl-certfile", str(self.keys / "server.pem"), "--ssl-keyfile", str(self.keys / "server.key")]

    def _node(self, name: str) -> list[str]:
        command = [str(BIN / "flower-supernode"), "--superlink", f"127.0.0.1:{self.ports[LINK]}", "--port", str(self.ports[name])]
        if name in self.config:
            command += ["--node-config", self.config[name]]
        if not self.secure:
            return [*command, "--insecure"]
        private = str(self.keys / f"{name}.key")
        return [*command, "--root-certificates", str(self.keys / "ca.pem"), "--auth-supernode-private-key", private]

    def _connection(self) -> None:
        how = f'root-certificates = "{self.keys / "ca.pem"}"' if self.secure else "insecure = true"
        text = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{self.ports[LINK]}"\n{how}\n'
        (Path(self.environment("user")["FLWR_HOME"]) / "config.toml").write_text(text)


class _gone:
    """A process that is no more is no error."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, psutil.Error | ProcessLookupError)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def run(settings: Settings, folder: Path, seconds: float = 600) -> Run:
    """The run of ``settings`` as a real federation of this machine's processes, in ``folder``, a node for every client.

    Raises ``TransportError`` with the end of the server's log where it does not complete.
    """
    names = [f"client{i}" for i in range(settings.clients)]
    bundle(settings, folder / "app", names)
    with OnThisMachine(folder, names, config={name: f"client={i}" for i, name in enumerate(names)}) as federation:
        ended = federation.run(folder / "app", seconds=seconds)
    if ended.status != "completed":
        raise TransportError(f"flower: the run {ended.status}: {ended.log.strip()[-2000:]}")
    return Folder(folder / LINK / "run").read()
