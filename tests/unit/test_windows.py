"""Text becomes windows of token ids: all of it is drawn on, and what is no text is named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from common.errors import UserError
from common.learn.windows import CHUNK_BYTES, split, windows_of
from common.store.store import Store
from tests.checkpoints import EOS, VOCAB
from tests.conftest import Made

LENGTH = 32


def text_file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def numbered(count: int) -> str:
    """A text in which every place can be told: lines of 8 bytes, which no chunk's edge cuts."""
    return "".join(f"{i:07}\n" for i in range(count))


def tokenizer_of(store: Store) -> Tokenizer:
    return Tokenizer.from_file(str(store.config_dir / "tokenizer.json"))


@pytest.fixture
def store(made: Made) -> Store:
    return made.store("opt")


@pytest.fixture
def own_store(store: Store, tmp_path: Path) -> Store:
    shutil.copytree(store.path, tmp_path / "store")
    return Store.open(tmp_path / "store")


def test_enough_tokens_give_all_of_the_text_in_order(store: Store, tmp_path: Path) -> None:
    text = numbered(500)
    windows = windows_of(store, [text_file(tmp_path, "a.txt", text)], 10_000_000, LENGTH)
    assert windows.ids.shape[1] == LENGTH
    assert windows.ids.dtype == np.int32
    decoded = tokenizer_of(store).decode(windows.ids.flatten().tolist())
    assert text.startswith(decoded)
    assert len(decoded) > len(text) - 8 * LENGTH
    assert f"{windows.ids.size:,} tokens" in str(windows.note)


@pytest.mark.parametrize("numbers", [500, 60_000], ids=["whole", "in-part"])
def test_few_tokens_are_taken_from_all_over_the_text(
    store: Store, tmp_path: Path, numbers: int
) -> None:
    path = text_file(tmp_path, "a.txt", numbered(numbers))
    windows = windows_of(store, [path], 12 * LENGTH, LENGTH)
    assert windows.ids.shape == (12, LENGTH)
    assert windows.note is None
    assert np.array_equal(windows_of(store, [path], 12 * LENGTH, LENGTH).ids, windows.ids)
    tokenizer = tokenizer_of(store)
    decoded = [tokenizer.decode(row.tolist()) for row in windows.ids]
    places = [int(re.findall(r"(\d{7})\n", text)[0]) / numbers for text in decoded]
    assert places[0] < 0.1
    assert places[-1] > 0.85
    assert max(np.diff(places)) < 0.2


def test_a_character_on_the_edge_of_a_chunk_is_kept(store: Store, tmp_path: Path) -> None:
    text = "x" + "é€" * (CHUNK_BYTES // 2)
    path = text_file(tmp_path, "a.txt", text)
    windows = windows_of(store, [path], 10_000_000, LENGTH)
    decoded = tokenizer_of(store).decode(windows.ids.flatten().tolist())
    assert text.startswith(decoded.rstrip("\N{REPLACEMENT CHARACTER}"))
    assert len(decoded) > len(text) - 2 * LENGTH


def test_the_end_token_stands_between_documents(store: Store, tmp_path: Path) -> None:
    paths = [text_file(tmp_path, f"{i}.txt", "word " * 20) for i in range(5)]
    ids = windows_of(store, paths, 10_000_000, LENGTH).ids.flatten().tolist()
    alone = tokenizer_of(store).encode("word " * 20).ids
    assert ids[: len(alone) + 1] == [*alone, EOS]
    assert ids.count(EOS) == (len(ids) - 1) // (len(alone) + 1)


def test_every_window_begins_as_a_prompt_does(own_store: Store, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(own_store)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(own_store.config_dir / "tokenizer.json"))
    text = numbered(100)
    ids = windows_of(own_store, [text_file(tmp_path, "a.txt", text)], 10_000_000, LENGTH).ids
    assert (ids[:, 0] == 0).all()
    assert 0 not in ids[:, 1:]
    assert text.startswith(tokenizer.decode(ids[:, 1:].flatten().tolist()))


def test_a_folder_stands_for_its_text_files(store: Store, tmp_path: Path) -> None:
    text_file(tmp_path, "b/deep/second.py", "second " * 40)
    text_file(tmp_path, "b/deep/picture.png", b"\x89PNG\r\n\x1a\n" + bytes(300))
    text_file(tmp_path, "b/first.md", "first " * 40)
    text_file(tmp_path, "b/empty.txt", "")
    text_file(tmp_path, "b/.git/config", "hidden " * 40)
    windows = windows_of(store, [tmp_path / "b"], 10_000_000, LENGTH)
    decoded = tokenizer_of(store).decode(windows.ids.flatten().tolist())
    assert "first first" in decoded
    assert "second second" in decoded
    assert "hidden" not in decoded
    assert "PNG" not in decoded


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.txt", None, "missing.txt cannot be read: No such file"),
        ("empty.txt", b"", "empty.txt is empty"),
        ("latin.txt", b"caf\xe9 " * 50, "latin.txt is no UTF-8 text: .* at byte 3"),
        ("late.txt", b"a" * 40_000 + b"\xff" + b"a" * 99, "late.txt is no .* at byte 40,000"),
        ("cut.txt", b"a" * 99 + "é".encode()[:1], "cut.txt is no .* at byte 99"),
        ("zero.txt", b"ab\0" * 50, "zero.txt is no UTF-8 text: zero byte at byte 2"),
        ("short.txt", b"few words", "fewer than one window"),
    ],
)
def test_what_cannot_be_used_is_named(
    store: Store, tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    good = text_file(tmp_path, "good.txt", "x")
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=reason):
        windows_of(store, [good, path], 1000, LENGTH)


def test_a_folder_without_text_is_refused(store: Store, tmp_path: Path) -> None:
    text_file(tmp_path, "f/data.bin", bytes(99))
    with pytest.raises(UserError, match="has no text files"):
        windows_of(store, [tmp_path / "f"], 1000, LENGTH)


@pytest.mark.parametrize("length", [0, 513])
def test_windows_fit_the_models_context(store: Store, tmp_path: Path, length: int) -> None:
    with pytest.raises(UserError, match="1 to 512 tokens, not"):
        windows_of(store, [text_file(tmp_path, "a.txt", numbered(999))], 1000, length)


def test_a_store_without_a_tokenizer_says_so(own_store: Store, tmp_path: Path) -> None:
    (own_store.config_dir / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        windows_of(own_store, [text_file(tmp_path, "a.txt", "text")], 1000, LENGTH)


def test_a_tokenizer_of_another_model_is_refused(own_store: Store, tmp_path: Path) -> None:
    config = own_store.config_dir / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 50}))
    with pytest.raises(UserError, match="vocabulary has 50"):
        windows_of(own_store, [text_file(tmp_path, "a.txt", numbered(99))], 1000, LENGTH)
    assert VOCAB > 50


@pytest.mark.parametrize(
    ("count", "share", "taken"),
    [(10, 0.2, [4, 9]), (3, 0.1, [2]), (2, 0.5, [1]), (7, 0.34, [2, 5])],
)
def test_a_split_takes_every_kth_window(count: int, share: float, taken: list[int]) -> None:
    left, found = split(count, share)
    assert found.tolist() == taken
    assert sorted([*left, *found]) == list(range(count))


def test_one_window_is_not_split() -> None:
    with pytest.raises(UserError, match="cannot be split"):
        split(1, 0.1)
