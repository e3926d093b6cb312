"""What the doctor looks at on one machine: what is installed, keys, certificates, settings, data, room on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import chdir
from datetime import datetime, timedelta
from pathlib import Path

from hanse.config import Settings
from hanse.core.errors import ConfigError, HanseError
from hanse.deploy import keys
from hanse.deploy.app import FLOWER
from hanse.deploy.check import RENEW, Check, ok, problem, warning
from hanse.deploy.responder import installed
from hanse.deploy.share import one_of_each, with_own_data

SOON = timedelta(days=30)
"""Certificates that end so soon are warned of."""
LEAST_FREE, SCARCE = 100 << 20, 2 << 30
"""Bytes free on a disk: fewer are a problem, or a warning."""


def versions(there: dict[str, str]) -> Iterator[Check]:
    """What is installed here, against what ``there`` is on the server, as far as that is known."""
    for name, here in installed().items():
        theirs = there.get(name, here)
        if not here:
            yield problem(name, "not installed", "pip install 'hanse[flower]'")
        elif name in ("hanse", "flwr") and theirs != here:
            yield problem(name, f"{here} here, {theirs} on the server", "install the same on both")
        elif name == "flwr" and here != FLOWER:
            yield warning(name, f"{here}; hanse was tried with {FLOWER}", f"pip install flwr=={FLOWER}")
        elif theirs != here:
            yield warning(name, f"{here} here, {theirs} on the server", "nothing, unless runs are to repeat to the last bit")
        else:
            yield ok(name, here + (", as on the server" if name in there else ""))


def private_files(files: list[Path]) -> Iterator[Check]:
    """Private keys are for their owner alone."""
    open_ = [file for file in files if file.stat().st_mode & 0o077]
    for file in open_:
        found = f"{file} has mode {file.stat().st_mode & 0o777:o}: others may read it"
        yield problem("key files", found, f"chmod 600 {file}; if others have been there, make new keys")
    if not open_:
        yield ok("key files", f"{len(files)}, for their owner alone") if files else problem("key files", "none", RENEW)


def certificate(own: Path, host: str, now: datetime) -> Check:
    """The server's certificate, its authority's, and its key."""
    try:
        until = keys.check_server(own, [host], now)
    except ConfigError as error:
        return problem("certificate", str(error), RENEW)
    if until - now < SOON:
        return warning("certificate", f"ends on {until:%Y-%m-%d %H:%M} UTC", RENEW)
    return ok("certificate", f"for {host}, good until {until:%Y-%m-%d}")


def put_away(folder: Path) -> Check:
    """Private files that are not needed here."""
    left = [folder / "server" / "ca.key"] if (folder / "server" / "ca.key").exists() else []
    left += sorted((folder / "nodes").glob("*/*.key"))
    if left:
        names = ", ".join(str(file.relative_to(folder)) for file in left)
        return warning("put away", names, "keep ca.key where no network is; give nodes their folders and delete them here")
    return ok("put away", "no private key lies here that is not needed")


def registered(folder: Path, clients: int) -> Check:
    """The public keys of the nodes that may join; Flower takes those of elliptic curves alone."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    files = sorted(folder.glob("*.pub"))
    for file in files:
        try:
            fits = isinstance(load_ssh_public_key(file.read_bytes()), EllipticCurvePublicKey)
        except (OSError, ValueError, UnsupportedAlgorithm):
            fits = False
        if not fits:
            found = f"{file}: not a public key of an elliptic curve (ecdsa) in OpenSSH's format"
            return problem("nodes", found, "ask that node for its key again")
    if len(files) != clients:
        do = "have as many keys in server/nodes as the settings have clients"
        return problem("nodes", f"{len(files)} public keys for {clients} clients", do)
    return ok("nodes", ", ".join(file.stem for file in files))


def task(settings: Settings, own: Path) -> Check:
    """The run's parts, and its task on the server, which runs in ``own`` and needs test samples."""
    try:
        parts = one_of_each(settings)
        if parts.engine.short_name != "flower":
            return problem("settings", f"engine: {parts.engine}", "have engine = 'flower' in app/pyproject.toml")
        with chdir(own):
            federation = settings.federation(settings.seed[0])
            split, size = federation.split, federation.problem.layout.size
    except (HanseError, OSError) as error:
        return problem("settings", " ".join(str(error).split()), "correct them in app/pyproject.toml")
    if not len(split.test_x):
        do = "have some in the task: the server tells from one of its own what replies have to look like"
        return problem("settings", f"{settings.task} has no test samples on the server", do)
    what = f"{parts.methods[0].short_name} on {settings.task}"
    return ok("settings", f"{what}, {size:,} parameters, {len(split.test_x):,} test samples here")


def pair(folder: Path, now: datetime) -> Check:
    """A node's private key, its public one if that is here too, and the authority's certificate."""
    names = [file.stem for file in sorted(folder.glob("*.key"))]
    if len(names) != 1:
        return problem("key", f"{len(names)} private keys in {folder}", "have the one that was registered for this node")
    file = folder / f"{names[0]}.key"
    try:
        keys.private(file)
        if file.with_suffix(".pub").exists():  # a node that made its own gave it another name, and needs it no more
            keys.check_node(folder, names[0])
        authority = keys.certificate(folder / "ca.pem")
        keys.in_time(authority, folder / "ca.pem", now)
    except ConfigError as error:
        do = "ask whoever runs the server for this node's folder, unless this machine's clock is wrong"
        return problem("key", str(error), do)
    return ok("key", f"of {names[0]}; the authority is good until {authority.not_valid_after_utc:%Y-%m-%d}")


def own_data(folder: Path, client: int, data: Path, settings: Settings | None) -> tuple[Check, int]:
    """Data of node number ``client``, read as the run will read them; and the bytes of a model, 0 where that is not known."""
    if not os.path.isdir(data):  # false too where it may not be asked
        return problem("data", f"{data}: no folder that this user can see", "name the folder with this node's data: --data"), 0
    if not os.access(data, os.R_OK | os.X_OK):
        return problem("data", f"{data}: cannot be read by this user", f"chmod u+rx {data}, or be the user who may"), 0
    if settings is None:
        do = "give the run's settings with --settings, or have the server's by --token"
        return warning("data", f"{data}: there; what the run's task makes of it is not known", do), 0
    do, held = f"have in {data} what {settings.task} reads", data.resolve()
    try:
        with chdir(folder):  # which is where the node will be
            federation = with_own_data(settings, client, held)
            split, problem_ = federation.split, federation.problem
    except (HanseError, OSError) as error:
        return problem("data", " ".join(str(error).split()), do), 0
    size, count = problem_.layout.size * problem_.start.element_size(), len(split.train.x)
    if not count:
        return problem("data", f"{data}: no samples", do), size
    labels = split.train.y
    present = len(set(labels.tolist())) if split.names and labels.dim() == 1 else 0
    of_classes = f", {present} of {len(split.names)} classes" if present else ""
    return ok("data", f"{count:,} samples{of_classes}, for {settings.task}"), size


def disk(folder: Path) -> Check:
    """Room for what is written beside ``folder``."""
    free_ = shutil.disk_usage(folder).free
    found = f"{free_ / 1e9:.1f} GB free where {folder} is"
    if free_ < LEAST_FREE:
        return problem("disk", found, "make room: models and checkpoints are written there")
    return warning("disk", found, "make room, unless the model is small") if free_ < SCARCE else ok("disk", found)
