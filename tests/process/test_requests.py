"""Requests end to end: text, sampling, stop texts, cancels, clients that vanish, many at once."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from common.launch import CHECKOUT
from inflash import AsyncClient, Client, RequestRefused
from tests.conftest import Made, serving

ENDLESS = {"max_new_tokens": 450, "ignore_eos": True}


def test_requests_of_all_kinds(made: Made, run_dir: Path) -> None:
    """One server for all: each check leaves it as it was."""
    with serving(made.store("llama-gqa"), run_dir, cache="30%") as client:
        text_and_ids_agree(client)
        same_seed_same_answer(client)
        stop_text_ends_the_answer(client)
        cancelling_takes_effect_soon(client)
        a_vanished_client_frees_the_machine(client, run_dir)
        what_does_not_fit_is_refused(client)
        asyncio.run(many_at_once(run_dir))
        queue = client.status()["queue"]
        assert (queue["running"], queue["waiting"], queue["room_taken_tokens"]) == (0, 0, 0)


def text_and_ids_agree(client: Client) -> None:
    answer = client.generate("def read", max_new_tokens=8)
    tokens = list(answer)
    assert answer.text == "".join(t.text for t in tokens)
    assert answer.finish_reason == "length"
    assert answer.stats is not None
    assert answer.stats.new_tokens == 8
    ids = [t.id for t in tokens]
    assert [t.id for t in client.generate("def read", max_new_tokens=8)] == ids
    assert all(t.logprob <= 0 for t in tokens)


def same_seed_same_answer(client: Client) -> None:
    def answer(seed: int) -> list[int]:
        sampled = client.generate([5, 6], max_new_tokens=24, temperature=1.5, seed=seed)
        return [t.id for t in sampled]

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def stop_text_ends_the_answer(client: Client) -> None:
    whole = client.generate("for name in", max_new_tokens=40, ignore_eos=True)
    list(whole)
    stop = whole.text[len(whole.text) // 2 :][:3]
    answer = client.generate("for name in", max_new_tokens=40, ignore_eos=True, stop=[stop])
    list(answer)
    assert answer.finish_reason == "stop"
    assert answer.text == whole.text[: whole.text.index(stop)]


def cancelling_takes_effect_soon(client: Client) -> None:
    answer = client.generate([5, 6, 7], **ENDLESS)
    first = [next(answer) for _ in range(3)]
    answer.cancel()
    rest = list(answer)
    assert answer.finish_reason == "cancelled"
    assert len(first) + len(rest) < 100, "what was on its way, not the whole answer"


def a_vanished_client_frees_the_machine(client: Client, run_dir: Path) -> None:
    """A process that asks for a long answer and is killed: its request does not go on."""
    program = (
        "import inflash, os, signal, sys\n"
        "answer = inflash.Client(sys.argv[1]).generate([5, 6], max_new_tokens=450,"
        " ignore_eos=True)\n"
        "next(answer)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    before = client.status()["counters"].get("vanished", 0)
    killed = subprocess.run(
        [sys.executable, "-c", program, str(run_dir)], cwd=CHECKOUT, timeout=60, check=False
    )
    assert killed.returncode == -9
    assert len(list(client.generate([5], max_new_tokens=2, ignore_eos=True))) == 2
    assert client.status()["counters"]["vanished"] == before + 1


def what_does_not_fit_is_refused(client: Client) -> None:
    for prompt, reason in [
        ([5] * 600, "the prompt has 600 tokens"),
        ([], "the prompt is empty"),
        ([10**6], "is not in the vocabulary"),
        ([{"role": "user", "content": "hi"}], "no chat template"),
    ]:
        with pytest.raises(RequestRefused, match=reason):
            list(client.generate(prompt))
    beyond = client.generate([5] * 500, max_new_tokens=1000, ignore_eos=True)
    assert len(list(beyond)) == 12, "512 tokens of context"
    assert beyond.finish_reason == "length"


async def many_at_once(run_dir: Path) -> None:
    """More requests than the queue holds: each gets its own answer, or a refusal, and only one."""

    async def one(client: AsyncClient, start: int) -> tuple[int, ...] | None:
        try:
            answer = await client.generate([start, 6], max_new_tokens=5, ignore_eos=True)
            return tuple([token.id async for token in answer])
        except RequestRefused as refusal:
            if "the queue is full (16 waiting)" in refusal.reason:
                return None
            raise

    async with AsyncClient(run_dir) as client:
        alone = [await one(client, start) for start in (5, 7)]
        together = await asyncio.gather(*(one(client, 5 + 2 * (n % 2)) for n in range(40)))
    answered = [(n, ids) for n, ids in enumerate(together) if ids is not None]
    assert 24 <= len(answered) < 40, "8 run, 16 wait"
    assert all(ids == alone[n % 2] for n, ids in answered)
