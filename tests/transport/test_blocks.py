import os
import subprocess
import sys
from pathlib import Path

import pytest

from hanse.core.errors import TransportError
from hanse.transport.blocks import Blocks, attach

CHILD = "import sys; from hanse.transport.blocks import attach; attach(sys.argv[1])[3] = 77"
KILLED = """
import os, signal
from hanse.transport.blocks import Blocks
blocks = Blocks()
print(blocks.take(10).name, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_another_process_writes_where_this_one_reads():
    blocks = Blocks()
    block = blocks.take(100)
    subprocess.run([sys.executable, "-c", CHILD, block.name], check=True)
    assert block.memory[3] == 77
    blocks.close()


def test_blocks_are_lent_again():
    blocks = Blocks()
    one = blocks.take(1 << 20)
    blocks.give_back(one)
    assert blocks.take(1 << 19) is one
    assert blocks.take(10) is not one
    blocks.close()


def test_what_is_too_small_does_not_stay():
    blocks = Blocks()
    small = blocks.take(10)
    blocks.give_back(small)
    blocks.take(1 << 20)
    assert not Path(small.name).exists()
    blocks.close()


def test_nothing_is_left_when_closed_but_what_is_mapped():
    blocks = Blocks()
    block = blocks.take(10)
    block.memory[0] = 5
    blocks.close()
    assert not blocks.folder.exists() and block.memory[0] == 5
    with pytest.raises(TransportError, match="no such block"):
        attach(block.name)


def test_what_a_killed_process_left_is_removed_by_the_next():
    left = Path(subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True).stdout.strip())
    assert left.exists()
    mine = Blocks()
    assert not left.parent.exists() and mine.folder.exists()
    other = Blocks()
    assert mine.folder.exists()
    mine.close()
    other.close()


def test_too_little_memory_is_said_before_it_is_used():
    blocks = Blocks()
    everything = os.statvfs(blocks.folder).f_blocks * os.statvfs(blocks.folder).f_frsize
    with pytest.raises(TransportError, match="no room for"):
        blocks.take(2 * everything)
    blocks.close()


def test_only_blocks_are_attached(tmp_path):
    (tmp_path / "file").write_bytes(b"secret")
    with pytest.raises(TransportError, match="no such block"):
        attach(str(tmp_path / "file"))
