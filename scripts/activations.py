"""Records a trace of a store's model over text: which neurons each layer needed, token by token.

`python -m scripts.policies` replays it. The model runs as `inflash fit` runs it, layer by layer.
Exit status: 0 done, 1 refused, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

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
from common.outputs import check_output, sentences
from common.replay import save_trace, trace_from_bits
from common.store.store import Store

BLOCK_TOKENS = 1024

_ERR = Console(stderr=True, highlight=False)


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("trace", type=click.Path(path_type=Path))
@click.option("--text", "texts", multiple=True, required=True, type=click.Path(path_type=Path),
              help="File or folder; may be repeated.")  # fmt: skip
@click.option("--tokens", default=10_240, show_default=True, type=click.IntRange(64))
@click.option("--length", default=512, show_default=True, help="Of a window, in tokens.")
@click.option("--names", type=click.Choice(["fired", "named"]), default="fired",
              show_default=True, help="What fired, or what fitted predictors name.")  # fmt: skip
def main(
    store: Path, trace: Path, texts: tuple[Path, ...], tokens: int, length: int, names: str
) -> None:
    """Run STORE's model over text and write what each token needed to TRACE, an .npz file."""
    logging.disable_progress_bar()
    try:
        check_output(trace)
        with sentences(f"recording {trace} stopped"):
            write(Store.open(store), trace, texts, tokens, length, names)
    except UserError as error:
        _ERR.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def write(
    store: Store, trace: Path, texts: tuple[Path, ...], tokens: int, length: int, names: str
) -> None:
    geometry = store.geometry
    factors = read_predictors(store)["same"] if names == "named" else None
    windows = windows_of(store, texts, tokens, length).ids
    with tempfile.TemporaryDirectory(dir=trace.absolute().parent) as work, Progress(
        console=_ERR
    ) as bar:  # fmt: skip
        task = bar.add_task("running the model", total=windows.size)
        recording = record(
            store, windows, Path(work), progress=lambda done, _: bar.update(task, completed=done)
        )
        layers = (_bits(recording, n, factors) for n in range(geometry.layers))
        starts = range(0, windows.size, windows.shape[1])
        found = trace_from_bits(layers, geometry.neurons, geometry.stride_bytes, starts, names)
    save_trace(found, trace)


def _bits(recording: Recording, layer: int, factors: list[Factors] | None) -> npt.NDArray[np.bool_]:
    """bool [tokens, neurons]"""
    return np.concatenate(list(_blocks(recording, layer, factors)))


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
