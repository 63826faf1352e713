"""The KV cache: whose the room is, what is kept for the next request, and steps that are shared."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from common.limits import KEPT_MAX, KV_ROOM_TOKENS
from services.compute.attention import ATTENTION
from services.compute.kv import KVLayer, Sequence, Sequences, shared

LAYERS, CONTEXT = 3, 40
FIRST = [5, 6, 7, 8, 9, 10, 11, 12]
UNIT = KV_ROOM_TOKENS


def tokens(ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64)


def begun(sequences: Sequences, ids: list[int], most: int = CONTEXT) -> Sequence:
    sequence = sequences.begin(tokens(ids), most)
    assert sequence is not None
    return sequence


def over(sequences: Sequences, ids: list[int]) -> Sequence:
    """A request that computed these tokens and is over."""
    sequence = begun(sequences, ids)
    states = torch.zeros(1, 1, len(ids) - sequence.count, 2)
    for layer in sequence.layers:
        layer.update(states, states)
    sequence.hold(tokens(ids)[sequence.count :], sequence.count)
    sequences.end(sequence)
    return sequence


@pytest.mark.parametrize("room", [UNIT, 4 * UNIT], ids=["one", "some"])
@pytest.mark.parametrize(
    ("prompt", "reused"),
    [
        (FIRST, 7),  # the logits after its last token are wanted
        ([*FIRST, 13, 14], 8),
        ([5, 6, 7, 1, 9, 10], 3),
        ([5, 6, 7], 2),
        ([1, *FIRST], 0),
        ([5], 0),
    ],
)
def test_the_common_beginning_is_kept(prompt: list[int], reused: int, room: int) -> None:
    sequences = Sequences(LAYERS, CONTEXT, room)
    over(sequences, FIRST)
    sequence = begun(sequences, prompt)
    assert sequence.count == reused
    assert sequence.tokens[:reused].tolist() == FIRST[:reused]


def test_generated_tokens_are_kept_too() -> None:
    sequences = Sequences(LAYERS, CONTEXT, UNIT)
    sequence = begun(sequences, FIRST[:5])
    sequence.hold(tokens(FIRST[:5]), 0)
    sequence.hold(tokens([20]), 5)
    sequences.end(sequence)
    assert begun(sequences, [*FIRST[:5], 20, 21]).count == 6


def test_nothing_is_kept_without_reuse() -> None:
    sequences = Sequences(LAYERS, CONTEXT, 4 * UNIT, reuse=False)
    over(sequences, FIRST)
    assert not sequences.kept
    assert begun(sequences, FIRST).count == 0


def test_those_that_run_leave_no_more_than_the_room() -> None:
    sequences = Sequences(LAYERS, 3 * UNIT, 4 * UNIT)
    first = begun(sequences, FIRST, 2 * UNIT)
    second = begun(sequences, [1], UNIT + 1)
    assert sequences.begin(tokens([2]), 1) is None
    sequences.end(second)
    assert begun(sequences, [3], 2 * UNIT).room == 2 * UNIT
    assert first in sequences.running


def test_the_longest_unused_goes_when_the_room_is_wanted() -> None:
    sequences = Sequences(LAYERS, CONTEXT, 3 * UNIT)
    over(sequences, [1, 2, 3])
    over(sequences, [4, 5, 6])
    over(sequences, [7, 8, 9])
    assert over(sequences, [1, 2, 3, 4]).count == 4, "taken over, and now the latest"
    begun(sequences, [11, 12])
    kept = {tuple(s.tokens[: s.count].tolist()) for s in sequences.kept}
    assert kept == {(7, 8, 9), (1, 2, 3, 4)}


def test_a_kept_sequence_that_shares_little_stays_while_there_is_room() -> None:
    sequences = Sequences(LAYERS, CONTEXT, 2 * UNIT)
    over(sequences, FIRST)
    assert begun(sequences, [5, 6, 1]).count == 2
    assert [s.count for s in sequences.kept] == [8]
    assert sequences.begin(tokens([5, 6, 1]), 1) is not None, "the room is wanted"
    assert not sequences.kept


def test_what_a_sequence_that_runs_has_is_copied() -> None:
    sequences = Sequences(LAYERS, CONTEXT, 2 * UNIT)
    first = begun(sequences, FIRST)
    for layer in first.layers:
        layer.update(torch.ones(1, 1, 8, 2), torch.ones(1, 1, 8, 2))
    first.hold(tokens(FIRST), 0)
    second = begun(sequences, [*FIRST[:4], 1, 2])
    assert (first.count, second.count) == (8, 4)
    second.layers[0].keys[:] = 2
    assert (first.layers[0].keys[:, :, :8] == 1).all()


def test_room_is_never_exceeded_under_any_history() -> None:
    rng = random.Random(3)
    sequences = Sequences(LAYERS, 4 * UNIT, 6 * UNIT)
    for _ in range(400):
        if sequences.running and rng.random() < 0.5:
            sequences.end(rng.choice(sequences.running))
            continue
        ids = [rng.randrange(2) for _ in range(rng.randrange(1, 3 * UNIT))]
        taken = sum(s.room for s in sequences.running)
        sequence = sequences.begin(tokens(ids), len(ids) + 5)
        assert (sequence is None) == (taken + -(-(len(ids) + 5) // UNIT) * UNIT > 6 * UNIT)
        if sequence is not None:
            assert sequence.count < len(ids)
            assert sequence.tokens[: sequence.count].tolist() == ids[: sequence.count]
            for layer in sequence.layers:
                new = torch.zeros(1, 1, len(ids) - sequence.count, 2)
                assert layer.filled == sequence.count
                layer.update(new, new)
            sequence.hold(tokens(ids)[sequence.count :], sequence.count)
        assert sum(s.room for s in (*sequences.running, *sequences.kept)) <= 6 * UNIT
        assert len(sequences.kept) <= KEPT_MAX


def resident_kb() -> int:
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Rss"))


def test_memory_comes_with_tokens_and_goes_with_them() -> None:
    """32 MB of keys and as many of values, had they all been written."""
    layer = KVLayer(8192)
    few = torch.ones(1, 4, 1024, 256, dtype=torch.float16)
    before = resident_kb()
    layer.update(few, few)
    written = resident_kb() - before
    assert 3_000 < written < 8_000
    layer.crop(64)
    assert resident_kb() - before < written / 4
    assert (layer.keys[:, :, :64] == 1).all()
    del layer
    assert resident_kb() - before < 1_000


@pytest.fixture(scope="module", params=["llama", "opt"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    made: Any
    if request.param == "llama":
        config = LlamaConfig(
            vocab_size=60, hidden_size=32, num_hidden_layers=LAYERS, intermediate_size=64,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
        )  # fmt: skip
        made = LlamaForCausalLM(config).eval()
    else:
        made = OPTForCausalLM(OPTConfig(
            vocab_size=60, hidden_size=32, num_hidden_layers=LAYERS, ffn_dim=64,
            num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=CONTEXT,
        )).eval()  # fmt: skip
    for parameter in made.parameters():
        parameter.data.normal_(std=0.2)
    made.set_attn_implementation(ATTENTION)
    return made


def run(model: Any, sequence: Sequence, ids: list[int]) -> torch.Tensor:
    position = sequence.count
    positions = torch.arange(position, position + len(ids))[None]
    with torch.inference_mode():
        out = model(
            input_ids=tokens(ids)[None], position_ids=positions, past_key_values=sequence.cache,
            use_cache=True,
        )  # fmt: skip
        sequence.hold(tokens(ids), position)
    logits: torch.Tensor = out.logits[0, -1]
    return logits


@pytest.mark.parametrize("prompt", [FIRST, [*FIRST, 13, 14], [5, 6, 7, 1, 9, 10], [5, 6]], ids=str)
@pytest.mark.parametrize("runs", [False, True], ids=["kept", "running"])
def test_logits_are_those_of_a_whole_prompt(model: Any, prompt: list[int], runs: bool) -> None:
    sequences = Sequences(LAYERS, CONTEXT, 3 * UNIT)
    first = begun(sequences, FIRST)
    run(model, first, FIRST)
    # What a step that was given up left behind: it was in two layers.
    with torch.inference_mode():
        states = torch.ones(1, first.layers[0].keys.shape[1], 1, 8)
        for layer in (0, 1):
            first.layers[layer].update(states, states)
        if not runs:
            sequences.end(first)
        sequence = begun(sequences, prompt)
    assert sequence.count
    found = run(model, sequence, prompt[sequence.count :])
    fresh = begun(Sequences(LAYERS, CONTEXT, UNIT), prompt)
    expected = run(model, fresh, prompt)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_shared_step_is_each_ones_own(model: Any) -> None:
    """Sequences of different lengths, some tokens of each, or one: as alone."""
    prompts = [FIRST, [3, 4], [*FIRST, 30, 31, 32], [6]]
    alone, together = (Sequences(LAYERS, CONTEXT, 4 * UNIT, reuse=False) for _ in range(2))
    singles, batch = ([begun(s, ids) for ids in prompts] for s in (alone, together))
    later = [[20, 21], [22], [23, 24, 25], [26]]  # prompts in two blocks
    for new in (prompts, later, [[20], [21], [22], [23]], [[24], [25], [26], [27]]):
        expected = [run(model, s, ids) for s, ids in zip(singles, new, strict=True)]
        counts = [len(ids) for ids in new]
        ends = torch.tensor(counts).cumsum(0)
        positions = [torch.arange(s.count, s.count + n) for s, n in zip(batch, counts, strict=True)]
        with torch.inference_mode():
            out = model(
                input_ids=torch.cat([tokens(ids) for ids in new])[None],
                position_ids=torch.cat(positions)[None],
                past_key_values=shared(batch, counts), use_cache=True,
                logits_to_keep=ends - 1,
            ).logits  # fmt: skip
            for sequence, ids in zip(batch, new, strict=True):
                sequence.hold(tokens(ids), sequence.count)
        assert torch.allclose(out[0], torch.stack(expected), atol=1e-5)
