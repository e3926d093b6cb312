"""What every learning rule is: client work, a server step, and the declaration of what is sent and kept."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import AfterValidator, PositiveFloat
from torch import Tensor

from hanse.aggregators import Aggregator, mean
from hanse.codecs.base import Codec
from hanse.core.context import Context
from hanse.core.messages import Reply, Tensors, Upload
from hanse.core.optim import LearningRate, Optimizer, constant, sgd
from hanse.core.part import Part
from hanse.core.problem import Problem
from hanse.core.samples import Plan
from hanse.fleet.population import Population

State = dict[str, Tensor]
"""What the server remembers, as named tensors: ``x`` ``[P]`` is always the global model. A state is never changed in place.
Among peers, who have no server, ``x`` ``[N, P]`` are the models of all of them."""


def _plain(local: Optimizer) -> Optimizer:
    if not local.plain:
        raise ValueError("this rule's formulas hold for plain sgd")
    return local


def _mean(aggregate: Aggregator) -> Aggregator:
    if aggregate != mean():
        raise ValueError("this rule's formulas hold for the mean")
    return aggregate


PlainMean = Annotated[Aggregator, AfterValidator(_mean)]
"""An aggregator for rules whose formulas hold for the mean alone."""

PlainSgd = Annotated[Optimizer, AfterValidator(_plain)]
"""A local optimiser for rules that recover gradients from displacements: sgd without momentum and weight decay."""


class Method(Part):
    """Base of all rules. A rule overrides the smallest thing that makes it different (see ``FedAvg`` for the ladder)."""

    kind: ClassVar[str] = "method"
    abstract: ClassVar[bool] = True
    keeps: ClassVar[tuple[str, ...]] = ()
    """Names of what a client keeps between rounds; vectors ``[P]``, zero at first, unless ``kept`` says otherwise."""

    own_model: ClassVar[str | None] = None
    """Which of these is a client's own model ``[P]``, where the server's does not overwrite it."""

    batched: ClassVar[bool] = True
    """Whether ``train`` takes many clients side by side; else engines hand it one at a time."""

    gradients: ClassVar[int] = 1
    """Gradients in a local step, for virtual time."""

    opens: ClassVar[bool] = False
    """Whether every client has work called ``open`` before round 0, whose replies go to ``opened``."""

    masks: ClassVar[bool] = False
    """Whether the server asks which entries of a sum arrived: ``name.kept`` and ``name.overlap`` are then sums as well."""

    codec: ClassVar[Codec | None] = None
    """How clients write what they send, where that belongs to the rule."""

    down: ClassVar[Codec | None] = None
    """How the server writes what it sends, where that belongs to the rule."""

    lr: LearningRate = constant(value=0.1)
    """Local learning rate: a number, or a rate over rounds such as exponential(0.1, 0.998)."""
    local: Optimizer = sgd()
    """Local optimiser."""
    clip: PositiveFloat | None = None
    """Largest norm of a client's gradient."""
    aggregate: Aggregator = mean()
    """How the clients' contributions become one: their mean, or something that withstands liars, e.g. krum(2)."""

    @property
    def plain(self) -> bool:
        """Whether clients follow plain gradients and only their weighted sum is used, so that exact shortcuts may apply."""
        return False

    @property
    def robust(self) -> bool:
        """Whether the server needs to see single contributions, because it takes something else than their mean."""
        return type(self.aggregate) is not mean  # comparing parts by value takes longer than a round of a tiny model may

    def init(self, problem: Problem) -> State:
        """The server's state before round 0."""
        return {"x": problem.start}

    def kept(self, problem: Problem, population: Population) -> Tensors:
        """What clients keep before their first job, by name: ``[width]`` for all alike, or ``[N, width]``."""
        return {name: problem.start.new_zeros(problem.shared) for name in self.keeps}

    def plan(self) -> Plan:
        """How long clients work."""
        return Plan()

    def message(self, state: State) -> Tensors:
        """What the server sends to every client of a round."""
        return {"x": state["x"]}

    def asked(self, state: State, clients: Tensor) -> Tensor:
        """Those of a cohort who are asked, in its order."""
        return clients

    def parts(self, state: State, clients: Tensor) -> Tensor | None:
        """What part of the message's vectors each of ``clients`` gets, float64 ``[C]``, as ``down`` cuts them; None: all."""
        return None

    def weight(self, counts: Tensor) -> Tensor:
        """The averaging weight of clients with so many samples, ``[C]``."""
        return counts

    def open(self, ctx: Context) -> Upload:
        """The clients' work before round 0, if the rule ``opens``."""
        raise TypeError(f"{type(self).__name__} does not define open")

    def opened(self, state: State, reply: Reply) -> State:
        """The server's work on what ``open`` brought."""
        raise TypeError(f"{type(self).__name__} does not define opened")

    def train(self, ctx: Context) -> Upload:
        """The clients' work."""
        raise TypeError(f"{type(self).__name__} does not define train")

    def step(self, state: State, reply: Reply, round: int) -> State:
        """The server's work."""
        raise TypeError(f"{type(self).__name__} does not define step")
