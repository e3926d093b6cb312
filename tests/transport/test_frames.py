import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.core.errors import CodecError
from hanse.transport.frames import (
    ACK,
    CONTROL,
    HEADER,
    INLINE,
    LONGEST_CONTROL,
    MAGIC,
    MOST_CHUNKS,
    SHARED,
    UCX,
    Ack,
    Frame,
    Name,
    control,
    said,
)

u32 = st.integers(0, 2**32 - 1)
names = st.builds(Name, st.integers(0, 2**64 - 1), u32, u32.filter(lambda n: n != MAGIC))
frames = st.integers(1, MOST_CHUNKS).flatmap(
    lambda count: st.builds(
        Frame,
        st.sampled_from([INLINE, SHARED, UCX]),
        st.integers(0, 2**16 - 1),
        names,
        st.integers(0, count - 1),
        st.just(count),
        st.integers(1, 1 << 30),
        u32,
    )
)
acks = st.builds(Ack, u32.filter(lambda n: n != MAGIC), u32, st.integers(0, 2**64 - 1))


def test_the_layout():
    data = Frame(INLINE, 3, Name(0x0102030405060708, 9, 10), 11, 12, 13, 14).pack()
    assert data.hex() == "f1686e73010003000807060504030201090000000a0000000b0000000c0000000d0000000e000000"
    assert Ack(10, 2, 4).pack().hex() == "0a000000020000000400000000000000"


@given(frames)
def test_a_header_is_forty_bytes_that_are_read_back(frame):
    assert len(frame.pack()) == HEADER.size == 40
    assert Frame.parse(frame.pack()) == frame


@given(acks)
def test_an_acknowledgement_is_sixteen_bytes_that_are_read_back(ack):
    assert len(ack.pack()) == ACK.size == 16
    assert Ack.parse(ack.pack()) == ack


@given(st.binary(max_size=60) | st.binary(min_size=36, max_size=36).map(lambda b: MAGIC.to_bytes(4, "little") + b))
def test_whatever_else_arrives_is_refused(data):
    for kind in (Frame, Ack):
        try:
            found = kind.parse(data)
        except CodecError:
            continue
        assert found.pack() == data


@given(frames, st.integers(0, 39), st.integers(0, 255))
def test_a_changed_header_is_refused_or_another(frame, at, value):
    data = bytearray(frame.pack())
    data[at] = value
    try:
        found = Frame.parse(data)
    except CodecError:
        return
    assert found.pack() == data


@given(names, st.dictionaries(st.text(max_size=5).filter(lambda k: k != "say"), st.integers() | st.text(max_size=9), max_size=3))
def test_control_messages_are_read_back(name, fields):
    data = control(name, "open", **fields) if "name" not in fields else control(name, "open")
    frame = Frame.parse(data[:40])
    message = said(frame, data[40:])
    assert (message.name, message.say) == (name, "open") and frame.flags == CONTROL


@given(st.data())
def test_damaged_control_messages_are_refused(data):
    whole = bytearray(control(Name(1, 2, 3), "open", size=5))
    at = data.draw(st.integers(8, len(whole) - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(CodecError):
        frame = Frame.parse(whole[:40])
        if frame.length > len(whole) - 40:
            raise CodecError("there is no end of it")
        said(frame, whole[40 : 40 + frame.length])


@pytest.mark.parametrize("text", [b"[]", b"{}", b"{", b'{"say": 3}', b"\xff", b"[" * 100_000])
def test_other_texts_are_no_control_messages(text):
    frame = Frame(
        CONTROL,
        0,
        Name(1, 2, 3),
        0,
        0,
        len(text),
        zlib.crc32(text, zlib.crc32(Frame(0, 0, Name(1, 2, 3), 0, 0, len(text), 0).pack()[8:36])),
    )
    with pytest.raises(CodecError, match="not a control message"):
        said(frame, text)


def test_fields_are_of_the_type_asked_for():
    data = control(Name(1, 2, 3), "open", size=True, text="a")
    message = said(Frame.parse(data[:40]), data[40:])
    assert message.get("text", str) == "a"
    for field in ("size", "text", "none"):
        with pytest.raises(CodecError, match=f"open: {field} is"):
            message.get(field, int)


def test_long_control_messages_are_not_made_and_not_read():
    with pytest.raises(CodecError, match="at most"):
        control(Name(1, 2, 3), "open", text="x" * LONGEST_CONTROL)
    with pytest.raises(CodecError, match="at most"):
        Frame.parse(Frame(CONTROL, 0, Name(1, 2, 3), 0, 0, LONGEST_CONTROL + 1, 0).pack())
