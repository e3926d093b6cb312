"""24 bytes an event, and blocks as vectors."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from hanse.hierarchy.events import SIZE, Event, Kind, Shelf, unpack
from hanse.transport.blocks import Blocks


@given(
    st.lists(
        st.builds(
            Event,
            st.sampled_from(Kind),
            st.integers(0, 1),
            st.integers(0, 2**32 - 1),
            st.integers(0, 2**64 - 1),
            st.floats(allow_nan=False),
        )
    )
)
def test_events_come_back_as_they_were(events: list[Event]) -> None:
    data = b"".join(event.pack() for event in events)
    assert SIZE == 24 and len(data) == 24 * len(events)
    assert list(unpack(data)) == events


def test_a_block_is_mapped_once_and_not_copied() -> None:
    blocks = Blocks()
    block = blocks.take(400)
    shelf = Shelf(str(blocks.folder), "float32", 100)
    view = shelf.view(0)
    block.memory[:400].view(torch.float32)[3] = 7
    assert view[3] == 7 and shelf.view(0) is view
    shelf.forget(0)
    assert shelf.view(0) is not view and np.array_equal(shelf.view(0), view)
    blocks.close()


def test_an_aggregator_loads_no_torch() -> None:
    code = "import hanse.hierarchy.aggregator, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
