"""Records a trace of a store's model over text: which neurons each layer needed, token by token.

`python -m scripts.policies` replays it, `inflash convert --placement` orders neurons by it. The
model runs as `inflash fit` runs it, layer by layer. A trace's ids are the checkpoint's neurons,
also where the store has them in another order: it holds for every store of the checkpoint.

Exit status: 0 done, 1 refused, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress
from transformers.utils import logging

from common.errors import UserError
from common.learn.recording import Recording, record
from common.learn.windows import windows_of
from common.lowrank import Factors, read_predictors
from common.model.streamed import Ids
from common.outputs import check_output, sentences
from common.replay import save_trace, trace_from_bits
from common.store.store import Store

BLOCK_TOKENS = 1024

_ERR = Console(stderr=True, highlight=False)


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("trace", type=click.Path(path_type=Path))
@click.option("--text", "texts", multiple=True, type=click.Path(path_type=Path),
              help="File or folder; may be repeated.")  # fmt: skip
@click.option(
    "--ids",
    "ids_file",
    type=click.Path(path_type=Path),
    help="Token ids in place of text: integers, one text, as numpy.save writes them.",
)
@click.option("--tokens", default=10_240, show_default=True, type=click.IntRange(64))
@click.option("--length", default=512, show_default=True, help="Of a window, in tokens.")
@click.option("--names", type=click.Choice(["fired", "named"]), default="fired",
              show_default=True, help="What fired, or what fitted predictors name.")  # fmt: skip
def main(
    store: Path, trace: Path, texts: tuple[Path, ...], ids_file: Path | None, tokens: int,
    length: int, names: str,
) -> None:  # fmt: skip
    """Run STORE's model over text and write what each token needed to TRACE, an .npz file."""
    if bool(texts) == bool(ids_file):
        raise click.UsageError("give --text, or else --ids")
    logging.disable_progress_bar()
    try:
        check_output(trace)
        with sentences(f"recording {trace} stopped"):
            opened = Store.open(store)
            factors = read_predictors(opened)["same"] if names == "named" else None
            if ids_file:
                windows = windows_of_ids(opened, ids_file, tokens, length)
            else:
                windows = windows_of(opened, texts, tokens, length).ids
            write(opened, trace, windows, factors)
    except UserError as error:
        _ERR.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def windows_of_ids(store: Store, path: Path, tokens: int, length: int) -> Ids:
    """int32 [count, length]: the first `tokens` or so of the ids in `path`, cut into windows."""
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an array of token ids: {error}") from None
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu" or ids.size < length:
        raise UserError(f"{path} is no array of at least {length:,} integers, one window's tokens")
    config = json.loads((store.config_dir / "config.json").read_text(encoding="utf-8"))
    if length > config.get("max_position_embeddings", length):
        raise UserError(
            f"windows of {length:,} are longer than the model's context,"
            f" {config['max_position_embeddings']:,} tokens: choose a smaller --length"
        )
    if not 0 <= ids.min() <= ids.max() < config["vocab_size"]:
        raise UserError(
            f"{path}: an id is outside of the vocabulary, 0 to {config['vocab_size'] - 1:,}"
        )
    count = min(ids.size // length, max(1, tokens // length))
    return ids.ravel()[: count * length].reshape(count, length).astype(np.int32)


def write(store: Store, trace: Path, windows: Ids, factors: list[Factors] | None) -> None:
    """Runs the model over `windows`, int32 [count, length], and writes the trace: of what the
    predictors name, or without them, of what fires."""
    geometry = store.geometry
    names = "fired" if factors is None else "named"
    with tempfile.TemporaryDirectory(dir=trace.absolute().parent) as work, Progress(
        console=_ERR
    ) as bar:  # fmt: skip
        task = bar.add_task("running the model", total=windows.size)
        recording = record(
            store, windows, Path(work), progress=lambda done, _: bar.update(task, completed=done)
        )
        layers = (_bits(store, recording, n, factors) for n in range(geometry.layers))
        starts = range(0, windows.size, windows.shape[1])
        found = trace_from_bits(layers, geometry.neurons, geometry.stride_bytes, starts, names)
    save_trace(found, trace)


def _bits(
    store: Store, recording: Recording, layer: int, factors: list[Factors] | None
) -> npt.NDArray[np.bool_]:
    """bool [tokens, neurons], of the checkpoint's neurons"""
    placed = np.concatenate(list(_blocks(recording, layer, factors)))
    order = store.order(layer)
    if order is None:
        return placed
    bits = np.empty_like(placed)
    bits[:, order] = placed
    return bits


def _blocks(
    recording: Recording, layer: int, factors: list[Factors] | None
) -> Iterator[npt.NDArray[Any]]:
    for first in range(0, recording.tokens, BLOCK_TOKENS):
        some = slice(first, first + BLOCK_TOKENS)
        if factors is None:
            yield recording.unpack(recording.fired(layer)[some])
        else:
            yield factors[layer].scores(recording.x(layer)[some].astype(np.float32)) > 0


if __name__ == "__main__":
    main(prog_name="python -m scripts.activations")
