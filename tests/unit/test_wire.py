"""Frames: what goes in comes out, and whatever else comes in is only ever `BadMessage`."""

from __future__ import annotations

import contextlib
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common import messages
from common.links import LINKS
from inflash import _messages as wire
from inflash._wire import VERSION, BadMessage, Codec

I64 = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
RAW = st.binary(max_size=40)

SAMPLINGS = st.builds(
    wire.Sampling,
    max_new_tokens=st.integers(1, 2**31),
    temperature=st.just(0.0) | st.floats(0.01, 100),
    top_k=st.integers(0, 2**31),
    top_p=st.floats(0, 1, exclude_min=True),
    repetition_penalty=st.floats(0.01, 100),
    seed=st.none() | st.integers(0, 2**63 - 1),
    stop=st.lists(st.text("ab€", min_size=1, max_size=9), max_size=16).map(tuple),
    ignore_eos=st.booleans(),
    forced=st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple),
)
STATS = st.builds(
    wire.Stats,
    **{
        name: (FLOATS if kind == "float" else I64)
        for name, kind in wire.Stats.__annotations__.items()
    },
)
PROMPTS = (
    TEXT
    | st.lists(I64, max_size=9).map(tuple)
    | st.lists(st.dictionaries(TEXT, TEXT), min_size=1, max_size=3).map(tuple)
)

CLIENT_MESSAGES = st.one_of(
    st.builds(wire.Generate, I64, PROMPTS, SAMPLINGS, st.booleans()),
    st.builds(wire.Cancel, I64),
    st.builds(wire.Status, I64),
    st.builds(wire.Waiting, I64, I64),
    st.builds(wire.Prefilling, *[I64] * 6, FLOATS),
    st.builds(wire.Token, I64, I64, TEXT, FLOATS, RAW),
    st.builds(wire.Finished, I64, TEXT, TEXT, STATS),
    st.builds(wire.Failed, I64, TEXT, TEXT, st.booleans()),
    st.builds(wire.StatusReply, I64, st.dictionaries(TEXT, TEXT | I64 | st.none())),
)
SERVICE_MESSAGES = st.one_of(
    st.builds(messages.Admit, I64, SAMPLINGS, st.booleans(), RAW),
    st.builds(messages.Prefilling, *[I64] * 6, FLOATS),
    st.builds(messages.Token, I64, I64, I64, FLOATS, RAW),
    st.builds(messages.Done, I64, TEXT, TEXT, TEXT, STATS),
    st.builds(messages.Health, TEXT, I64, FLOATS, I64, st.dictionaries(TEXT, I64)),
    st.builds(
        messages.Predict,
        *[st.lists(I64, max_size=9).map(tuple)] * 2,
        *[I64] * 2,
        *[st.booleans()] * 2,
        RAW,
    ),
    st.builds(messages.Fetch, *[I64] * 3, st.booleans(), I64, RAW),
    st.builds(messages.Resident, *[I64] * 5, st.booleans(), *[I64] * 9, RAW, RAW),
)
CODECS = [wire.CLIENT_CODEC, *(spec.codec for spec in LINKS.values())]


def codec_of(message: Any) -> Codec:
    for codec in CODECS:
        with contextlib.suppress(TypeError):
            codec.encode(message)
            return codec
    raise AssertionError(message)


@given(CLIENT_MESSAGES | SERVICE_MESSAGES)
def test_round_trip(message: Any) -> None:
    codec = codec_of(message)
    assert codec.decode(codec.encode(message)) == message


@given(st.lists(st.binary(max_size=60), max_size=4))
@example([msgpack.packb([VERSION, "Cancel", [[]]])])
@example([])
def test_random_frames_are_bad_messages(frames: list[bytes]) -> None:
    for codec in CODECS:
        with contextlib.suppress(BadMessage):
            codec.decode(frames)


@given(CLIENT_MESSAGES | SERVICE_MESSAGES, st.data())
def test_mutated_frames_decode_or_are_bad_messages(message: Any, data: st.DataObject) -> None:
    codec = codec_of(message)
    frames = [bytes(f) for f in codec.encode(message)]
    at = data.draw(st.integers(0, len(frames) - 1))
    cut = data.draw(st.integers(0, len(frames[at])))
    frames[at] = frames[at][:cut] + data.draw(st.binary(max_size=4)) + frames[at][cut + 1 :]
    frames += data.draw(st.lists(RAW, max_size=1))
    with contextlib.suppress(BadMessage):
        codec.decode(frames)


@given(st.recursive(I64 | TEXT | st.none() | st.booleans() | FLOATS | RAW, st.lists, max_leaves=9))
def test_a_field_of_another_type_is_refused(value: Any) -> None:
    frames = [msgpack.packb([VERSION, "Cancel", value])]
    if type(value) is int:
        assert wire.CLIENT_CODEC.decode(frames) == wire.Cancel(value)
    else:
        with pytest.raises(BadMessage):
            wire.CLIENT_CODEC.decode(frames)


def test_depth_and_length_of_a_strangers_value_are_not_ours() -> None:
    deep = b"\x91" * 1000 + b"\x90"
    for value in (deep, msgpack.packb("x" * 1_000_000)):
        header = b"\x93" + msgpack.packb(VERSION) + msgpack.packb("Cancel") + value
        with pytest.raises(BadMessage) as bad:
            wire.CLIENT_CODEC.decode([header])
        assert len(str(bad.value)) < 200


def test_another_version_an_unknown_tag_and_a_surplus_frame_are_refused() -> None:
    def refused(*header: Any, frames: tuple[bytes, ...] = ()) -> str:
        with pytest.raises(BadMessage) as bad:
            wire.CLIENT_CODEC.decode([msgpack.packb(header), *frames])
        return str(bad.value)

    assert "protocol version 2, expected 1" in refused(2, "Cancel", 1)
    assert "protocol version True" in refused(True, "Cancel", 1)
    assert "unknown tag 'Admit'" in refused(1, "Admit", 1)
    assert "Cancel: 1 fields and 1 raw frames" in refused(1, "Cancel", 1, frames=(b"",))
    assert "Cancel: 2 fields" in refused(1, "Cancel", 1, 2)


def test_a_bad_field_still_tells_the_request() -> None:
    good = wire.CLIENT_CODEC.encode(wire.Generate(7, "a", wire.Sampling(), False))
    header = msgpack.unpackb(good[0])
    header[4][1] = -1.0
    with pytest.raises(BadMessage, match=r"temperature=-1.0: it must be 0") as bad:
        wire.CLIENT_CODEC.decode([msgpack.packb(header)])
    assert bad.value.tag == "Generate"
    assert bad.value.decoded["request"] == 7


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0},
        {"temperature": float("nan")},
        {"temperature": 1e-30},
        {"top_p": 0.0},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"stop": ("",)},
        {"stop": ("a",) * 17},
    ],
)
def test_sampling_out_of_range_names_its_field(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        wire.Sampling(**bad)


def test_a_message_of_another_link_is_a_bug() -> None:
    with pytest.raises(TypeError, match="Admit is no message of this link"):
        wire.CLIENT_CODEC.encode(messages.Admit(1, wire.Sampling(), False, b""))
