"""What an engine is: the settings of one place to run a conversation in, and who does clients' work there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

from pydantic import PositiveInt

from hanse.core.part import Part

if TYPE_CHECKING:
    from hanse.codecs.base import Codec
    from hanse.engines.execution import Executor, Lane, Orders
    from hanse.engines.rounds import Rounds
    from hanse.federation import Federation
    from hanse.methods.base import Method


class Arrangement(NamedTuple):
    """How clients are laid out on machines: gradient path, clients per batch, batches at a time, threads inside one operation.

    With ``shards`` each client belongs to one of them for good, and no batch has clients of two.
    """

    path: str
    chunk: int
    workers: int
    threads: int
    shards: int = 1


class Crew(Protocol):
    """Those who do clients' work."""

    @property
    def replaced(self) -> int:
        """How many of them were lost and replaced so far, where that is known."""
        ...

    def run(self, orders: Orders, how: Arrangement, total: bool) -> list[Lane]:
        """Execute as arranged; ``total`` keeps only the sums over clients of what only sums are needed of.

        The order of all additions follows from the arrangement alone, and so do all bits.
        """
        ...

    def close(self) -> None:
        """There is no more work."""
        ...


class Engine(Part):
    """Base of all engines. What is left open is chosen by timing each way on the first cohort, and remembered for the machine."""

    kind: ClassVar[str] = "engine"
    abstract: ClassVar[bool] = True

    path: Literal["stacked", "vmap", "loop"] | None = None
    """How gradients are computed: batched matrix products, torch.vmap, or one client at a time."""
    chunk: PositiveInt | None = None
    """Clients per batch."""
    workers: PositiveInt | None = None
    """Batches at a time."""
    threads: PositiveInt | None = None
    """Threads inside one operation."""
    precision: Literal["full", "bf16"] = "full"
    """bf16: forward and backward in bfloat16, weights and updates in full precision."""
    kept: Literal["memory", "disk"] = "memory"
    """Where what clients remember between rounds lives: in memory, or in memory-mapped temporary files."""
    shortcuts: bool = True
    """Use exact algebraic shortcuts for plain SGD; they sum in another order, so the last bits differ."""
    shards: PositiveInt = 1
    """Deal the clients out to so many groups for good, by number; each adds up its own, batch by batch."""

    def fixed(self) -> Arrangement | None:
        """The arrangement, if nothing is left open."""
        if self.path and self.chunk and self.workers and self.threads:
            return Arrangement(self.path, self.chunk, self.workers, self.threads, self.shards)
        return None

    def network(self, federation: Federation, method: Method, codec: Codec, down: Codec, **run: Any) -> Rounds:
        """The network of a run here; ``run`` is what ``Simulation`` takes by name."""
        from hanse.engines.simulation import Simulation

        return Simulation(federation, method, self, codec, down, **run)

    def crew(self, executor: Executor, federation: Federation) -> Crew:
        """Who does the work of ``executor`` here."""
        raise TypeError(f"{type(self).__name__} does not define crew")
