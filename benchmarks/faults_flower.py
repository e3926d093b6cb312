"""Kill and freeze the processes of a real federation on Flower on seeded scripts, and see what it comes to.

    python benchmarks/faults_flower.py [--scripts 20] [--first 0] [--out FOLDER]

Against a node: its SuperNode killed and started again, its client's process killed in the middle of its work, its SuperNode stopped
for some seconds. Against the server: the ServerApp killed, or the SuperLink killed and started again; then the run is submitted
again, as its README says. At the end: the run has finished; every round is in the history once, with no client twice and nobody who
is none; and where no client was missing in any round, the model is the same bit for bit.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from hanse.config import Settings
from hanse.deploy.app import bundle
from hanse.deploy.here import LINK, OnThisMachine
from hanse.track.folder import Folder

NODES = ["ada", "bob", "cyd"]
SETTINGS = Settings.read(
    None,
    {
        "task": "digits",
        "clients": len(NODES),
        "partition": "dirichlet(0.5)",
        "method": "Scaffold(steps=20)",
        "codec": "feedback(topk(0.3) | uniform(8))",
        "schedule": f"synchronous(cohort={len(NODES)})",
        "rounds": 6,
        "engine": "flower(path='stacked', threads=1, grace=20)",
    },
)
AT_NODES, AT_SERVER = ("kill the node", "kill its client", "stop it for 3 s"), ("kill the server's app", "kill the link")
LONGEST = 600.0


def script(seed: int) -> list[tuple[float, str, str]]:
    """One or two deeds: seconds after the one before, what, and to whom."""
    chance = random.Random(f"flower {seed}")
    kinds = AT_SERVER if seed % 2 else AT_NODES
    return [(chance.uniform(3, 25), chance.choice(kinds), chance.choice(NODES)) for _ in range(chance.randint(1, 2))]


def ended(federation: OnThisMachine, run: int) -> bool:
    return federation.status(run)[0] == "finished"


def again(federation: OnThisMachine, app: Path, run: int) -> int:
    """Wait until Flower knows that a run has failed, then submit it again."""
    federation.until(lambda: ended(federation, run), 120, "the run has failed", every=2.0)
    return federation.submit(app)


def rejoin(federation: OnThisMachine, name: str) -> None:
    """Start a node until it is let in: one that was killed is refused for a minute."""
    before, began = federation.log(name).count("SuperNode ID"), time.monotonic()
    while federation.log(name).count("SuperNode ID") == before:
        assert time.monotonic() < began + LONGEST, federation.log(name)
        federation.start(name)
        process = federation.running[name]
        while process.poll() is None and federation.log(name).count("SuperNode ID") == before:
            time.sleep(0.2)
        time.sleep(2)


def play(seed: int, folder: Path) -> list[str]:
    """One script on one federation; what was done."""
    bundle(SETTINGS, folder / "app", NODES)
    done, app = [], folder / "app"
    config = {name: f"client={i}" for i, name in enumerate(NODES)}
    with OnThisMachine(folder, NODES, database=True, config=config) as federation:
        run = federation.submit(app)
        history = folder / LINK / "run" / "history.jsonl"
        federation.until(history.exists, 180, "the first round")
        for after, what, whom in script(seed):
            time.sleep(after)
            if ended(federation, run):
                break
            done.append(f"{what} ({whom})" if what in AT_NODES else what)
            if what == "kill the node":
                federation.kill(whom)
                rejoin(federation, whom)
            elif what == "kill its client":
                for process in federation.below(whom, "flwr-clientapp"):
                    with suppress(psutil.Error):
                        process.kill()
            elif what == "stop it for 3 s":
                federation.signal(whom, signal.SIGSTOP)
                time.sleep(3)
                federation.signal(whom, signal.SIGCONT)
            elif what == "kill the server's app":
                for process in federation.below(LINK, "flwr-serverapp"):
                    with suppress(psutil.Error):
                        process.kill()
                run = again(federation, app, run)
            else:
                federation.restart(LINK)
                run = again(federation, app, run)
        federation.until(lambda: ended(federation, run), LONGEST, "the run has ended", every=2.0)
        done.append(federation.status(run)[1])
    return done


def wrong(folder: Path, expected: Path, done: list[str]) -> Iterator[str]:
    """What is not as it should be."""
    if done[-1] != "completed":
        yield f"the run {done[-1]}"
        return
    one, other = Folder(folder / LINK / "run").read(), Folder(expected / LINK / "run").read()
    if [r["round"] for r in one.history] != list(range(1, SETTINGS.rounds + 1)):
        yield f"rounds in the history: {[r['round'] for r in one.history]}"
    for record in one.history:
        if len({*record["cohort"]}) < len(record["cohort"]) or not {*record["cohort"]} <= {*range(len(NODES))}:
            yield f"round {record['round']} of {record['cohort']}"
    everybody = all(len(record["cohort"]) == len(NODES) for record in one.history)
    if everybody and any(not torch.equal(t, one.weights[n]) for n, t in other.weights.items()):
        yield "another model, though nobody was missing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--out", type=Path, default=None, help="where the runs go [a temporary folder]")
    given = parser.parse_args()
    out = given.out or Path(tempfile.mkdtemp(prefix="faults-"))
    expected, bad = out / "undisturbed", 0
    bundle(SETTINGS, expected / "app", NODES)
    with OnThisMachine(expected, NODES, config={name: f"client={i}" for i, name in enumerate(NODES)}) as federation:
        assert federation.run(expected / "app", seconds=LONGEST).status == "completed"
    for seed in range(given.first, given.first + given.scripts):
        done = play(seed, out / str(seed))
        found = [*wrong(out / str(seed), expected, done)]
        bad += bool(found)
        cohorts = [len(record["cohort"]) for record in Folder(out / str(seed) / LINK / "run").read().history]
        print(f"{seed:4} {'; '.join(done)}; clients in each round: {cohorts}: {'; '.join(found) or 'as it should be'}", flush=True)
    print(f"{given.scripts} scripts, {bad} wrong")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
