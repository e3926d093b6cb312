"""One small run that keeps a ledger: whose update, of which version, with which bits, went into which round.

python benchmarks/faulted.py FOLDER ENGINE     starts it, or goes on with it
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

import hanse as hs
from hanse.core.messages import Reply
from hanse.engines import Engine

RULE, CODEC = hs.methods.Scaffold(steps=150), hs.codecs.feedback(hs.codecs.topk(0.3) | hs.codecs.uniform(8))


def federation() -> hs.Federation:
    return hs.Federation(hs.tasks.digits(), clients=12, partition=hs.dirichlet(0.5))


def keep_ledger(folder: Path) -> Any:
    """For ``on_start``: every reply that moves the model is written down before it does."""

    def start(net: Any) -> None:
        reply_of = net._reply

        def listening(*args: Any, **kwargs: Any) -> Reply:
            reply = reply_of(*args, **kwargs)
            bits = hashlib.blake2b(digest_size=8)
            for name in sorted(reply.sums):
                bits.update(reply.sums[name].contiguous().numpy().tobytes())
            entry = [net.round, sorted(zip(reply.clients.tolist(), reply.versions.tolist(), strict=True)), bits.hexdigest()]
            with (folder / "ledger.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")
            return reply

        net._reply = listening

    return start


def main(folder: Path, engine: str, rounds: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    hs.run(
        federation(),
        RULE,
        hs.schedules.synchronous(cohort=6),
        rounds=rounds,
        codec=CODEC,
        engine=Engine.parse(engine),
        out=folder,
        resume=(folder / "run.json").is_file(),
        on_start=keep_ledger(folder),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
