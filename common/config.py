"""The settings of a server: INFLASH_* variables, read once in each service's `__main__`.

`inflash serve` turns its options into these variables; `honcho start` takes them from the shell or
a .env file. An unknown INFLASH_ variable or a bad value ends the process, naming the key.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import SettingError
from common.slow import NOT_SLOWED, Slow, parse_slow
from inflash._rundir import default_run_dir

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12} | {
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*$", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes in "7GB", "512MiB" or "1000"; `ValueError` for anything else."""
    match = _SIZE.match(text)
    if not match:
        raise ValueError(f"{text!r} is no size: write 7GB, 512MiB or a number of bytes")
    size = float(match[1]) * _UNITS[(match[2] or "").lower()]
    if size >= 2**63:
        raise ValueError(f"{text[:20]!r} is more than any machine has")
    return int(size)


@dataclass(frozen=True)
class Settings:
    """One server's settings; every field is the variable INFLASH_<FIELD>."""

    store: Path
    run_dir: Path = dataclasses.field(default_factory=default_run_dir)
    memory: int | None = None  # bytes for everything; None: half of the machine's
    cache: str | None = None  # "25%" of the bundles, or a size; None: what memory leaves
    resident: str = "float"  # of attention and head in memory: float, as in the store; int8; int4
    embedding: str = "auto"  # memory; flash: of a token a row is read; auto: flash, unless all of
    # the FFN is cached or the embedding is the head as well
    predictor: str = "auto"  # all, exact, lowrank; auto: lowrank where the store has it
    policy: str = "auto"  # of the cache (common/policy.py): decay, or window; auto: decay unless
    # a window is given
    window: int | None = None  # tokens; None ("auto"): as large as the cache allows; 0: nothing
    # that a token used stays for the next
    slots: str = "global"  # all layers share all; equal: as many in each layer; use: by what a
    # layer's predictor names
    extras: str = "ahead"  # what is computed though not named: none, ahead or resident
    bundling: str = "on"  # off: each part of a bundle is a read of its own, for comparison
    lookahead: str = "auto"  # off: nothing is read before its layer asks; auto: on, but where
    # nearly all is cached
    context: int = 2048  # tokens of prompt and answer, at most what the model can
    sequences: int = 1  # of so many tokens, that the KV cache has room for; shorter ones share it
    block: int | None = None  # tokens of a prompt in one step; None ("auto"): PREFILL_ROWS_MAX, or
    # fewer where memory is short
    reuse: str = "on"  # off: a prompt that begins like a request before is computed whole
    backend: str = "auto"  # how bundles are read: auto, aio or threads
    threads: int = 0  # of compute; 0: as many as there are cores
    awake: str = "auto"  # on: cores do not halt while a request runs; auto: virtual ones, as far
    # as this user may say so
    apart: str = "auto"  # on: compute's first thread has a core of its own; auto: of two, if they
    # are virtual
    trace: str = "on"  # spans of requests that do not say themselves: see common/spans.py
    metrics: str | None = None  # [HOST:]PORT of the gateway's Prometheus metrics; None: none
    slow: Slow = NOT_SLOWED  # made slow on purpose, to see what comes of it
    log_level: str = "info"
    parent: int | None = None  # process id; a service ends when this process is no more its parent


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Settings from the INFLASH_* variables of `environ`; `SettingError` names a bad key."""
    given = {k[8:].lower(): v for k, v in environ.items() if k.startswith("INFLASH_") and v != ""}
    for key in given:
        if key not in _PARSERS:
            known = ", ".join(f"INFLASH_{k.upper()}" for k in _PARSERS)
            raise SettingError(f"INFLASH_{key.upper()}: unknown setting; there are {known}")
    if "store" not in given:
        raise SettingError("INFLASH_STORE: not set; it names the store to serve")
    values: dict[str, Any] = {}
    for key, text in given.items():
        try:
            values[key] = _PARSERS[key](text)
        except ValueError as error:
            raise SettingError(f"INFLASH_{key.upper()}: {error}") from None
    if values.get("policy") == "decay" and values.get("window") is not None:
        raise SettingError(
            f"INFLASH_WINDOW: {given['window']}, but the policy is decay, which has no window:"
            " choose the policy window, or leave one of the two out"
        )
    return Settings(**values)


def _path(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _one_of(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(f"{text!r} is none of {', '.join(names)}")
        return text

    return parse


def _count(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise ValueError(f"{text!r} is no whole number from {minimum} up")
        return int(text)

    return parse


def _block(text: str) -> int | None:
    return None if text == "auto" else _count(1)(text)


def _window(text: str) -> int | None:
    return None if text == "auto" else _count(0)(text)


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is no PORT or HOST:PORT, of a port from 1 to 65535")
    return f"{host or '127.0.0.1'}:{port}"


def _cache(text: str) -> str:
    cache_bytes(text, 1)  # raises for what is no size
    return text


def cache_bytes(text: str, ffn_bytes: int) -> int:
    """Bytes in a cache setting: a share ("25%") of `ffn_bytes`, or a size."""
    if text.endswith("%"):
        try:
            share = float(text[:-1]) / 100
        except ValueError:
            share = -1.0
        if not 0 < share <= 1:
            raise ValueError(f"{text!r} is no share above 0% and up to 100%")
        return int(share * ffn_bytes)
    return parse_size(text)


_PARSERS: dict[str, Callable[[str], object]] = {
    "store": _path,
    "run_dir": _path,
    "memory": parse_size,
    "cache": _cache,
    "resident": _one_of("float", "int8", "int4"),
    "embedding": _one_of("auto", "memory", "flash"),
    "predictor": _one_of("auto", "all", "exact", "lowrank"),
    "policy": _one_of("auto", "window", "decay"),
    "window": _window,
    "slots": _one_of("global", "equal", "use"),
    "extras": _one_of("none", "ahead", "resident"),
    "bundling": _one_of("on", "off"),
    "lookahead": _one_of("auto", "on", "off"),
    "context": _count(1),
    "sequences": _count(1),
    "block": _block,
    "reuse": _one_of("on", "off"),
    "backend": _one_of("auto", "aio", "threads"),
    "threads": _count(0),
    "awake": _one_of("auto", "on", "off"),
    "apart": _one_of("auto", "on", "off"),
    "trace": _one_of("on", "off"),
    "metrics": _address,
    "slow": parse_slow,
    "log_level": _one_of("debug", "info", "warning", "error"),
    "parent": _count(1),
}

assert list(_PARSERS) == [f.name for f in dataclasses.fields(Settings)]
