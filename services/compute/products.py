"""Products of rows with a vector, by the kernels of common/kernels.py, and of rows with a block of
tokens, by torch's, both shared by threads of ours.

A product is cut into blocks that the threads take one after another: where another process has
taken a core, the thread on the other core takes more of them. No thread spins between products.
torch itself has one thread: its own would wait for the slowest of them, and spin. For
float32 products a block's tokens are columns, [width, tokens]: 5 to 10 % faster than as rows.

Of a block's tokens few fire a neuron, where the activation is ReLU: then its row is added for those
alone, which takes a quarter of the time that one large product with the zeros in it takes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common import amx
from common.fired import TILE_ROWS, add_fired, list_fired
from common.jobs import Job, add_job, add_many_job, dot_job, listed, perform
from common.kernels import BITS
from common.limits import RUNNING_MAX
from common.packed import Floats, Vectors, pack_rows, vectors_for, widen_rows
from common.segment import large_pages
from common.store.geometry import GROUP
from services.compute.blocks import TiledRoom, Tokens
from services.compute.team import Team

Bits = npt.NDArray[Any]
Starts = npt.NDArray[np.int64]
Take = Callable[[int, int, torch.Tensor], None]
"""Is given products of rows with a block's tokens, float32 [rows, tokens], and which rows they are
of, from which to which. They are overwritten when it has returned."""

ROW_BLOCKS, WIDTH_BLOCKS = 16, 2  # per thread, of rows that are multiplied, or added up
THREAD_BYTES_MIN = 3 << 20  # of a thread's part, 0.2 ms of work: as long as to meet another takes
SHARED_BYTES_MIN = 2 * THREAD_BYTES_MIN
# Tokens of a sequence that are multiplied one by one with each row, as it is. Of more the rows are
# made float32 first, for one large product: which takes as long as so many (docs/measurements.md).
INT8, INT4, FLOAT16 = (np.dtype(BITS[name]) for name in ("int8", "int4", "float16"))
FEW = {INT8: 64, INT4: 24}
FEW_FLOATS = 16
# Where blocks are multiplied in integers, by a matrix unit or without one.
FEW_HALVED = {FLOAT16: 32, INT8: 16, INT4: 64}
FEW_ROUNDED = {FLOAT16: 32, INT8: 64, INT4: 32}
assert RUNNING_MAX <= FEW_FLOATS, "a token of each request is few"
# Of a block of tokens' products: rows, or columns of them, that are float32 at a time in a thread.
CHUNK_ROWS = 256
CHUNK_WIDTH = 512
# With more weights that are not 0 one product with all of them takes less time than the list
# (docs/measurements.md).
FIRED_MAX = 1 / 4


class Sums:
    """What is added up for each token of a block, float32 [tokens, width], zeros at first.

    In pieces of the width, each by itself in memory: one stays in a core's cache while rows are
    added to it, which it does not as a column of a matrix whose rows are a power of two apart.
    """

    def __init__(self, tokens: int, width: int, most: int):
        """Pieces of one size, `step`, at most `most` numbers, if it can be whole groups."""
        unit = GROUP if width % GROUP == 0 else 1
        units = width // unit
        counts = (n for n in range(1, units + 1) if units % n == 0 and width // n <= most)
        count = next(counts, units)
        self.width, self.step = width, width // count
        self.pieces = [torch.zeros(tokens, self.step) for _ in range(count)]

    def total(self) -> torch.Tensor:
        """float32 [tokens, width]."""
        return torch.cat(self.pieces, dim=1)


class Products:
    """Products with rows that begin anywhere in a contiguous array of numbers."""

    def __init__(self, threads: int, halved: Collection[np.dtype[Any]] = ()) -> None:
        """`halved`: the dtypes of rows that are multiplied with blocks in integers: blocks.py."""
        self._halved = frozenset(halved)
        self._helpers = threads - 1
        self._local = threading.local()
        self._tiled_room = TiledRoom()
        self._team = Team(threads - 1, "products") if threads > 1 else None

    def dot(self, items: Bits, starts: Starts, x: torch.Tensor) -> torch.Tensor:
        """The product of each row with `x` float32 [width]: float32 [rows]."""
        return self.dot_each([(items, starts)], x[None])[0][0]

    def dot_each(
        self, matrices: Sequence[tuple[Bits, Starts]], xs: torch.Tensor
    ) -> list[torch.Tensor]:
        """Of each of a few matrices the product of each row with each of a few vectors, `xs`
        float32 [vectors, width]: float32 [vectors, rows]. The threads meet once for all. What a
        vector comes to does not depend on those beside it, to the bit."""
        of = {items.dtype: items for items, _ in matrices}
        vectors = {dtype: vectors_for(items, xs.numpy()) for dtype, items in of.items()}
        given = [(items, starts, vectors[items.dtype]) for items, starts in matrices]
        return [torch.from_numpy(out)[: len(xs)] for out in self._dot(given)]

    def dot_few(self, items: Bits, starts: Starts, vectors: Vectors) -> Floats:
        """The same of one matrix, and of vectors as `vectors_for` made them."""
        return self._dot([(items, starts, vectors)])[0]

    def _dot(self, matrices: Sequence[tuple[Bits, Starts, Vectors]]) -> list[Floats]:
        count, size = 0, 0
        for items, starts, (xs, *_) in matrices:
            count += len(starts)
            size += xs.size * len(starts) * items.itemsize
        threads = self._threads_for(size)
        step, jobs, outs = self._step(count, threads, ROW_BLOCKS), [], []
        for items, starts, vectors in matrices:
            outs.append(np.empty((len(vectors[0]), len(starts)), np.float32))
            jobs.append(dot_job(items, starts, vectors, step, outs[-1]))
        self._do(jobs, threads if step < count else 1)
        return outs

    def add(self, items: Bits, starts: Starts, weights: Floats, out: Floats) -> None:
        """For each of a few vectors, out += the rows, each times its weight: `weights` float32
        [vectors, rows], `out` float32 [vectors, width], contiguous. Threads share the width, so
        that none adds where another does. To the bit what comes of each vector by itself with the
        rows whose weight is not 0."""
        few, width = out.shape
        count = len(starts) if few == 1 else int(np.count_nonzero(weights))
        threads = self._threads_for(count * width * items.itemsize)
        step = self._step(width, threads, WIDTH_BLOCKS)
        if few == 1:
            job = add_job(items, starts, weights[0], step, out[0])
        else:
            job = add_many_job(items, starts, weights, step, out)
        self._do([job], threads if step < width else 1)

    def few_at_most(self, items: Bits) -> int:
        """How many tokens of a sequence are few."""
        if items.dtype in self._halved:
            return (FEW_HALVED if amx.usable() else FEW_ROUNDED)[items.dtype]
        return FEW.get(items.dtype, FEW_FLOATS)

    def tokens(self, rows: torch.Tensor) -> Tokens:
        """A block's tokens, float [tokens, width], as `dot_block` takes them."""
        return Tokens(rows, self.share, self._tiled_room)

    def dot_block(self, items: Bits, starts: Starts, tokens: Tokens, take: Take) -> None:
        """The product of each row with each token. Threads share the rows; each gives those that it
        has made to `take`, and what that does is shared, too."""
        if items.dtype in self._halved:
            make = tokens.in_integers(items, self._room)
        else:
            make = self._in_floats(items, tokens.columns)

        def multiply(first: int, end: int) -> None:
            take(first, end, make(starts[first:end]))

        self.share(len(starts), CHUNK_ROWS, multiply)

    def _in_floats(self, items: Bits, columns: torch.Tensor) -> Callable[[Starts], torch.Tensor]:
        width, count = columns.shape

        def make(starts: Starts) -> torch.Tensor:
            rows = self._widened(items, starts, width, 0, width)
            return torch.mm(rows, columns, out=self._room("made", (len(starts), count)))

        return make

    def sums(self, tokens: int, width: int) -> Sums:
        """For `add_block`: a piece for each thread at least."""
        return Sums(tokens, width, min(CHUNK_WIDTH, -(-width // (self._helpers + 1))))

    def add_block(self, items: Bits, starts: Starts, weights: torch.Tensor, sums: Sums) -> None:
        """Adds for each token the rows, each times its weight: `weights` float32 [rows, tokens].
        Threads share the width, so that none adds where another does."""
        given = weights.contiguous().numpy()
        fired = list_fired(items, starts, given, sums.step, int(given.size * FIRED_MAX))

        def add(first: int, end: int) -> None:
            for at, piece in enumerate(sums.pieces[first:end], first):
                begin = at * sums.step
                if fired is None:
                    rows = self._widened(items, starts, sums.width, begin, begin + sums.step)
                    piece.addmm_(weights.T, rows)
                else:
                    room = self._room("fired", (TILE_ROWS, sums.step)).numpy()
                    add_fired(items, fired, sums.width, begin, room, piece.numpy())

        self.share(len(sums.pieces), 1, add)

    def share(self, count: int, step: int, work: Callable[[int, int], None]) -> None:
        """Does torch's `work` for all of `count` items, at most `step` at a time, by all
        threads."""

        def do(first: int, end: int) -> None:
            with torch.inference_mode():  # which is a thread's own
                work(first, end)

        self._spread(count, min(step, max(-(-count // (self._helpers + 1)), 1)), do)

    def _widened(
        self, items: Bits, starts: Starts, width: int, first: int, end: int
    ) -> torch.Tensor:
        """Of rows of `width` numbers those from `first` to `end`, as float32 [rows, end - first];
        until the thread's next."""
        rows = self._room("rows", (len(starts), end - first))
        widen_rows(items, starts, width, first, rows.numpy())
        return rows

    def _room(
        self, name: str, shape: tuple[int, int], dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Memory of the thread's own, [rows, width], whatever is in it; until it asks again."""
        room: torch.Tensor | None = getattr(self._local, name, None)
        if room is None or len(room) < math.prod(shape):
            pages = large_pages(math.prod(shape) * dtype.itemsize)
            room = torch.from_numpy(pages.view(torch.empty(0, dtype=dtype).numpy().dtype))
            setattr(self._local, name, room)
        return room[: math.prod(shape)].view(shape)

    def pack(self, rows: npt.NDArray[np.float32], items: Bits, starts: Starts) -> None:
        """Packs `rows` float32 [rows, width] into `items`: row i begins at starts[i]."""

        def pack(first: int, end: int) -> None:
            pack_rows(rows[first:end], items, starts[first:end])

        step = self._step(len(rows), self._threads_for(rows.nbytes), ROW_BLOCKS)
        self._spread(len(rows), step, pack)

    def _threads_for(self, size_bytes: int) -> int:
        """How many threads have a part worth meeting for in work on so many bytes of weights."""
        return max(min(size_bytes // THREAD_BYTES_MIN, self._helpers + 1), 1)

    def _step(self, count: int, threads: int, blocks: int) -> int:
        """Items of a block, of `count`: so many blocks for each thread."""
        if threads == 1:
            return max(count, 1)
        step = -(-count // (blocks * threads))
        return -(-step // GROUP) * GROUP  # cache lines, too

    def _spread(self, count: int, step: int, work: Callable[[int, int], None]) -> None:
        if self._team is None or count <= step:
            for first in range(0, count, step):
                work(first, min(first + step, count))
            return
        blocks = iter(range(0, count, step))

        def take() -> None:
            for first in blocks:  # taking one is a single step of the interpreter
                work(first, min(first + step, count))

        self._team.call(take)

    def do(self, job: Job, size_bytes: int) -> None:
        """Has a job done by as many threads as work on so many bytes is worth."""
        self._do([job], self._threads_for(size_bytes))

    def _do(self, jobs: Sequence[Job], threads: int) -> None:
        """Has jobs done by so many threads, this one among them."""
        if threads > 1 and self._team is not None:
            self._team.do(jobs, threads - 1)
        else:
            perform(listed(jobs)[1:])


def bits_of(values: torch.Tensor) -> Bits:
    """The numbers of a contiguous tensor as the kernels take them, flat, not copied."""
    name = str(values.dtype).removeprefix("torch.")
    flat = values.detach().view(-1)  # no copy: raises for what is not contiguous
    if values.element_size() == 2:
        flat = flat.view(torch.int16)
    return flat.numpy().view(BITS[name])
