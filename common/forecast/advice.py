"""The doctor's sentences: what inflash chose on this machine, and what to change. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from rich.filesize import decimal

from common.forecast.machine import Drive, Machine
from common.limits import READS_IN_FLIGHT_MAX
from common.system import DriveFacts, Limits

WAYS = {
    "aio": "directly and asynchronously (io_submit)",
    "threads": "directly, by threads (preadv)",
    "buffered": "by threads, through the page cache",
}
CORES_FEW = 4  # four processes share them
SLOW_PROMPT = 2.0  # so many times as long as in float32: worth a sentence
DRIVE_SLOW_BYTES_PER_S = 1e9
ERROR_LARGE = 0.35
WEAR_LARGE = 80  # percent
HOT_C = 70.0
OPEN_FILES_FEW = 512


def sentences(
    machine: Machine,
    facts: DriveFacts | None,
    limits: Limits,
    swapped_bytes: int | None,
) -> list[str]:
    """In order: what was chosen, what to change."""
    return [
        *_chosen(machine),
        *_drive(machine.drive, facts),
        *_processors(machine),
        *_limits(limits),
        *_swap(limits, swapped_bytes),
    ]


def warnings(facts: DriveFacts | None, limits: Limits, swapped_bytes: int | None) -> list[str]:
    """Those of them that say that something is wrong."""
    return [*_health(facts), *_limits(limits), *_swap(limits, swapped_bytes)]


def _chosen(machine: Machine) -> Iterator[str]:
    ways = machine.drive.ways
    worked = {way: speed for way, speed in ways.items() if isinstance(speed, float)}
    if worked:
        way = next(way for way in WAYS if way in worked)  # the reader's own order
        others = ", ".join(
            f"{decimal(int(speed))}/s {WAYS[other]}"
            for other, speed in worked.items() if other != way
        )  # fmt: skip
        yield (
            f"Bundles will be read {WAYS[way]}: {decimal(int(worked[way]))}/s"
            + (f", against {others}." if others else ".")
        )
        best = max(worked, key=lambda name: worked[name])
        if best != way and worked[best] > 1.2 * worked[way]:
            yield (
                f"Here reads {WAYS[best]} are faster: `inflash serve --backend"
                f" {'aio' if best == 'aio' else 'threads'}`."
            )
    for way, why in ways.items():
        if not isinstance(why, float):
            yield f"This drive cannot be read {WAYS[way]}: {why}."
    yield (
        f"The server's reader keeps {READS_IN_FLIGHT_MAX} reads in flight; compute's products go by"
        f" {machine.threads} threads, which give way to reader and predictor."
    )


def _drive(drive: Drive, facts: DriveFacts | None) -> Iterator[str]:
    alone = ""
    if drive.latency_us and drive.read_us:
        alone = f"; alone it takes {drive.latency_us:,.0f} µs, so depth is what makes it fast"
    kib_us = drive.byte_ns * 1024 / 1000
    yield (
        f"A read costs {drive.read_us:.1f} µs and {kib_us:.2f} µs a KiB with others in"
        f" flight{alone}."
    )
    small, large = drive.seconds(1, 4096) / 4096, 1 / drive.bytes_per_s
    if small > 3 * large:
        yield (
            f"Large reads are {small / large:.0f} times as fast per byte as those of 4 KiB: a model"
            " with wide rows suits this drive, and so does `inflash convert --placement`."
        )
    if drive.error > ERROR_LARGE:
        yield (
            f"Its speed does not follow from a read's size alone (off by {drive.error:.0%}): it is"
            " shared, or has a cache of its own; forecasts are rougher for it."
        )
    if facts and facts.rotational and drive.latency_us and drive.latency_us > 2000:
        yield "The drive is a rotating one: put stores on flash."
    elif drive.bytes_per_s < DRIVE_SLOW_BYTES_PER_S:
        yield (
            f"The drive gives {decimal(int(drive.bytes_per_s))}/s at best: a faster one, or more"
            " memory for the cache, is what helps a model that waits for reads."
        )
    yield from _health(facts)


def _health(facts: DriveFacts | None) -> Iterator[str]:
    if facts is None:
        return
    if facts.temperature_c is not None:
        limit = facts.temperature_max_c or HOT_C
        if facts.temperature_c >= min(limit - 5, HOT_C):
            yield (
                f"The drive is at {facts.temperature_c:.0f} °C: it slows down when it is hot; give"
                " it air."
            )
    if facts.wear_percent is not None and facts.wear_percent >= WEAR_LARGE:
        yield (
            f"{facts.wear_percent} % of the drive's life is used up. Serving reads only; converting"
            " and fitting write: keep a copy of what matters."
        )


def _processors(machine: Machine) -> Iterator[str]:
    if machine.cores < CORES_FEW:
        yield (
            f"Four processes share {machine.cores} cores: reads hide less under compute than they"
            " would with four or more."
        )
    half, single = machine.decode["float16"]["resident"], machine.decode["float32"]["resident"]
    longer = single / 4 / (half / 2)
    if longer > 1:
        yield (
            f"This processor has no fast half precision: a float16 matrix is multiplied at"
            f" {decimal(int(half))}/s, one of float32 at {decimal(int(single))}/s. A float16"
            f" model's resident weights take {longer:.1f} times as long as they would in float32,"
            " in half of its memory."
        )
    rows = machine.block_rows[-1]
    longer = 2 * machine.block["float16"]["resident"][-1]
    longer /= 4 * machine.block["float32"]["resident"][-1]
    if longer > SLOW_PROMPT:
        yield (
            f"A prompt of a float16 model takes {longer:.1f} times as long as one in float32"
            f" here (blocks of {rows} tokens): long prompts will be slow."
        )


def _limits(limits: Limits) -> Iterator[str]:
    if limits.memory_limited:
        yield (
            f"A cgroup allows {decimal(limits.memory_bytes)} of memory: budgets above it are"
            " killed, so keep --memory below it."
        )
    if limits.shm_free_bytes is not None and limits.shm_free_bytes < limits.memory_bytes // 2:
        yield (
            f"/dev/shm, where the cache lies, has {decimal(limits.shm_free_bytes)} free: a larger"
            " cache is refused. In a container: --shm-size; else: mount -o remount,size=…"
            " /dev/shm."
        )
    if limits.aio_events_max is not None:
        left = limits.aio_events_max - (limits.aio_events_used or 0)
        if left < 2 * READS_IN_FLIGHT_MAX:
            yield (
                f"Only {left} asynchronous reads are left to this machine's processes: raise"
                " fs.aio-max-nr (sysctl), or reads go by threads."
            )
    if limits.open_files is not None and limits.open_files < OPEN_FILES_FEW:
        yield (
            f"A process may open {limits.open_files} files, and a store has one for each layer:"
            " raise it (ulimit -n)."
        )


def _swap(limits: Limits, swapped_bytes: int | None) -> Iterator[str]:
    if swapped_bytes:
        yield (
            f"Warning: {decimal(swapped_bytes)} were written to swap while this ran. Memory is"
            " short: what is swapped out is read back in the middle of a token, and it wears the"
            " drive. Close something, or give --memory less."
        )
    elif limits.swap_bytes:
        yield (
            f"There are {decimal(limits.swap_bytes)} of swap; nothing was written to it while this"
            " ran."
        )
