"""Compute's loop: takes admitted requests, runs them together, says Done of each.

A turn: a block of prompts, if there are any to compute; then a step that all requests share that
are past their prompts, a token of each. A block is as many prompts as it has room for, those first
that waited the longest: a layer is streamed once for all of them. Who comes when one has just begun
has it begin anew, once. So who comes waits for no answer, and who is answered waits at most a block
between two tokens.

Owns resident weights and the KV cache. Listens for Abort between the parts of a prompt's layer, so
that a cancelled request's client hears within a layer that it is over; a step is given up when all
of its requests are cancelled.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence as Many

import numpy as np
import torch

from common import amx
from common.errors import UserError
from common.fired import compile_fired
from common.firing import compile_firing
from common.heads import compile_heads
from common.jobs import compile_jobs
from common.kernels import BITS
from common.lifecycle import Service
from common.limits import (
    POLL_S,
    PREFILL_JOIN_SHARE,
    PREFILL_ROWS_SHARED_MAX,
    PREFILLING_EVERY_S,
    RUNNING_MAX,
)
from common.messages import Abort, Admit, Done, Token
from common.plan import make_plan
from common.spans import NO_LAYER, NO_STEP
from common.store.geometry import GROUP
from common.store.store import Store, read_end_ids
from common.system import cores
from inflash._messages import NO_STATS
from services.compute.awake import Awake
from services.compute.blocks import probe_blocks
from services.compute.failures import StepAbortedError, StepFailedError, StepJoinedError
from services.compute.generation import Choice, Generation, limit_of, prompt_of
from services.compute.kv import Sequences, shared
from services.compute.linear import choose_int8
from services.compute.model import load_model
from services.compute.pipeline import Pipeline
from services.compute.products import Products
from services.compute.waits import LayerWaits


def serve(service: Service, store: Store) -> None:
    """Runs until asked to stop."""
    threads = service.settings.threads or cores()
    probe = probe_blocks()
    service.log.info(
        "block products", integers=probe.names, tiles=amx.usable(), **dataclasses.asdict(probe)
    )
    products = Products(threads, probe.halved)
    _keep_apart(service)
    loop = ComputeLoop(service, store, products)
    with torch.inference_mode():
        loop.run()


def _keep_apart(service: Service) -> None:
    """After the helpers were started: this thread's core is not theirs."""
    apart = service.apart
    service.log.info("apart", reason=apart.reason)
    if service.settings.apart == "on" and apart.core is None:
        raise UserError(f"INFLASH_APART: on, but {apart.reason}")
    apart.take()


class ComputeLoop:
    def __init__(self, service: Service, store: Store, products: Products):
        self._service = service
        self._store = store
        self._control = service.receive_from("control")
        self._answers = service.send_to("answers")
        self._awake = Awake(service.settings.awake)
        service.log.info("awake", reason=self._awake.reason)
        plan = make_plan(service.settings, store)
        geometry, resident = store.geometry, service.settings.resident
        compile_heads(geometry.compute_dtype)
        compile_firing()
        compile_fired(np.zeros(2 * GROUP, BITS[geometry.number_format]))
        packed = ("int8", "int4") if resident != "float" else ()  # int4: some matrices are int8
        for number_format in {geometry.number_format, geometry.compute_dtype, *packed}:
            compile_jobs(BITS[number_format])
        self._pipeline = Pipeline(service, store.geometry, sum(plan.slots), products)
        self._context, self._block = plan.context, plan.block
        store.check_digests()
        self._model = load_model(store, self._pipeline, products, resident, plan.embedding)
        if probe := choose_int8(self._model):
            service.log.info("int8 products", way=probe.way, **dataclasses.asdict(probe))
        self._vocabulary = int(self._model.config.vocab_size)
        reuse = service.settings.reuse == "on"
        self._sequences = Sequences(store.geometry.layers, self._context, plan.kv_tokens, reuse)
        self._end_ids = read_end_ids(store.config_dir)
        self._arrived: dict[int, Admit] = {}  # by request, in order; not yet begun
        self._running: dict[int, Generation] = {}  # by request, in order of their begin
        # Not from 1: a reader that outlived a server must not take our steps for its own.
        self._steps = itertools.count(time.time_ns())

    def run(self) -> None:
        self._pipeline.attach()
        self._service.ready(self._store.id)
        while self._service.running():
            if not self._running and not self._arrived:
                self._control.socket.poll(int(POLL_S * 1000))
            self._take_control()
            self._awake.keep(bool(self._running or self._arrived))
            for generation in list(self._running.values()):
                if generation.aborted:
                    self._end(generation, "cancelled")
            for number in list(self._arrived):
                self._begin(self._arrived.pop(number))
            self._turn()

    def _take_control(self) -> None:
        """Takes what the gateway has said. May be called within a step: begins and ends nothing."""
        for message in self._control.receive():
            number = message.request
            if isinstance(message, Abort):
                if number in self._running:
                    self._running[number].aborted = True
                elif admit := self._arrived.pop(number, None):
                    self._finish(admit, "cancelled")
            elif self._is_sound(message):
                self._arrived[number] = message
            else:  # not from our gateway; but if it is, it has an end to hear of
                self._service.count("bad_messages")
                if number not in self._running and number not in self._arrived:
                    self._finish(message, "failed", "compute", "not admitted")

    def _is_sound(self, admit: Admit) -> bool:
        tokens = len(admit.prompt) // 4
        if len(admit.prompt) % 4 or not 0 < tokens < self._context:
            return False
        if admit.request in self._running or admit.request in self._arrived:
            return False
        if len(self._running) + len(self._arrived) >= 2 * RUNNING_MAX:
            return False
        ids = torch.frombuffer(bytearray(admit.prompt), dtype=torch.int32)
        forced = max(admit.sampling.forced, default=0)
        return int(ids.min()) >= 0 and max(int(ids.max()), forced) < self._vocabulary

    def _begin(self, admit: Admit) -> None:
        """A request gets its place in the KV cache."""
        laps, prompt = self._pipeline.laps, prompt_of(admit)
        laps.begin(admit.request, admit.trace)
        laps.turn([admit.request], NO_STEP)
        sequence = None
        if len(self._running) < RUNNING_MAX:
            tokens = len(prompt) + limit_of(admit, self._context)
            sequence = self._sequences.begin(prompt, tokens)
        if sequence is None:  # the gateway counts as we do: this one is not from ours
            laps.end(admit.request)
            self._service.count("bad_messages")
            self._finish(admit, "failed", "compute", "not admitted: there is no room for it")
            return
        generation = Generation(admit, sequence, self._end_ids, self._context)
        self._running[admit.request] = generation
        self._service.count("reused_tokens", generation.reused)
        laps.lap("admit", NO_LAYER, generation.reused)

    def _end(
        self, generation: Generation, reason: str, failed_by: str = "", error: str = ""
    ) -> None:
        del self._running[generation.request]
        self._pipeline.laps.end(generation.request)
        self._sequences.end(generation.sequence)
        if error:
            number = generation.request
            self._service.log.warning("request failed", request=number, reason=error)
        if not generation.over:
            self._finish(generation.admit, reason, failed_by, error, generation)

    def _finish(
        self,
        admit: Admit,
        reason: str,
        failed_by: str = "",
        error: str = "",
        generation: Generation | None = None,
    ) -> None:
        stats = generation.stats() if generation else NO_STATS
        self._answers.send(Done(admit.request, reason, failed_by, error, stats))

    def _turn(self) -> None:
        """A block of prompts, then a token of every answer."""
        running = self._running.values()
        if prompts := [generation for generation in running if generation.left]:
            most = self._block
            if len(prompts) < len(running):
                most = min(most, PREFILL_ROWS_SHARED_MAX)
            prompts.sort(key=lambda generation: generation.last_step)
            before = itertools.accumulate((generation.left for generation in prompts), initial=0)
            some = [g for g, tokens in zip(prompts, before, strict=False) if tokens < most]
            self._run(some, most)
        if answers := [generation for generation in running if not generation.left]:
            self._run(answers, len(answers))

    def _run(self, generations: Many[Generation], most: int) -> None:
        """A step of these requests: a token of each, or of their prompts `most`, together."""
        try:
            logits = self._run_model(generations, most)
        except StepAbortedError:
            self._pipeline.drop()
            for generation in generations:
                self._end(generation, "cancelled")
            return
        except StepJoinedError:
            self._pipeline.drop()
            for generation in generations:
                generation.sequence.keep(generation.sequence.count, generation.sequence.room)
                generation.anew = True
            return
        except StepFailedError as failure:
            self._pipeline.drop()
            for generation in generations:
                self._end(generation, "failed", failure.service, str(failure))
            return
        self._choose(generations, logits)

    def _choose(self, generations: Many[Generation], logits: torch.Tensor) -> None:
        """The next token of each that is past its prompt, by `logits` float32 [requests,
        vocabulary]."""
        laps, chosen = self._pipeline.laps, list[tuple[Generation, Choice]]()
        for generation in generations:
            if generation.over:
                self._end(generation, "cancelled")
        each = zip(generations, logits, strict=True)
        past = [(g, row) for g, row in each if not (g.over or g.left)]
        if not past:
            return
        for generation, row in past:
            try:
                chosen.append((generation, generation.choose(row)))
            except StepFailedError as failure:
                self._end(generation, "failed", failure.service, str(failure))
        sampling_ns = laps.lap("sample")
        for generation, choice in chosen:
            self._send(generation, choice)
            generation.spent(sampling_ns, laps.others_ns(generation.request))
        self._take_control()
        laps.lap("send")
        for generation, _ in chosen:
            laps.token(generation.request, generation.new_tokens - 1)
            if generation.aborted or generation.reason:
                self._end(generation, "cancelled" if generation.aborted else generation.reason)

    def _send(self, generation: Generation, choice: Choice) -> None:
        logits = choice.logits.numpy().tobytes() if generation.admit.logits else b""
        number, step = generation.request, generation.last_step
        self._answers.send(Token(number, step, choice.token_id, choice.logprob, logits))
        self._service.count("tokens")

    def _run_model(self, generations: Many[Generation], most: int) -> torch.Tensor:
        """One forward pass: the logits after each request's newest token, float32 [requests,
        vocabulary]. Raises StepFailedError, StepAbortedError and StepJoinedError."""
        step, laps, pipeline = next(self._steps), self._pipeline.laps, self._pipeline
        numbers = tuple(generation.request for generation in generations)
        laps.turn(numbers, step)
        began_ns = laps.at_ns
        parts = list[tuple[torch.Tensor, int]]()
        for generation in generations:
            parts.append(generation.next(most))
            most -= generation.block
        counts = [len(tokens) for tokens, _ in parts]
        ends = torch.tensor(counts).cumsum(0)
        pipeline.begin(
            numbers,
            counts,
            step,
            lambda: self._are_aborted(generations),
            lambda layer: self._layer_over(generations, layer, most),
        )
        output = self._model(
            input_ids=torch.cat([tokens for tokens, _ in parts])[None],
            position_ids=torch.cat([torch.arange(p, p + len(tokens)) for tokens, p in parts])[None],
            past_key_values=shared([generation.sequence for generation in generations], counts),
            use_cache=True,
            logits_to_keep=ends - 1,
        )
        product_ns = laps.product_time.take()
        laps.lap("head", NO_LAYER, product_ns)
        laps.since("step", began_ns, NO_LAYER, sum(counts))
        pipeline.waits[-1].compute_ns += product_ns
        self._count(pipeline.waits)
        for row, (generation, (tokens, position)) in enumerate(
            zip(generations, parts, strict=True)
        ):
            waits = [layer.share(row, len(generations)) for layer in pipeline.waits]
            generation.went(tokens, position, waits)
            generation.last_step = step
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def _are_aborted(self, generations: Many[Generation]) -> bool:
        """Whether all are, or this service is to end. Of some the clients hear at once; what is
        computed for them is put away when the step is over."""
        self._take_control()
        if all(g.aborted for g in generations) or not self._service.running():
            return True
        for generation in generations:
            if generation.aborted and not generation.over:
                generation.over = True
                self._finish(generation.admit, "cancelled", generation=generation)
        return False

    def _layer_over(self, generations: Many[Generation], layer: int, room: int) -> None:
        """Tells now and then how far prompts are. Raises StepJoinedError if it is early, and a
        prompt has come that fits into the `room` that is left in the block."""
        now, layers = time.monotonic(), self._store.geometry.layers
        early = layer < max(layers // PREFILL_JOIN_SHARE, 1)
        fits = any(len(admit.prompt) // 4 <= room for admit in self._arrived.values())
        if early and fits and not any(generation.anew for generation in generations):
            raise StepJoinedError
        for generation in generations:
            if not generation.left or generation.over:
                continue
            if now - generation.told >= PREFILLING_EVERY_S:
                generation.told = now
                self._answers.send(generation.progress(layer + 1, layers, now))

    def _count(self, waits: list[LayerWaits]) -> None:
        """The counters of `inflash status`."""
        count = self._service.count
        count("steps")
        count("compute_us", sum(w.compute_ns for w in waits) // 1000)
        for cause in ("predictor", "queue", "flash"):
            count(f"stall_{cause}_us", sum(getattr(w, f"{cause}_ns") for w in waits) // 1000)
        count("fired", sum(w.fired for w in waits))
        count("late_fired", sum(w.late_fired for w in waits))
