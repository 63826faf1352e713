"""Messages as ZeroMQ frames: a frozen dataclass in, frames out, and back, checked.

The bytes of a message:

    frame 0      msgpack array: [VERSION, tag, field, field, ...] in the dataclass's order
    frame 1...   one raw frame for each field annotated `Raw`, in the same order

`Codec` refuses whatever is not exactly that: another version, a tag that is not in its table, a
missing or surplus field or frame, a field of the wrong type. It never calls by a received name.
"""

from __future__ import annotations

import dataclasses
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgpack

VERSION = 1

Raw = bytes | memoryview
"""A field that travels as a frame of its own, uncopied: array bytes whose dtype the field names."""

Check = Callable[[Any], Any]


class BadMessage(ValueError):  # noqa: N818
    """Frames that are not a message of this codec; the text says what is wrong.

    `tag` and `decoded` are what could be read before that, so that a request with one bad field
    can be refused by its number. Both are empty where nothing could be read.
    """

    def __init__(self, reason: str, tag: str = "", decoded: Mapping[str, Any] | None = None):
        super().__init__(reason)
        self.tag = tag
        self.decoded = decoded or {}


class Codec:
    """The closed set of messages that one link carries."""

    def __init__(self, *message_types: type) -> None:
        self._fields = {t.__name__: (t, _fields_of(t)) for t in message_types}

    def encode(self, message: Any) -> list[Raw]:
        """Frames of `message`; `TypeError` if its type is not one of this codec's."""
        tag = type(message).__name__
        if tag not in self._fields or type(message) is not self._fields[tag][0]:
            raise TypeError(f"{tag} is no message of this link: {', '.join(self._fields)}")
        header: list[Any] = [VERSION, tag]
        raws: list[Raw] = []
        for name, check in self._fields[tag][1]:
            value = getattr(message, name)
            if check is None:
                raws.append(value)
            else:
                header.append(value)
        return [msgpack.packb(header, default=_pack_dataclass), *raws]

    def decode(self, frames: Sequence[Raw]) -> Any:
        """The message in `frames`; raises `BadMessage`, and nothing else, for anything amiss."""
        if not frames:
            raise BadMessage("no frames")
        tag, values = _open_header(frames[0])
        if tag not in self._fields:
            raise BadMessage(f"unknown tag {_show(tag)}")
        message_type, fields = self._fields[tag]
        raw_count = sum(check is None for _, check in fields)
        if len(values) != len(fields) - raw_count or len(frames) != 1 + raw_count:
            raise BadMessage(f"{tag}: {len(values)} fields and {len(frames) - 1} raw frames")
        packed, raws = iter(values), iter(frames[1:])
        decoded: dict[str, Any] = {}
        for name, check in fields:
            try:
                decoded[name] = check(next(packed)) if check else next(raws)
            except (TypeError, ValueError, OverflowError) as error:
                raise BadMessage(f"{tag}.{name}: {error}", tag, decoded) from None
        try:
            return message_type(**decoded)
        except ValueError as error:  # a message may check its own values when it is made
            raise BadMessage(f"{tag}: {error}", tag, decoded) from None


def _open_header(frame: Raw) -> tuple[str, list[Any]]:
    header = _unpack(frame)
    if not isinstance(header, list) or len(header) < 2:
        raise BadMessage("the header is no array of version, tag and fields")
    version, tag, *values = header
    if version != VERSION or type(version) is not int:
        raise BadMessage(f"protocol version {_show(version)}, expected {VERSION}")
    if not isinstance(tag, str):
        raise BadMessage(f"unknown tag {_show(tag)}")
    return tag, values


def _show(value: Any) -> str:
    """What a stranger sent, for an error: short, and no deeper than reprlib's few levels."""
    return reprlib.repr(value)[:60]


def _unpack(frame: Raw) -> Any:
    try:
        return msgpack.unpackb(frame, strict_map_key=True, use_list=True)
    except Exception as error:  # msgpack's own error tree is not closed: random bytes raise five
        raise BadMessage(f"not msgpack: {type(error).__name__}") from None


def _pack_dataclass(value: Any) -> list[Any]:
    return [getattr(value, f.name) for f in dataclasses.fields(value)]


def _fields_of(message_type: type) -> list[tuple[str, Check | None]]:
    hints = typing.get_type_hints(message_type)
    return [
        (f.name, None if hints[f.name] == Raw else _check_for(hints[f.name]))
        for f in dataclasses.fields(message_type)
    ]


def _check_for(hint: Any) -> Check:
    if hint in _SCALARS:
        return _SCALARS[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _union_check(args)
    if origin is tuple and args[1:] == (Ellipsis,):
        return _tuple_check(_check_for(args[0]))
    if origin is dict and args[0] is str:
        return _dict_check(_check_for(args[1]))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _dataclass_check(hint)
    raise TypeError(f"{hint} has no form on the wire")


def _int(value: Any) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise TypeError(f"{_show(value)} is no 64-bit integer")
    return value


def _float(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"{_show(value)} is no number")
    return float(value)


def _exactly(expected: type) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not expected:
            raise TypeError(f"{_show(value)} is no {expected.__name__}")
        return value

    return check


_SCALARS: dict[Any, Check] = {
    int: _int,
    float: _float,
    str: _exactly(str),
    bool: _exactly(bool),
    bytes: _exactly(bytes),
    type(None): _exactly(type(None)),
    Any: lambda value: value,
}


def _union_check(args: tuple[Any, ...]) -> Check:
    checks = [_check_for(a) for a in args]

    def check(value: Any) -> Any:
        for option in checks:
            try:
                return option(value)
            except (TypeError, ValueError):
                continue
        raise TypeError(f"{_show(value)} is of none of the allowed types")

    return check


def _tuple_check(item: Check) -> Check:
    def check(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise TypeError(f"{_show(value)} is no array")
        return tuple(item(v) for v in value)

    return check


def _dict_check(item: Check) -> Check:
    def check(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
            raise TypeError(f"{_show(value)} is no map of names")
        return {k: item(v) for k, v in value.items()}

    return check


def _dataclass_check(nested: type) -> Check:
    fields = _fields_of(nested)

    def check(value: Any) -> Any:
        if not isinstance(value, list) or len(value) != len(fields):
            raise TypeError(f"{_show(value)} is no {nested.__name__}")
        pairs = zip(fields, value, strict=True)
        return nested(**{name: one(v) for (name, one), v in pairs if one is not None})

    return check
