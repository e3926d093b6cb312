"""References, reuse and bounds of a node's store."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hanse.core.errors import TransportError
from hanse.hierarchy.store import RESULTS, UPDATES, Store
from hanse.transport.blocks import attach


@pytest.fixture
def store():
    made = Store(0, 100, (torch.float32, torch.float64), updates=2, results=1)
    yield made
    made.close()


def test_memory_is_lent_again_after_the_last_reference(store):
    one = store.take(UPDATES)
    one.references += 1
    address = one.values.data_ptr()
    one.release()
    assert store.stored == {one.number: one} and store.take(UPDATES).values.data_ptr() != address
    one.release()
    again = store.take(UPDATES)
    assert again.values.data_ptr() == address and again.number != one.number


def test_shelves_are_full_each_for_itself(store):
    for _ in range(2):
        store.take(UPDATES)
    assert store.full(UPDATES) and not store.full(RESULTS)
    with pytest.raises(TransportError, match="budget: updates fill 800 bytes"):
        store.take(UPDATES)
    assert store.take(RESULTS).values.dtype is torch.float64
    assert store.peak_bytes == 2 * 400 + 800


def test_other_processes_find_it_by_name(store):
    one = store.take(UPDATES)
    attach(one.name)[:400].view(torch.float32)[7] = 5
    assert one.values[7] == 5 and Path(one.name).name == str(one.place)


def test_what_is_given_away_has_no_name_and_stays(store):
    one = store.take(RESULTS)
    one.values.fill_(3)
    given = store.give_away(one)
    folder = store.shelves[RESULTS].folder
    store.close()
    assert not folder.exists() and not Path(one.name).exists() and bool((given == 3).all())
    assert not store.stored


def test_nothing_is_left_when_closed(store):
    folders = [blocks.folder for blocks in store.shelves]
    store.take(UPDATES)
    store.close()
    assert not any(folder.exists() for folder in folders)
