"""A finished, or half-finished, run: what happened, and the weights it ended with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

from torch import Tensor

from hanse.data.task import Answer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Job = list[float | None]
"""``[client, version, sent, received, computed, arrived, used]``: what one client did with one model.

``client`` and ``version`` (the round the model is of) are int, the rest virtual seconds: when the server sent the model, the client
had it, had computed (None: never), when the reply reached the server (None: it was lost, or the client went away), and when the
server aggregated it (None: it was lost, too late or dropped). No time is known after one that never came.
"""


class Record(TypedDict):
    """One committed round. Bytes, seconds and ``updates``, the clients' updates that the server has used, are cumulative.

    ``metrics`` is empty in rounds without evaluation. ``staleness`` is the mean number of versions between the model that the
    round's updates started from and the current one, 0.0 in synchronous rounds. ``jobs`` are those that ended in this round, empty
    for a fleet without time and once a run has listed very many. ``epsilon``, only with differential privacy, is what all rounds
    so far have cost.
    """

    round: int
    seconds: float
    bytes_down: int
    bytes_up: int
    loss: float
    metrics: dict[str, float]
    cohort: list[int]
    staleness: float
    updates: int
    jobs: list[Job]
    epsilon: NotRequired[float]


@dataclass
class Run:
    """One rule with one seed.

    ``settings`` are the resolved settings as text; ``weights`` the named tensors of the final model; ``clients`` one row a client:
    ``samples`` int64 ``[N]``, ``rounds`` int64 ``[N]`` (how often it took part), ``classes`` int64 ``[N, K]`` (training samples per
    class; absent for very many clients), ``accuracy`` float64 ``[N]`` (on its own test part, NaN without one; named by the
    task's first metric). Besides, where clients come and go, ``away`` float64 ``[K, 3]``: (client, from, to) in virtual seconds.
    ``names`` are the class names. ``answers`` are what the final model says, where its task has it talk.
    """

    method: str
    seed: int
    settings: dict[str, str]
    history: list[Record]
    weights: dict[str, Tensor]
    clients: dict[str, Tensor] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """From which ``hanse.resume`` goes on: the server's and the clients' state and the counters."""

    def plot(self, metric: str = "accuracy", against: Literal["rounds", "updates", "bytes", "seconds"] = "rounds") -> Figure:
        """The curve of a metric against rounds, client updates, bytes or virtual seconds, as a matplotlib figure."""
        from hanse.track.figures import curves

        return curves([self], metric, against)

    def save(self, folder: Path | str) -> Path:
        """Write the run as a run folder and a report; returns the report's path."""
        from hanse.track.folder import Folder
        from hanse.track.report import write_report

        path = Path(folder)
        Folder(path).write(self)
        return write_report([self], path, f"{self.method} on {self.settings.get('task', 'a task')}")
