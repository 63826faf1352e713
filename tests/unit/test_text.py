"""Incremental decoding and stop texts: any split of any text gives the same text."""

from __future__ import annotations

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from services.gateway.text import AnswerText, Decoder, StopTexts

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text("ab\ufffd€𝄞 ")


@functools.cache
def byte_level() -> Tokenizer:
    """A byte-level tokenizer whose tokens are single bytes and a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def return", "for name in names", "naïve € 𝄞 日本"], trainer)
    return tokenizer


@functools.cache
def spaces_first() -> Tokenizer:
    """A SentencePiece-like tokenizer: ▁ marks a space, the first one is stripped, bytes fall back.

    Its tokens' text depends on what stands before them.
    """
    words = ["<unk>", "<s>", "▁", "▁a", "▁b", "a", "b", *(f"<0x{i:02X}>" for i in range(256))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], byte_fallback=True))
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def byte_ids(text: str) -> list[int]:
    """One token per byte: the finest split."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(
        text
    )
    vocabulary = byte_level().get_vocab()
    return [vocabulary[c] for piece, _ in pieces for c in piece]


def first_stop(text: str, stops: list[str]) -> str:
    """The specification: before the stop that is complete first, the longest if several are."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@given(TEXTS, st.lists(st.text("ab€ \ufffd", min_size=1, max_size=4), max_size=3), st.booleans())
def test_any_split_gives_the_text_before_the_first_stop(
    text: str, stops: list[str], fine: bool
) -> None:
    ids = byte_ids(text) if fine else byte_level().encode(text).ids
    answer = AnswerText(byte_level(), stops)
    pieces = [answer.push(i) for i in ids] + [answer.flush()]
    assert "".join(pieces) == first_stop(text, stops)
    assert answer.stopped == any(s in text for s in stops)


@given(TEXTS, st.lists(st.text("ab€ ", min_size=1, max_size=4), max_size=3))
def test_what_is_shown_is_never_taken_back(text: str, stops: list[str]) -> None:
    """Every moment's text is a beginning of the whole: no half characters, no part of a stop."""
    answer = AnswerText(byte_level(), stops)
    so_far = ""
    for token_id in byte_ids(text):
        so_far += answer.push(token_id)
        assert first_stop(text, stops).startswith(so_far)


@given(st.lists(st.integers(0, 299), max_size=200))
def test_random_ids_decode_as_the_tokenizer_does(ids: list[int]) -> None:
    decoder = Decoder(byte_level())
    pieces = [decoder.push(i) for i in ids] + [decoder.flush()]
    if len(ids) < 64:  # beyond it a run of broken bytes is shown as far as it is known
        assert "".join(pieces) == byte_level().decode(ids, skip_special_tokens=True)


@settings(max_examples=200)
@given(st.lists(st.sampled_from(["▁a", "▁b", "▁", "a", "<0xE2><0x82><0xAC>", "<s>"]), max_size=30))
def test_text_that_depends_on_what_stands_before(words: list[str]) -> None:
    tokenizer = spaces_first()
    split = [part for w in words for part in (w.replace("><", "> <").split())]
    ids = [tokenizer.get_vocab()[part] for part in split]
    decoder = Decoder(tokenizer)
    pieces = [decoder.push(i) for i in ids] + [decoder.flush()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_whole_character_is_not_held_back() -> None:
    decoder = Decoder(byte_level())
    pieces = [decoder.push(i) for i in byte_ids("a€b")]
    assert pieces == ["a", "", "", "€", "b"]


def test_a_stop_that_straddles_tokens_is_held_back_and_then_delivered_or_not() -> None:
    stops = StopTexts(["\n\n"])
    assert stops.push("a\n") == "a"
    assert stops.push("b") == "\nb"
    assert stops.push("c\n") == "c"
    assert stops.push("\nd") == ""
    assert stops.found
    assert stops.push("e") == ""
    assert stops.flush() == ""


def test_without_a_tokenizer_there_is_no_text() -> None:
    answer = AnswerText(None, ["a"])
    assert [answer.push(i) for i in range(5)] + [answer.flush()] == [""] * 6
