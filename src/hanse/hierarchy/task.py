"""What there is to do in a round: the steps of the tree on all nodes, what each has, and who works on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hanse.hierarchy import plan
from hanse.hierarchy.events import Event, Kind
from hanse.hierarchy.node import Node, Worker
from hanse.hierarchy.plan import Role
from hanse.hierarchy.store import RESULTS, Store, Stored


@dataclass(eq=False)
class Task:
    """A step of the tree: ``wanted`` inputs, and the ``slot`` of ``parent`` that its result is for (None: it is the round's)."""

    node: Node
    role: Role
    wanted: int
    parent: Task | None = None
    slot: int = 0
    inputs: dict[int, Stored | None] = field(default_factory=dict)
    """What is known, by slot; None will not come."""
    worker: Worker | None = None
    out: Stored | None = None
    fed: int = 0
    """Slots that the worker has been told of."""
    received: int = 0
    """Bytes of ``out`` that have come from another node."""
    attempts: int = 0

    @property
    def whole(self) -> bool:
        """Whether all inputs are known."""
        return len(self.inputs) == self.wanted

    @property
    def present(self) -> list[Stored]:
        """The inputs that have come."""
        return [s for s in self.inputs.values() if s is not None]

    @property
    def where(self) -> Store:
        """The store that its result is written to."""
        return (self.parent.node if self.role is Role.SENDER and self.parent else self.node).store

    def has_nothing_to_add(self) -> bool:
        """Whether a single input is the result as it is, or nothing is."""
        if self.worker is not None or not self.whole:
            return False
        match self.present:
            case []:
                return True
            case [only]:  # not if it has to travel, is somebody else's too, or is of another type than results
                same = only.store.dtypes[only.shelf] is only.store.dtypes[RESULTS]
                return self.role is not Role.SENDER and same and only.references == 1
        return False

    def drop(self) -> None:
        """Need none of its inputs any more, nor its result unless that was handed on."""
        for stored in (*self.present, self.out):
            if stored is not None:
                stored.release()
        self.inputs, self.out, self.worker = {}, None, None

    def news(self) -> list[Event]:
        """What its aggregator does not know yet: the inputs whose turn it is."""
        assert self.out is not None
        if self.role is Role.SENDER:
            return [stored.event(Kind.SEND) for stored in self.present]
        events = [] if self.fed else [self.out.event(Kind.START)]
        while self.fed in self.inputs:
            new = self.inputs[self.fed]
            events += [] if new is None else [new.event(Kind.INPUT)]
            self.fed += 1
        return events + [Event(Kind.CLOSE)] * (self.fed == self.wanted)


def tasks(
    nodes: Sequence[Node], assigned: Sequence[int], fan_in: int, lanes: int
) -> tuple[list[Task], dict[int, tuple[Task, int]]]:
    """The tasks of a round whose places are ``assigned`` to nodes, and the task and slot of every place."""
    used, places = sorted(set(assigned)), dict[int, tuple[Task, int]]()
    top = Task(nodes[plan.top(assigned)], Role.TOP, len(used)) if len(used) > 1 else None
    made = [] if top is None else [top]
    for i, number in enumerate(used):
        node, last = nodes[number], (top, i)
        if top is not None and node is not top.node:
            made.append(Task(node, Role.SENDER, 1, *last))
            last = made[-1], 0
        mine = [place for place, n in enumerate(assigned) if n == number]
        steps, slots = plan.tree(len(mine), fan_in, lanes)
        here: dict[int, Task] = {}
        for s in reversed(range(len(steps))):  # parents come after their children
            role, inputs, parent, slot = steps[s]
            here[s] = Task(node, role, inputs, *(last if parent == plan.OUT else (here[parent], slot)))
        made += here.values()
        places |= {place: (here[s], slot) for place, (s, slot) in zip(mine, slots, strict=True)}
    return made, places
