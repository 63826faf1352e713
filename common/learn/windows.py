"""Text files become windows of token ids, spread over all of the text; and windows are split.

A window begins as a prompt does, with the tokens that the tokenizer puts first. Documents follow
each other in the text, the model's end token between them. The same files give the same windows.
Refuses files that are missing, empty or no UTF-8 text, and less text than one window takes.
"""

from __future__ import annotations

import codecs
import itertools
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from common.errors import UserError
from common.store.store import Store, read_end_ids

CHUNK_BYTES = 16 << 10  # of text, tokenised at once
# Of text that is much longer than asked for, evenly spaced chunks are read, not all of it.
_TEXT_BYTES_PER_TOKEN = 16
_TEXT_BYTES_MIN = 256 << 10
_SNIFF_BYTES = 4096  # from the beginning of a file in a folder: is it text?
_BATCH_CHUNKS = 64  # tokenised in parallel


@dataclass(frozen=True)
class Windows:
    """Token ids, int32 [count, length]; `note` is a sentence if there are fewer than asked for."""

    ids: npt.NDArray[np.int32]
    note: str | None


@dataclass(frozen=True)
class _Chunk:
    path: Path
    start: int  # bytes
    size: int


def windows_of(store: Store, texts: Sequence[Path], tokens: int, length: int) -> Windows:
    """About `tokens` tokens of the files `texts`, in windows of `length`, as the store's tokenizer
    gives them. A folder stands for every text file in it, hidden ones left out.

    `UserError` names a file that cannot be used, or says that there is too little text, that
    windows are longer than the model's context, or that the store has no tokenizer.
    """
    tokenizer, config = _read_tokenizer(store), json.loads(_config_text(store))
    context = config.get("max_position_embeddings", length)
    prefix = _prefix(tokenizer)
    body = length - len(prefix)
    if body < 1 or length > context:
        raise UserError(f"windows have {len(prefix) + 1} to {context:,} tokens, not {length:,}")
    chunks = _choose(_chunks(texts), max(_TEXT_BYTES_PER_TOKEN * tokens, _TEXT_BYTES_MIN))
    separator = sorted(read_end_ids(store.config_dir))[:1]
    stream = np.frombuffer(_encode(tokenizer, chunks, separator), np.int32)
    available, wanted = len(stream) // body, max(1, tokens // length)
    if not available:
        raise UserError(
            f"the text has {len(stream):,} tokens, fewer than one window of {length:,}: give more"
            " text, or shorter windows"
        )
    if len(stream) and int(stream.max()) >= config["vocab_size"]:
        raise UserError(
            f"the tokenizer of {store.path} gives token {stream.max()}, but the model's vocabulary"
            f" has {config['vocab_size']:,}: they do not belong together"
        )
    count = min(wanted, available)
    chosen = np.arange(count) * available // count
    bodies = stream[: available * body].reshape(available, body)[chosen]
    ids = np.concatenate([np.tile(np.array(prefix, np.int32), (count, 1)), bodies], axis=1)
    note = None
    if count < wanted:
        note = (
            f"the text has {count * length:,} tokens in windows of {length:,}, not the"
            f" {wanted * length:,} asked for"
        )
    return Windows(np.ascontiguousarray(ids, np.int32), note)


def split(count: int, share: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Numbers of windows, ascending: those left, and those taken for validation, every k-th, so
    that about `share` of `count` are taken, and at least one. `UserError` if one side is empty."""
    if not 0 < share <= 0.5:
        raise ValueError(f"a share of {share} is not in 0 to 0.5")
    if count < 2:
        raise UserError("one window cannot be split: give more text, or shorter windows")
    every = min(round(1 / share), count)
    taken = np.arange(count) % every == every - 1
    return np.flatnonzero(~taken), np.flatnonzero(taken)


def _config_text(store: Store) -> str:
    return (store.config_dir / "config.json").read_text(encoding="utf-8")


def _read_tokenizer(store: Store) -> Tokenizer:
    path = store.config_dir / "tokenizer.json"
    if not path.exists():
        raise UserError(
            f"the store {store.path} has no tokenizer, so it cannot read text: convert a checkpoint"
            " that has one"
        )
    tokenizer = Tokenizer.from_file(str(path))
    # What a training set-up may have left in the file.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _prefix(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before any text: a begin token, for some models."""
    encoding = tokenizer.encode("a")
    pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return [token for token, special in itertools.takewhile(lambda pair: pair[1], pairs)]


def _chunks(texts: Sequence[Path]) -> list[_Chunk]:
    chunks = []
    for path in texts:
        files = _walk(path) if path.is_dir() else [path]
        for file in files:
            size = _size(file)
            for start in range(0, size, CHUNK_BYTES):
                chunks.append(_Chunk(file, start, min(CHUNK_BYTES, size - start)))
    return chunks


def _walk(folder: Path) -> list[Path]:
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if not any(name.startswith(".") for name in path.relative_to(folder).parts)
        and path.is_file()
        and _looks_like_text(path)
    ]
    if not found:
        raise UserError(f"the folder {folder} has no text files")
    return found


def _looks_like_text(path: Path) -> bool:
    with path.open("rb") as file:
        begin = file.read(_SNIFF_BYTES)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(begin)
    except UnicodeDecodeError:
        return False
    return bool(begin) and b"\0" not in begin


def _size(path: Path) -> int:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"the text {path} cannot be read: {error.strerror}") from None
    if not size:
        raise UserError(f"the text {path} is empty")
    return size


def _choose(chunks: list[_Chunk], bytes_max: int) -> list[_Chunk]:
    """All chunks, or so many of them, evenly spaced, as make about `bytes_max`."""
    total_bytes = sum(chunk.size for chunk in chunks)
    if total_bytes <= bytes_max:
        return chunks
    count = max(1, len(chunks) * bytes_max // total_bytes)
    return [chunks[i * len(chunks) // count] for i in range(count)]


def _encode(tokenizer: Tokenizer, chunks: list[_Chunk], separator: list[int]) -> array[int]:
    """The chunks' token ids, int32, one after the other, `separator` between documents.

    A word that a chunk's end cuts becomes other tokens: one in some thousands.
    """
    ids = array("i")
    before: _Chunk | None = None
    for first in range(0, len(chunks), _BATCH_CHUNKS):
        some = chunks[first : first + _BATCH_CHUNKS]
        encodings = tokenizer.encode_batch(list(_decode(some)), add_special_tokens=False)
        for chunk, encoding in zip(some, encodings, strict=True):
            if before and (before.path, before.start + before.size) != (chunk.path, chunk.start):
                ids.extend(separator)
            ids.extend(encoding.ids)
            before = chunk
    return ids


def _decode(chunks: Sequence[_Chunk]) -> Iterator[str]:
    for chunk in chunks:
        try:
            with chunk.path.open("rb") as file:
                file.seek(chunk.start)
                raw = file.read(chunk.size + 3)
        except OSError as error:
            raise UserError(f"the text {chunk.path} cannot be read: {error.strerror}") from None
        # A character that a chunk's edge cuts belongs to the chunk that it begins in.
        begin = _continued(raw, 0) if chunk.start else 0
        raw = raw[begin : _continued(raw, min(chunk.size, len(raw)))]
        try:
            if b"\0" in raw:
                raise UnicodeDecodeError("utf-8", raw, raw.index(b"\0"), len(raw), "zero byte")
            yield raw.decode("utf-8")
        except UnicodeDecodeError as error:
            where = chunk.start + begin + error.start
            raise UserError(
                f"the text {chunk.path} is no UTF-8 text: {error.reason} at byte {where:,}"
            ) from None


def _continued(raw: bytes, place: int) -> int:
    """Where the character ends that byte `place` is the middle of, or `place`: it is of none."""
    end = place
    while end < len(raw) and end < place + 3 and raw[end] & 0xC0 == 0x80:
        end += 1
    return end
