"""Receivers that are killed and started again."""

import hashlib
import threading

import pytest
import torch

from hanse.core.errors import TransportError
from hanse.transport.frames import Name
from hanse.transport.journal import Journal
from hanse.transport.peers import Link
from hanse.transport.sources import content
from hanse.transport.stream import Pace, Plan, prepared
from tests.transport.processes import TOKEN, Receiver

PLAN = Plan(Name(1, 2, 3), 1000, 100)
DATA = bytes(range(250)) * 4


def test_a_killed_receiver_gets_what_it_lacks_and_no_more(tmp_path):
    """It dies after j acknowledged chunks; the next one gets exactly C - j."""
    count, killed, chunk = 40, 17, 10_000
    data = (
        torch.randint(0, 256, (count * chunk - 5,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy().tobytes()
    )
    first = Receiver(str(tmp_path), killed)
    address = first.start()
    second = Receiver(str(tmp_path), port=address[1])
    counters = []

    def send():
        with Link(address, job=1, token=TOKEN, chunk=chunk, window=8, attempts=30, pace=Pace(60.0, least=60.0)) as link:
            counters.append(link.put(content(data), number=5))

    thread = threading.Thread(target=send)
    thread.start()
    first.process.wait(20)
    second.start()
    assert second.arrived() == (5, hashlib.sha256(data).hexdigest(), count - killed)
    thread.join()
    assert count <= counters[0].chunks <= count + 8  # what was in flight was lost
    assert not list(tmp_path.iterdir())
    first.close()
    second.close()


def written(folder, indices, plan=PLAN):
    """A journal with these chunks in it, closed as by a kill."""
    journal = Journal(folder, plan)
    for index in indices:
        part = memoryview(DATA)[plan.span(index)]
        journal.memory.numpy().data[plan.span(index)] = part
        journal[index] = prepared(plan, index, [part]).digest
    journal.close(keep=True)


@pytest.mark.parametrize("digest", ["sha256", "crc32"])
def test_what_is_there_is_found_again(tmp_path, digest):
    plan = Plan(PLAN.name, PLAN.size, PLAN.chunk, digest)
    written(tmp_path, [0, 3, 9], plan)
    again = Journal(tmp_path, plan)
    assert sorted(again) == [0, 3, 9]
    assert again.memory.numpy().tobytes()[300:400] == DATA[300:400]
    again.close(keep=False)
    assert not list(tmp_path.iterdir())


def test_a_record_that_a_kill_cut_off_does_not_count(tmp_path):
    written(tmp_path, [0, 3])
    (have,) = tmp_path.glob("*.have")
    have.write_bytes(have.read_bytes()[:-1])
    again = Journal(tmp_path, PLAN)
    assert sorted(again) == [0]
    again[4] = bytes(32)
    again.close(keep=True)
    assert (len(have.read_bytes()) - len(b"1000 100 sha256\n")) == 2 * 36


def test_bytes_that_are_not_what_was_written_down_do_not_count(tmp_path):
    written(tmp_path, [0, 3])
    (part,) = tmp_path.glob("*.part")
    changed = bytearray(part.read_bytes())
    changed[350] ^= 1
    part.write_bytes(changed)
    assert sorted(Journal(tmp_path, PLAN)) == [0]


@pytest.mark.parametrize(
    "plan",
    [Plan(PLAN.name, 1001, 100), Plan(PLAN.name, 1000, 99), Plan(PLAN.name, 1000, 100, "crc32"), Plan(Name(1, 2, 4), 1000, 100)],
)
def test_another_stream_starts_anew(tmp_path, plan):
    written(tmp_path, [0, 3])
    again = Journal(tmp_path, plan)
    assert again == {} and len(again.memory) == plan.size


def test_a_void_stream_starts_anew(tmp_path):
    written(tmp_path, [0, 3])
    journal = Journal(tmp_path, PLAN)
    journal.clear()
    journal[5] = bytes(32)
    journal.close(keep=True)
    (have,) = tmp_path.glob("*.have")
    assert have.read_bytes() == b"1000 100 sha256\n" + (5).to_bytes(4, "little") + bytes(32)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TransportError, match="cannot keep 1,000 bytes of a stream"):
        Journal(tmp_path / "file", PLAN)


def test_a_void_stream_that_was_never_closed_leaves_no_hole(tmp_path):
    journal = Journal(tmp_path, PLAN)
    journal[3] = bytes(32)
    journal.clear()
    journal[5] = bytes(32)
    (have,) = tmp_path.glob("*.have")
    assert have.read_bytes() == b"1000 100 sha256\n" + (5).to_bytes(4, "little") + bytes(32)


def test_a_stream_for_which_there_is_no_room_leaves_nothing(tmp_path):
    with pytest.raises(TransportError, match="cannot keep"):
        Journal(tmp_path, Plan(PLAN.name, 1 << 62, 1 << 60))
    assert not list(tmp_path.iterdir())
