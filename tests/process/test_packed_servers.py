"""Servers of packed stores, and of packed resident weights, against transformers' own model with
the weights that the packed ones stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.proof import Reference, ask
from tests.checkpoints import VOCAB
from tests.conftest import Made, serving

TOKENS = 48


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("variant", "dtype", "bundles", "resident"),
    [
        ("opt", "float32", "int8", "float"),
        ("opt", "float32", "int4", "int8"),
        ("llama-gqa", "float32", "int4", "int4"),
        ("llama-tied", "float16", "int8", "int4"),
        ("llama-fatrelu", "bfloat16", "int8", "int8"),
    ],
)
def test_answers_are_those_of_what_packed_weights_stand_for(
    made: Made, run_dir: Path, variant: str, dtype: str, bundles: str, resident: str
) -> None:
    store = made.store(variant, dtype, bundles)
    torch.manual_seed(5)
    prompts = [torch.randint(3, VOCAB, (count,)).tolist() for count in (1, 7, 100)]
    with serving(store, run_dir, predictor="exact", cache="20%", resident=resident) as client:
        answers = [ask(client, prompt, TOKENS) for prompt in prompts]
    src = made.checkpoint(variant, dtype)
    reference = Reference(src, dtype, store, resident)
    for answer in answers:
        proof = reference.check(answer)
        assert proof.equal, str(proof)
    unpacked = Reference(src, "float32")
    assert not all(unpacked.check(answer).equal for answer in answers), "nothing was packed"
