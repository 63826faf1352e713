"""Compute's loop: takes an admitted request, generates, says Done; one request at a time.

Owns resident weights and the KV cache. Listens for Abort between the parts of a layer, so that a
cancelled request ends within a layer.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import deque

import torch

from common.kernels import compile_for
from common.lifecycle import Service
from common.limits import POLL_S, PREFILLING_EVERY_S, QUEUE_MAX
from common.messages import Abort, Admit, Done, Token
from common.packed import compile_packed
from common.plan import make_plan
from common.spans import NO_LAYER
from common.store.store import Store, read_end_ids
from common.system import cores
from services.compute.failures import StepAbortedError, StepFailedError
from services.compute.generation import Generation, prompt_of
from services.compute.kv import Kept
from services.compute.linear import choose_int8
from services.compute.model import load_model
from services.compute.pipeline import Pipeline
from services.compute.products import Products
from services.compute.waits import LayerWaits


def serve(service: Service, store: Store) -> None:
    """Runs until asked to stop."""
    threads = service.settings.threads or cores()
    torch.set_num_threads(1)  # the products' threads are ours: see products.py
    loop = ComputeLoop(service, store, Products(threads))
    with torch.inference_mode():
        loop.run()


class ComputeLoop:
    def __init__(self, service: Service, store: Store, products: Products):
        self._service = service
        self._store = store
        self._control = service.receive_from("control")
        self._answers = service.send_to("answers")
        plan = make_plan(service.settings, store)
        compile_for(store.geometry.dtype, store.geometry.compute_dtype)
        if store.geometry.packed or service.settings.resident != "float":
            compile_packed()
        self._pipeline = Pipeline(service, store.geometry, sum(plan.slots), products)
        self._context, self._block = plan.context, plan.block
        store.check_digests()
        self._model = load_model(store, self._pipeline, products, service.settings.resident)
        if probe := choose_int8(self._model):
            service.log.info("int8 products", way=probe.way, **dataclasses.asdict(probe))
        self._vocabulary = int(self._model.config.vocab_size)
        self._kv = Kept(store.geometry.layers, self._context)
        self._end_ids = read_end_ids(store.config_dir)
        self._told = 0.0  # when the gateway last heard how far a prompt is
        self._waiting: deque[Admit] = deque()
        self._aborted: set[int] = set()
        # Not from 1: a reader that outlived a server must not take our steps for its own.
        self._step = 0
        self._steps = itertools.count(time.time_ns())

    def run(self) -> None:
        self._pipeline.attach()
        self._service.ready(self._store.id)
        while self._service.running():
            if not self._waiting:
                self._control.socket.poll(int(POLL_S * 1000))
            self._take_control()
            if self._waiting:
                self._generate(self._waiting.popleft())

    def _take_control(self) -> None:
        """Takes what the gateway has said; keeps in mind what is aborted before its turn."""
        for message in self._control.receive():
            if isinstance(message, Abort):
                self._aborted.add(message.request)
            elif self._is_sound(message) and len(self._waiting) < QUEUE_MAX:
                self._waiting.append(message)
            else:  # not from our gateway; but if it is, it has an end to hear of
                self._service.count("bad_messages")
                generation = self._generation(message)
                self._finish(message.request, generation, "failed", "compute", "not admitted")

    def _is_sound(self, admit: Admit) -> bool:
        tokens = len(admit.prompt) // 4
        if len(admit.prompt) % 4 or not 0 < tokens < self._context:
            return False
        ids = torch.frombuffer(bytearray(admit.prompt), dtype=torch.int32)
        forced = max(admit.sampling.forced, default=0)
        return int(ids.min()) >= 0 and max(int(ids.max()), forced) < self._vocabulary

    def _generate(self, admit: Admit) -> None:
        laps = self._pipeline.laps
        laps.begin(admit.request, admit.trace)
        self._told = time.monotonic()
        prompt = prompt_of(admit)
        reused = self._kv.begin(prompt if self._service.settings.reuse == "on" else prompt[:0])
        generation = self._generation(admit, reused)
        self._service.count("reused_tokens", generation.reused)
        reason, failed_by, error = "", "", ""
        try:
            for index, choice in enumerate(generation.tokens()):
                laps.lap("sample")
                logits = choice.logits.numpy().tobytes() if admit.logits else b""
                token = Token(admit.request, self._step, choice.token_id, choice.logprob, logits)
                self._answers.send(token)
                self._service.count("tokens")
                aborted = self._is_aborted(admit.request)
                laps.lap("send")
                laps.token(index)
                if aborted:
                    raise StepAbortedError
            reason = generation.reason
        except StepAbortedError:
            self._pipeline.drop()
            reason = "cancelled"
        except StepFailedError as failure:
            self._pipeline.drop()
            reason, failed_by, error = "failed", failure.service, str(failure)
            self._service.log.warning("request failed", request=admit.request, reason=error)
        self._aborted.discard(admit.request)
        if not self._waiting:  # what is left were aborts of requests that are over
            self._aborted.clear()
        self._finish(admit.request, generation, reason, failed_by, error)

    def _generation(self, admit: Admit, reused: int = 0) -> Generation:
        def step(tokens: torch.Tensor, position: int) -> tuple[torch.Tensor, list[LayerWaits]]:
            return self._run_step(generation, tokens, position)

        generation = Generation(admit, step, self._end_ids, self._context, self._block, reused)
        return generation

    def _finish(
        self, request: int, generation: Generation, reason: str, failed_by: str, error: str
    ) -> None:
        self._answers.send(Done(request, reason, failed_by, error, generation.stats()))

    def _is_aborted(self, request: int) -> bool:
        self._take_control()
        return request in self._aborted or not self._service.running()

    def _run_step(
        self, generation: Generation, tokens: torch.Tensor, position: int
    ) -> tuple[torch.Tensor, list[LayerWaits]]:
        """One forward pass: see generation.Step."""
        request = generation.admit.request
        self._step = next(self._steps)
        laps = self._pipeline.laps
        laps.step, began_ns = self._step, laps.at_ns
        self._pipeline.begin(
            request,
            self._step,
            lambda: self._is_aborted(request),
            lambda layer: self._layer_over(generation, layer),
        )
        output = self._model(
            input_ids=tokens[None],
            position_ids=torch.arange(position, position + len(tokens))[None],
            past_key_values=self._kv.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._kv.hold(tokens, position)
        product_ns = laps.product_time.take()
        laps.lap("head", NO_LAYER, product_ns)
        laps.since("step", began_ns, NO_LAYER, len(tokens))
        self._pipeline.waits[-1].compute_ns += product_ns
        self._count(self._pipeline.waits)
        return output.logits[0, -1].float(), self._pipeline.waits

    def _layer_over(self, generation: Generation, layer: int) -> None:
        """Tells now and then how far a prompt is."""
        now = time.monotonic()
        if not generation.new_tokens and now - self._told >= PREFILLING_EVERY_S:
            self._told = now
            layers = self._store.geometry.layers
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
