"""Everything in this process."""

from __future__ import annotations

from hanse.engines.base import Crew, Engine
from hanse.engines.execution import Executor
from hanse.federation import Federation


class local(Engine):
    """This process: batches of clients in threads."""

    def crew(self, executor: Executor, federation: Federation) -> Crew:
        return executor
