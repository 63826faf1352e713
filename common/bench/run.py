"""A whole bench: makes what it runs on, runs the contenders by turns, measures the floors, and puts
the report's object together. It prints nothing; what it has to say on the way goes to `report`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common import probes
from common.bench import ablation, contenders, floors, made, studies
from common.bench.contenders import RIVALS, Contender, Work, run_rounds
from common.bench.figures import Figures, summarise, summarise_inflash
from common.bench.made import Made, Shape, shape_of
from common.cgroup import machine_bytes
from common.config import read_settings
from common.errors import SettingError, UserError
from common.model.convert import Report
from common.plan import make_plan
from common.store.store import Store
from common.system import cores, processor
from inflash import __version__

NAMES = ("inflash", *RIVALS)
SERIAL = "inflash, no look-ahead"
CAP_SHARE = 2  # the default cap is half of the checkpoint
CAP_BYTES_MIN = 1_200_000_000  # processes and their libraries take half of that
PROMPT_SEED = 7


@dataclass(frozen=True)
class Options:
    """What a bench is to do."""

    shape: str | Path  # a name, or a config.json
    work: Path
    cap_bytes: int | None = None  # None: half of the checkpoint
    tokens: int = 32  # of an answer
    rival_tokens: int = 8  # of whoever reads the whole model for each
    prompt: int = 64  # tokens
    prompts: int = 3
    rounds: int = 3
    names: tuple[str, ...] = NAMES  # of contenders
    settings: Mapping[str, str] = field(default_factory=dict)  # of inflash's server
    python: str = ""  # interpreter that has the rivals' packages
    ablation: bool = False
    placed: Path | None = None  # a store of the same model, made with `convert --placement`
    growth: bool = False
    context_cost: bool = False
    everything_cached: bool = False
    remove: bool = False  # what was made, at the end


def bench(options: Options, report: Report) -> Figures:
    """The report's object. `UserError` for what cannot be done, as far as it can be known before
    the work."""
    shape = shape_of(options.shape)
    cap_bytes = options.cap_bytes or default_cap(shape)
    check(options, shape, cap_bytes)
    absent = _absent(options)
    rivals = [name for name, why in absent.items() if not why]
    facts = machine()  # before any work of ours is the machine's load
    options.work.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="inflash-bench-")))
        ready = made.make(
            shape, options.work, options.python,
            checkpoint="accelerate" in rivals or options.everything_cached,
            gguf=any(name.startswith("llama_cpp") for name in rivals),
            report=report,
        )  # fmt: skip
        if options.remove:
            stack.callback(shutil.rmtree, ready.folder)
        found = _Bench(options, shape, ready, cap_bytes, folder, report).run(absent)
        return found | {"machine": facts}


def default_cap(shape: Shape) -> int:
    """Bytes of memory where none were asked for."""
    return max(CAP_BYTES_MIN, shape.checkpoint_bytes // CAP_SHARE)


def check(options: Options, shape: Shape, cap_bytes: int) -> None:
    """`UserError` for options that cannot go together, or that no server would take."""
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        raise UserError(f"--only: {', '.join(unknown)}: there are {', '.join(NAMES)}")
    if "inflash" not in options.names:
        raise UserError("--only: inflash is what the others are measured beside; name it, too")
    needed = options.prompt + options.tokens + 1
    if needed > shape.context:
        raise UserError(
            f"a prompt of {options.prompt:,} tokens and an answer of {options.tokens + 1:,} do not"
            f" fit into the context of {shape.name}, {shape.context:,}: choose smaller ones"
        )
    if cap_bytes > machine_bytes():
        raise UserError(
            f"--cap: {cap_bytes:,} bytes are more than this machine has, {machine_bytes():,}"
        )
    for key in ("store", "run_dir", "threads", "parent"):
        if key in options.settings:
            raise UserError(f"--set: {key} is the bench's own to choose")
    environ = {f"INFLASH_{key.upper()}": value for key, value in options.settings.items()}
    read_settings(environ | {"INFLASH_STORE": "unmade"})  # raises and names the key
    if options.placed is not None:
        Store.open(options.placed)


def _absent(options: Options) -> dict[str, str]:
    """Of each rival that is asked for, why it cannot be run at all; "" if it can."""
    asked = [name for name in options.names if name != "inflash"]
    absent = {name: contenders.absent(name, options.python) for name in asked}
    llama = [name for name in asked if name.startswith("llama_cpp") and not absent[name]]
    if llama:
        absent |= dict.fromkeys(llama, made.gguf_absent(options.python))
    return absent


class _Bench:
    """One bench under way, everything made."""

    def __init__(
        self, options: Options, shape: Shape, ready: Made, cap: int, scratch: Path, report: Report
    ):
        self.options, self.shape, self.made, self.cap = options, shape, ready, cap
        self.scratch, self.report = scratch, report
        self.store = Store.open(ready.store)
        # The promise that is measured: all of inflash in no more than the cap; room for as many
        # tokens as the others make room for.
        context = options.prompt + options.tokens + 1
        self.settings = {"memory": f"{cap}", "context": f"{context}"} | dict(options.settings)
        self.cores = cores()
        self.runs = functools.partial(run_rounds, rounds=options.rounds, tell=report.note)

    def run(self, absent: Mapping[str, str]) -> Figures:
        self._check_fits()
        found = self._head()
        found["planted"] = made.check_planted(self.made, self.report.note)
        found |= self._contenders(absent)
        if self.options.ablation:
            found["ablation"] = self._ablation()
        if self.options.context_cost:
            found["context_cost"] = studies.context_cost(
                self.made.store, self.shape.context, self._work_of, self.settings, self.cap,
                self.runs,
            )  # fmt: skip
        if self.options.everything_cached:
            found["everything_cached"] = self._everything_cached()
        if self.options.growth:
            found["growth"] = list(self._growth())
        return found

    def _check_fits(self) -> None:
        """`UserError` if a server would refuse the cap, with the smallest that would work, or if
        the placed store is of another model."""
        environ = {f"INFLASH_{key.upper()}": value for key, value in self.settings.items()}
        environ["INFLASH_STORE"] = str(self.made.store)
        try:
            make_plan(read_settings(environ), self.store)
        except SettingError as error:
            raise UserError(f"inflash cannot run under the cap of {self.cap:,}: {error}") from None
        placed = self.options.placed
        if placed is not None and Store.open(placed).geometry != self.store.geometry:
            raise UserError(f"--placed: {placed} is not a store of {self.shape.name}")

    def _head(self) -> Figures:
        options, geometry = self.options, self.store.geometry
        return {
            "inflash": __version__,
            "shape": self.shape.name,
            "cap_bytes": self.cap,
            "checkpoint_bytes": self.shape.checkpoint_bytes,
            "ffn_bytes": geometry.ffn_bytes,
            "layers": geometry.layers,
            "neurons": geometry.neurons,
            "stride_bytes": geometry.stride_bytes,
            "tokens": options.tokens,
            "rival_tokens": options.rival_tokens,
            "prompt_tokens": options.prompt,
            "prompts": options.prompts,
            "rounds": options.rounds,
            "settings": dict(options.settings),
        }

    def _contenders(self, absent: Mapping[str, str]) -> Figures:
        """The comparison, and the floors of what inflash did in it."""
        options, work = self.options, self._work(self.options.tokens)
        ask = functools.partial(
            contenders.inflash, store=self.made.store, work=work, cap_bytes=self.cap,
            prompts=options.prompts, warm=True,
        )  # fmt: skip
        own = [
            ask("inflash", settings=self.settings),
            ask(SERIAL, settings=self.settings | {"lookahead": "off"}),
        ]
        rivals = [self._rival(name) for name, why in absent.items() if not why]
        runs = self.runs([*own, *rivals])
        measured, serial = (summarise_inflash(runs[one.name]) for one in own)
        for figures in (measured, serial):
            if "failed" in figures:
                raise UserError(f"inflash did not run: {figures['failed']}")
        self.report.note("measuring the floors: drive and memory")
        drive, memory = probes.measure_drive(self.made.store), probes.measure_memory()
        limits = floors.make_floors(self.store, measured, drive, memory)
        result: Figures = {"inflash": measured}
        for name in RIVALS:
            why = absent.get(name, "not asked for")
            result[name] = {"absent": why} if why else summarise(runs[name])
        return {
            "contenders": result,
            "floors": limits,
            "serial_ms": serial["ms_per_token"],
            "serial": serial,
            "overlap_efficiency": floors.overlap_efficiency(
                serial["ms_per_token"], measured["ms_per_token"], limits
            ),
        }

    def _rival(self, name: str) -> Contender:
        python, work = self.options.python, self._work(self.options.rival_tokens)
        if name == "accelerate":
            offload = self.scratch / "offload"
            return contenders.accelerate(self.made.checkpoint, offload, work, self.cap, python)
        mode = name.removeprefix("llama_cpp_")
        cap = None if mode == "ram" else self.cap
        return contenders.llama_cpp(mode, self.made.gguf, work, cap, python)

    def _ablation(self) -> list[Figures]:
        placed = self.options.placed
        steps = ablation.make_steps(self.store.geometry, placed)
        asked = ablation.make_contenders(
            steps, (self.made.store, placed), self._work(self.options.tokens),
            self._work(self.options.rival_tokens), self.settings, self.cap,
        )  # fmt: skip
        self.report.note("ablation")
        return ablation.make_rows(steps, self.runs(asked))

    def _everything_cached(self) -> Figures:
        python, work = self.options.python, self._work(self.options.tokens)
        why = contenders.absent("plain", python)
        plain = why or contenders.plain(
            self.made.checkpoint, self._work(self.options.tokens), python
        )
        self.report.note("everything cached")
        return studies.everything_cached(
            self.made.store, self.store.geometry.layers, work, plain, self.runs
        )

    def _growth(self) -> Iterator[Figures]:
        options = self.options
        for name in studies.growing_shapes(self.shape):
            shape = shape_of(name)
            self.report.note(f"growth: {name}")
            ready = made.make(shape, options.work, options.python, False, False, self.report)
            work = self._work_of(options.prompt, options.tokens, shape=shape)
            yield studies.growth_row(shape, ready, work, self.runs)
            if options.remove and ready.folder != self.made.folder:
                shutil.rmtree(ready.folder)

    def _work(self, tokens: int) -> Work:
        return self._work_of(self.options.prompt, tokens)

    def _work_of(
        self,
        prompt: int,
        tokens: int | None = None,
        *,
        shape: Shape | None = None,
    ) -> Work:
        """A prompt of so many tokens, drawn; everybody computes on all cores."""
        vocabulary = (shape or self.shape).config.vocab_size
        path = self.scratch / f"prompt-{prompt}-{vocabulary}.json"
        ids = np.random.default_rng(PROMPT_SEED).integers(0, vocabulary, prompt)
        path.write_text(json.dumps(ids.tolist()))
        return Work(path, self.options.tokens if tokens is None else tokens, self.cores)


def machine() -> Figures:
    """What the figures depend on, and what else was running."""
    load: Any = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor(),
        "cores": cores(),
        "memory_bytes": machine_bytes(),
        "load_before": load,  # of the last minute, before the first run
        "python": platform.python_version(),
    }
