"""`inflash compare STORE SRC`: the proof, run by a user, that streamed equals reference."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from transformers.utils import logging

from common.errors import UserError
from common.launch import Server
from common.proof import Proof, Reference, ask
from common.store.store import Store
from inflash import Client
from inflash._errors import InflashError
from scripts.options import server_options

PROMPTS = (
    "def ",
    "import os\n\n\nclass Reader:\n    def __init__(self, path):\n",
    "The quick brown fox jumps over the lazy dog. " * 8,
)


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("src", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, help="Text to start from; may be repeated.")
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Answer length per prompt.",
)
@server_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    store: Path,
    src: Path,
    prompts: tuple[str, ...],
    tokens: int,
    as_json: bool,
    **options: str | None,
) -> None:
    """Compare the answers of STORE with those of the checkpoint SRC that it was made from.

    Starts a server of its own, generates greedily, and holds every token's logits against
    transformers' own model computed in float32. The predictor is exact unless told otherwise:
    learned ones lose a little (`inflash eval` measures it). Ends with status 1 if anything
    differs. The reference needs memory for all its weights in float32. Where the store's bundles
    are packed, or --resident packs, it has the weights that the packed ones stand for: what packing
    itself loses, `inflash eval --against` measures.
    """
    given = {key: value for key, value in options.items() if value is not None}
    console = Console(stderr=as_json)
    try:
        proofs = prove(store, src, prompts or PROMPTS, tokens, given)
    except (UserError, InflashError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    if as_json:
        print(json.dumps(as_object(proofs)))
    else:
        console.print(table(proofs))
        console.print(verdict(proofs))
    sys.exit(0 if all(proof.equal for proof in proofs) else 1)


def prove(
    store: Path, src: Path, prompts: tuple[str, ...], tokens: int, options: dict[str, str]
) -> list[Proof]:
    """One proof per prompt, from a server on a run directory of its own. Its predictor is exact if
    `options` name none: learned ones are not meant to be equal."""
    opened = Store.open(store)
    ids = [encode(opened, prompt) for prompt in prompts]
    with (
        tempfile.TemporaryDirectory(prefix="inflash-") as run_dir,
        Server(
            {"predictor": "exact"} | options | {"store": str(store.absolute()), "run_dir": run_dir}
        ),
        Client(run_dir) as client,
    ):
        answers = [ask(client, prompt, tokens) for prompt in ids]
    logging.disable_progress_bar()  # transformers' own, for a load of a second
    resident = options.get("resident", "float")
    # After the server: one of them at a time.
    reference = Reference(src, opened.geometry.dtype, opened, resident)
    return [reference.check(answer) for answer in answers]


def encode(store: Store, prompt: str) -> list[int]:
    """Token ids of a text; its bytes, modulo the vocabulary, for a model without a tokenizer."""
    path = store.config_dir / "tokenizer.json"
    if path.exists():
        return list(Tokenizer.from_file(str(path)).encode(prompt).ids)
    config = json.loads((store.config_dir / "config.json").read_text(encoding="utf-8"))
    return [byte % config["vocab_size"] for byte in prompt.encode()]


def as_object(proofs: list[Proof]) -> dict[str, object]:
    return {
        "equal": all(proof.equal for proof in proofs),
        "largest_difference": max(proof.largest_difference for proof in proofs),
        "prompts": [dataclasses.asdict(proof) | {"equal": proof.equal} for proof in proofs],
    }


def table(proofs: list[Proof]) -> Table:
    result = Table("prompt tokens", "answer tokens", "largest logit difference", "first to differ")
    for proof in proofs:
        first = "none" if proof.first_difference is None else str(proof.first_difference)
        result.add_row(
            str(proof.prompt_tokens), str(proof.tokens), f"{proof.largest_difference:.1e}", first
        )
    return result


def verdict(proofs: list[Proof]) -> str:
    """The proof in a line."""
    tokens = sum(proof.tokens for proof in proofs)
    largest = max(proof.largest_difference for proof in proofs)
    limit = proofs[0].tolerance
    if all(proof.equal for proof in proofs):
        return (
            f"[green]equal[/]: none of {tokens} tokens differs from the reference; largest logit"
            f" difference {largest:.1e} of the largest logit (limit {limit:.0e})"
        )
    return f"[red]different[/]: largest logit difference {largest:.1e} (limit {limit:.0e})"


if __name__ == "__main__":
    main(prog_name="inflash compare")
