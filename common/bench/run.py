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
from pathlib import Path
from typing import Any

import numpy as np

from common import probes
from common.bench import ablation, contenders, floors, made, studies
from common.bench.caps import check_cap, default_cap
from common.bench.contenders import Contender, Work, run_rounds
from common.bench.figures import Figures, summarise, summarise_inflash
from common.bench.made import Made, Shape, shape_of
from common.bench.names import GGUF, NAMES, NOT_ASKED, OURS, PACKED, UNCAPPED
from common.bench.options import (
    Options,
    capped_runs,
    check,
    clients_context,
    prefill_context,
    server_settings,
)
from common.bench.studies import PREFILL_FIELD, PREFILL_TOKENS
from common.cgroup import machine_bytes
from common.errors import UserError
from common.model.convert import Report
from common.store.store import Store
from common.system import cores, processor
from inflash import __version__

SERIAL = "inflash, no look-ahead"
PROMPT_SEED = 7


def bench(options: Options, report: Report) -> Figures:
    """The report's object. `UserError` for what cannot be done, as far as it can be known before
    the work."""
    shape = shape_of(options.shape)
    check(options, shape)
    cap_bytes = options.cap_bytes or default_cap(shape, capped_runs(options, shape, None))
    check_cap(shape, cap_bytes, capped_runs(options, shape, cap_bytes))
    if options.cap_bytes is None:
        report.note(f"a cap of {cap_bytes:,} bytes")
    absent = _absent(options)
    facts = machine()  # before any work of ours is the machine's load
    options.work.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="inflash-bench-")))
        ready = made.make(
            shape, options.work, options.python,
            [name for name in options.names if not absent.get(name)], report,
            checkpoint=options.everything_cached,
        )  # fmt: skip
        if options.remove:
            stack.callback(shutil.rmtree, ready.folder)
        found = _Bench(options, shape, ready, cap_bytes, folder, report).run(absent)
        return found | {"machine": facts}


def _absent(options: Options) -> dict[str, str]:
    """Of each rival that is asked for, why it cannot be run at all; "" if it can."""
    asked = [name for name in options.names if name not in OURS]
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
        self.settings = self._settings_for(options.prompt + options.tokens + 1)
        self.cores = cores()
        self.runs = functools.partial(run_rounds, rounds=options.rounds, tell=report.note)

    def run(self, absent: Mapping[str, str]) -> Figures:
        found = self._head()
        found["planted"] = self._planted()
        found |= self._contenders(absent)
        if self.options.prefill:
            found["prefill"] = self._prefill(found["contenders"])
        if self.options.clients:
            found |= self._clients()
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

    def _planted(self) -> list[Figures]:
        """The plant's rows; `measured_int8` is what a packed store was measured to be."""
        rows = made.check_planted(self.made, "", self.report.note)
        for packed in (PACKED[name] for name in self.options.names if name in PACKED):
            theirs = made.check_planted(self.made, packed, self.report.note)
            for row, other in zip(rows, theirs, strict=True):
                row[f"measured_{packed}"] = other["measured"]
        return rows

    def _contenders(self, absent: Mapping[str, str]) -> Figures:
        """The comparison, and the floors of what inflash did in it."""
        options = self.options
        ours = [name for name in options.names if name in OURS]
        ask = functools.partial(
            self._ours, work=self._work(options.tokens), prompts=options.prompts, warm=True
        )
        own = [ask("inflash", self.settings), ask(SERIAL, self.settings | {"lookahead": "off"})]
        own += [ask(name, self.settings) for name in ours[1:]]
        work = self._work(options.rival_tokens)
        runs = self.runs([*own, *(self._rival(name, work) for name in self._present(absent))])
        measured, serial = (summarise_inflash(runs[name]) for name in ("inflash", SERIAL))
        for figures in (measured, serial):
            if "failed" in figures:
                raise UserError(f"inflash did not run: {figures['failed']}")
        self.report.note("measuring the floors: drive and memory")
        drive, memory = probes.measure_drive(self.made.store), probes.measure_memory()
        limits = floors.make_floors(self.store, measured, drive, memory)
        result: Figures = {}
        for name in NAMES:
            why = absent.get(name, "" if name in options.names else NOT_ASKED)
            sum_up = summarise_inflash if name in OURS else summarise
            result[name] = {"absent": why} if why else sum_up(runs[name])
        return {
            "contenders": result,
            "floors": limits,
            "serial_ms": serial["ms_per_token"],
            "serial": serial,
            "overlap_efficiency": floors.overlap_efficiency(
                serial["ms_per_token"], measured["ms_per_token"], limits
            ),
        }

    def _prefill(self, result: Figures) -> Figures:
        """A long prompt's time of each contender that has run; it goes into `result`, too."""
        self.report.note(f"a prompt of {PREFILL_TOKENS} tokens")
        work = self._work_of(PREFILL_TOKENS, 1)
        settings = self._settings_for(prefill_context()) | {"reuse": "off"}
        asked = [
            self._ours(name, settings, work) if name in OURS else self._rival(name, work)
            for name, figures in result.items()
            if "ms_per_token" in figures
        ]
        found = studies.prefill(asked, self.runs)
        for name, figures in found.items():
            result[name][PREFILL_FIELD] = figures.get(PREFILL_FIELD)
        return {"tokens": PREFILL_TOKENS, "contenders": found}

    def _clients(self) -> Figures:
        """`clients` are inflash's, `packed_clients` by name those of ours whose weights are."""
        counts, work = self.options.clients, self._work(self.options.tokens)
        self.report.note(f"{', '.join(map(str, counts))} clients at once")
        settings = self._settings_for(clients_context(self.options))
        ours = [name for name in self.options.names if name in OURS]
        asked = [self._ours(name, settings, work, clients=counts) for name in ours]
        found = studies.clients(asked, counts, self.runs)
        return {"clients": found.pop("inflash"), "packed_clients": found}

    def _present(self, absent: Mapping[str, str]) -> list[str]:
        """The rivals that can run."""
        return [name for name, why in absent.items() if not why]

    def _ours(self, name: str, settings: Mapping[str, str], work: Work, **how: Any) -> Contender:
        """One of ours under the cap, by its name on the store that is packed so."""
        packed = PACKED.get(name, "")
        own = {"resident": packed} if packed else {}
        store = self.made.packed_store(packed)
        return contenders.inflash(name, store, work, {**settings, **own}, self.cap, **how)

    def _rival(self, name: str, work: Work) -> Contender:
        python = self.options.python
        if name == "accelerate":
            offload = self.scratch / "offload"
            return contenders.accelerate(self.made.checkpoint, offload, work, self.cap, python)
        cap = None if name in UNCAPPED else self.cap
        return contenders.llama_cpp(name, self.made.gguf(GGUF[name]), work, cap, python)

    def _settings_for(self, context: int) -> dict[str, str]:
        return server_settings(self.options, self.cap, context)

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
            ready = made.make(shape, options.work, options.python, (), self.report)
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
