"""llama.cpp, through llama-cpp-python, on a GGUF file.

`--mode mmap` maps the file, so that memory holds what the cap allows and the rest is read again for
every token; `--mode ram` reads all of it into memory first, past the page cache.

llama.cpp's own interface, not llama-cpp-python's `Llama`: that one cannot forbid the copies that
llama.cpp makes of mapped weights for some CPUs and number formats, all of them in memory; under a
cap that has no room for them it is killed. `--copies` allows them.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.bench.rivals.program import Options, Result, load, main, time_decoding
from common.errors import UserError

PACKAGES = {"llama_cpp": "llama-cpp-python"}
MODES = ("mmap", "ram")
_BATCH_MAX = 512
_DESCRIPTION_BYTES = 1024


@dataclass(frozen=True)
class Model:
    """A GGUF file that llama.cpp has opened, and what it has seen."""

    library: Any
    model: Any
    context: Any
    batch: int  # tokens that one call takes

    def decode(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """Appends ids; float32 [vocabulary], the logits after the last: valid until the next call.

        `UserError` if llama.cpp refuses them.
        """
        for first in range(0, len(ids), self.batch):
            part = ids[first : first + self.batch]
            tokens = (self.library.llama_token * len(part))(*part)
            status = self.library.llama_decode(
                self.context, self.library.llama_batch_get_one(tokens, len(part))
            )
            if status:
                raise UserError(f"llama.cpp could not decode {part}: status {status}")
        vocabulary = self.library.llama_model_get_vocab(self.model)
        logits = self.library.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, (self.library.llama_vocab_n_tokens(vocabulary),))

    def description(self) -> str:
        """What whoever wrote the file says of it; "" if nothing."""
        buffer = ctypes.create_string_buffer(_DESCRIPTION_BYTES)
        size = self.library.llama_model_meta_val_str(
            self.model, b"general.description", buffer, _DESCRIPTION_BYTES
        )
        return buffer.value.decode(errors="replace") if size > 0 else ""


@contextmanager
def opened(
    path: Path, mode: str, *, context: int, prompt: int, threads: int, copies: bool = False
) -> Iterator[Model]:
    """The GGUF file at `path`, for `context` tokens of which `prompt` come first; `copies`: mapped
    weights may be copied.

    `UserError` if llama.cpp refuses it; it says why on standard error.
    """
    library = load("llama_cpp", PACKAGES)
    if not path.is_file():
        raise UserError(f"there is no GGUF file {path}")
    library.llama_backend_init()
    wanted = library.llama_model_default_params()
    wanted.n_gpu_layers = 0
    if mode == "mmap":
        wanted.load_mode = library.LLAMA_LOAD_MODE_MMAP
        wanted.use_extra_bufts = copies
    else:
        wanted.load_mode = library.LLAMA_LOAD_MODE_DIRECT_IO
    model = library.llama_model_load_from_file(str(path).encode(), wanted)
    if not model:
        raise UserError(f"llama.cpp could not open {path}")
    try:
        batch = min(_BATCH_MAX, prompt)
        limits = library.llama_context_default_params()
        limits.n_ctx = context
        limits.n_batch = limits.n_ubatch = batch
        limits.n_threads = limits.n_threads_batch = threads
        seen = library.llama_init_from_model(model, limits)
        if not seen:
            raise UserError(f"llama.cpp could not make a context of {context} tokens for {path}")
        try:
            yield Model(library, model, seen, batch)
        finally:
            library.llama_free(seen)
    finally:
        library.llama_model_free(model)


def contend(options: Options) -> Result:
    """Loads the GGUF file and decodes."""
    mode = options.own.mode
    start = time.perf_counter()
    with opened(
        options.model,
        mode,
        context=options.context,
        prompt=len(options.prompt),
        threads=options.threads,
        copies=options.own.copies,
    ) as model:
        load_ms = (time.perf_counter() - start) * 1e3
        timed = time_decoding(lambda ids: int(model.decode(ids).argmax()), options)
        version = f"llama-cpp-python {model.library.__version__}"
        return Result(f"llama.cpp ({mode})", version, load_ms, timed, model.description())


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--copies", action="store_true", help="of mapped weights, in memory")


if __name__ == "__main__":
    sys.exit(main(contend, PACKAGES, sys.argv[1:], _add_arguments))
