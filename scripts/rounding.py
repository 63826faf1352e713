"""How far logits move when a checkpoint is computed in half precision: why bfloat16 is not.

Loads transformers' own model in float32, bfloat16 and float16 and compares logits on random tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import torch
from transformers.utils import logging

from common.errors import UserError
from common.model.reference import load_reference

TOKENS = 64


@click.command()
@click.argument("checkpoints", type=click.Path(path_type=Path), nargs=-1, required=True)
def main(checkpoints: tuple[Path, ...]) -> None:
    """Print, for each of CHECKPOINTS, the largest logit difference from float32, relative to the
    largest logit of the same token."""
    logging.disable_progress_bar()
    try:
        for src in checkpoints:
            print(f"{src.name}: {', '.join(differences(src))}")
    except UserError as error:
        sys.exit(f"error: {error}")


def differences(src: Path) -> list[str]:
    expected = logits(src, torch.float32)
    scale = expected.abs().amax(dim=1)
    found = []
    for dtype in (torch.bfloat16, torch.float16):
        difference = (logits(src, dtype) - expected).abs().amax(dim=1) / scale
        found.append(f"{str(dtype)[6:]} {float(difference.max()):.1e}")
    return found


def logits(src: Path, dtype: torch.dtype) -> torch.Tensor:
    """float32 [TOKENS, vocabulary], computed in `dtype`."""
    model: Any = load_reference(src, dtype)
    torch.manual_seed(0)
    tokens = torch.randint(3, model.config.vocab_size, (1, TOKENS))
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=tokens).logits[0].float()
    return found


if __name__ == "__main__":
    main(prog_name="python -m scripts.rounding")
