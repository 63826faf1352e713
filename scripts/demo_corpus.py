"""The demo models' text: gathered from the running interpreter, tokenised, cut into batches.

Owns the settings that decide a demo model, the choice of source files (standard library and
site-packages, without tests, tables and generated files), the tokenizer's training, the token
cache in the work folder, and the training windows. Files are held out whole, by the hash of their
relative path. Refuses: a cache made with other settings, and too little text.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import keyword
import sysconfig
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

Tokens = npt.NDArray[np.uint16]

END = "<|endoftext|>"
OPENERS = ("def", "class", "import", "from")
TRAIN_TOKENS_MIN = 1_000_000
SAMPLE_CHARACTERS = 1_500_000  # about 400,000 tokens
HELD_OUT_EVERY = 50  # one file in so many, chosen by the hash of its relative path
FILE_BYTES_MIN, FILE_BYTES_MAX = 500, 150_000
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "_vendor"}
)


@dataclass(frozen=True)
class Settings:
    """What decides the result. Kept with corpus and checkpoint, which refuse other values."""

    vocab: int = 2048
    hidden: int = 256
    layers: int = 8
    heads: int = 4
    ffn: int = 1024
    context: int = 1024
    corpus_bytes_max: int = 40_000_000
    package_bytes_max: int = 6_000_000
    batch_tokens: int = 4096
    context_short: int = 256  # most steps: attention over short windows costs less
    long_every: int = 4  # one step in so many has windows of the full context
    lr_matrix: float = 0.02
    lr_other: float = 0.004
    decay_share: float = 0.5
    target_first: float = 0.10  # active fraction wanted in layer 0, and in the others
    target_rest: float = 0.075
    split_share: float = 0.02  # of ' name' tokens
    split_share_keyword: float = 0.4  # of those after a keyword
    opener_share: float = 0.5  # of windows
    seed: int = 7

    def target(self, layer: int) -> float:
        return self.target_rest if layer else self.target_first


@dataclass(frozen=True)
class GatedSettings(Settings):
    """A smaller model of the Llama class; its attention is narrow so that most of it is FFN."""

    hidden: int = 192
    layers: int = 6
    ffn: int = 576
    kv_heads: int = 2
    head_dim: int = 32
    target_first: float = 0.07
    target_rest: float = 0.06


def looks_written(text: str) -> bool:
    """False for tables, data and generated files: a small model learns nothing from them."""
    lines = text.splitlines()
    head = text[:2000].lower()
    digits = sum(map(str.isdigit, text))
    return (
        max(map(len, lines)) <= 400
        and len(text) <= 70 * len(lines)
        and digits <= 0.1 * len(text)
        and len(text.encode()) <= 1.05 * len(text)
        and not any(mark in head for mark in ("automatically generated", "do not edit"))
    )


def read_sources() -> dict[str, str]:
    """Relative path -> text of every usable file, in sorted order, each content once."""
    texts: dict[str, str] = {}
    seen: set[bytes] = set()
    for kind, key in (("stdlib", "stdlib"), ("site-packages", "purelib")):
        root = Path(sysconfig.get_path(key))
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if SKIPPED_FOLDERS.intersection(relative.parts) or path.name.startswith("test_"):
                continue
            data = path.read_bytes()
            digest = hashlib.sha256(data).digest()
            if not FILE_BYTES_MIN <= len(data) <= FILE_BYTES_MAX or digest in seen:
                continue
            seen.add(digest)
            try:
                text = data.decode().replace("\r\n", "\n")
            except UnicodeDecodeError:
                continue
            if text.strip() and looks_written(text):
                texts[f"{kind}/{relative.as_posix()}"] = text
    return texts


def path_rank(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def choose(texts: dict[str, str], settings: Settings) -> list[str]:
    """Names under the caps. By hash, so that a cap takes a spread sample, not the first letters."""
    used: defaultdict[str, int] = defaultdict(int)
    total = 0
    chosen = []
    for name in sorted(texts, key=path_rank):
        package = name.split("/")[1]
        size = len(texts[name].encode())
        if used[package] + size > settings.package_bytes_max:
            continue
        if total + size > settings.corpus_bytes_max:
            break
        used[package] += size
        total += size
        chosen.append(name)
    return sorted(chosen)


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tokens:
    end = tokenizer.token_to_id(END)
    rows = [[end, *row.ids] for row in tokenizer.encode_batch(texts)]
    return np.concatenate([np.asarray(row, dtype=np.uint16) for row in rows])


def sources_used(names: list[str]) -> list[str]:
    """'name version' of every distribution that gave text."""
    owners = importlib.metadata.packages_distributions()
    packages = {n.split("/")[1].removesuffix(".py") for n in names if n.startswith("site")}
    dists = {dist for package in packages for dist in owners.get(package, [])}
    return sorted(f"{dist} {importlib.metadata.version(dist)}" for dist in dists)


def make_corpus(work: Path, settings: Settings, console: Console) -> dict[str, Any]:
    """Gather, tokenise and cache; a finished cache (corpus.json is written last) is used as is."""
    index = work / "corpus.json"
    if index.exists():
        facts: dict[str, Any] = json.loads(index.read_text())
        if facts["settings"] != asdict(settings):
            raise SystemExit(f"{work} holds a corpus made with other settings: use another --work")
        return facts
    console.print("gathering source text")
    texts = read_sources()
    names = choose(texts, settings)
    held = [n for n in names if path_rank(n) % HELD_OUT_EVERY == 0]
    train = sorted(set(names) - set(held))
    console.print(f"{len(train)} files to train on, {len(held)} held out; tokenising")
    tokenizer = train_tokenizer([texts[n] for n in train], settings.vocab)
    tokenizer.save(str(work / "tokenizer.json"))
    facts = {"settings": asdict(settings), "sources": sources_used(names)}
    for part, members in (("train", train), ("held", held)):
        tokens = encode(tokenizer, [texts[n] for n in members])
        np.save(work / f"{part}.npy", tokens)
        size = sum(len(texts[n].encode()) for n in members)
        facts[part] = {"files": len(members), "bytes": size, "tokens": len(tokens)}
    if facts["train"]["tokens"] < TRAIN_TOKENS_MIN:
        raise SystemExit(f"only {facts['train']['tokens']} tokens of source text found")
    index.write_text(json.dumps(facts))
    return facts


def write_texts(folder: Path) -> tuple[Path, Path]:
    """Writes train.txt and held-out.txt, samples of the files that the model was trained on and of
    those that it never saw: to fit predictors with, and to measure them on."""
    texts = read_sources()
    paths = folder / "train.txt", folder / "held-out.txt"
    for path, held in zip(paths, (False, True), strict=True):
        size, kept = 0, []
        for name in sorted(texts, key=path_rank):
            if (path_rank(name) % HELD_OUT_EVERY == 0) == held and size < SAMPLE_CHARACTERS:
                kept.append(texts[name])
                size += len(texts[name])
        path.write_text("\n".join(kept), encoding="utf-8")
    return paths


class Batches:
    """Random windows of the training text, a pure function of (seed, step) so that runs resume."""

    def __init__(self, tokens: Tokens, tokenizer: Tokenizer, settings: Settings) -> None:
        self.tokens, self.settings = tokens, settings
        # ' name' is one token, so a prompt that ends in a space ('def ') is a sequence that
        # never occurs in tokenised text. A small share of such tokens is split to teach it.
        vocab = tokenizer.get_vocab()
        self.space = vocab["Ġ"]
        self.rest = np.zeros(settings.vocab, dtype=np.uint16)
        for token, number in vocab.items():
            if token.startswith("Ġ") and token[1:2].isidentifier():
                self.rest[number] = vocab.get(token[1:], 0)
        self.share = np.full(settings.vocab, settings.split_share)
        for word in keyword.kwlist:
            for token in (word, f"Ġ{word}"):
                if token in vocab:
                    self.share[vocab[token]] = settings.split_share_keyword
        # A window that starts anywhere starts in the middle of things, and a prompt does not: a
        # part of them start at one of these words, each as often as the others.
        usable = tokens[: len(tokens) - settings.context - 1]
        places = [np.flatnonzero(usable == vocab[word]) for word in OPENERS if word in vocab]
        self.openers = [place for place in places if len(place)]

    def take(self, step: int, length: int) -> torch.Tensor:
        """Token ids of (batch_tokens / length, length + 1)."""
        rng = np.random.default_rng((self.settings.seed, step))
        rows = []
        for _ in range(self.settings.batch_tokens // length):
            start = rng.integers(0, len(self.tokens) - length - 1)
            if rng.random() < self.settings.opener_share and self.openers:
                start = rng.choice(self.openers[rng.integers(len(self.openers))])
            row = self.tokens[start : start + length + 1].copy()
            lot = rng.random(length) < self.share[row[:-1]]
            where = 1 + np.flatnonzero(lot & (self.rest[row[1:]] > 0))
            row[where] = self.rest[row[where]]
            rows.append(np.insert(row, where, self.space)[: length + 1])
        return torch.from_numpy(np.stack(rows).astype(np.int64))
