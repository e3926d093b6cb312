import pytest

from hanse.core.errors import TransportError
from hanse.transport.peers import Link, Listener
from hanse.transport.sources import content
from tests.transport.processes import TOKEN


def test_a_port_that_cannot_be():
    address = ("127.0.0.1", 70_000)
    with pytest.raises(TransportError, match=r"address: cannot listen at .*70000"):
        Listener(address, job=1, token=TOKEN)
    with Link(address, job=1, token=TOKEN) as link, pytest.raises(TransportError, match=r"address: .*70000.*port must be"):
        link.put(content(b"x"))
