"""The synchronous client."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zmq

from inflash._connection import GONE, is_disconnect, no_status, not_found, open_socket
from inflash._errors import ServerLost, ServerNotFound
from inflash._generation import End, GenerationState, OnPrefill, Token
from inflash._messages import StatusReply
from inflash._rundir import default_run_dir
from inflash._sampling import make_sampling
from inflash._session import FIND_S, Mailbox, Prompt, Session
from inflash._wire import Raw


class Generation(GenerationState):
    """An answer on its way: an iterator of `Token`.

    It ends by itself, after `cancel`, or with `RequestFailed` (`RequestRefused`, `ServerLost`).
    As a context manager it cancels, on leaving, an answer that is not over.
    """

    def __init__(self, client: Client, mailbox: Mailbox, on_prefill: OnPrefill | None):
        super().__init__(mailbox, on_prefill)
        self._client = client

    def cancel(self) -> None:
        """Asks the server to stop; the iterator then ends with finish_reason "cancelled"."""
        self._client._cancel(self._mailbox.number)

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Token:
        try:
            while (token := self._take()) is None:
                self._client._turn()
        except End:
            raise StopIteration from None
        return token

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._over:
            self.cancel()


class Client:
    """A connection to the server in `run_dir`, by default where `inflash serve` puts it.

        with inflash.Client() as client:
            for token in client.generate("def add(a, b):"):
                print(token.text, end="", flush=True)

    `timeout`: seconds that a connected but silent server has to answer a status request; it does
    not limit an answer. Raises `ServerNotFound`. Several generations may be under way at once, in
    one thread: a client is not for two threads.
    """

    def __init__(self, run_dir: str | Path | None = None, timeout: float = 60):
        self.run_dir = default_run_dir() if run_dir is None else Path(run_dir).absolute()
        self.timeout = timeout
        self._numbers = itertools.count(1)
        self._session = Session(timeout, time.monotonic(), self._numbers)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 128,
        temperature: float = 0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        forced: Sequence[int] = (),
        logits: bool = False,
        trace: bool | None = None,
        on_prefill: OnPrefill | None = None,
    ) -> Generation:
        """Asks for the continuation of `prompt`: text, token ids or chat turns.

        The defaults are greedy. `stop`: texts that end the answer, not part of it. `logits`: send
        float32 [vocabulary] with every token. `forced`: token ids that the answer begins with,
        given instead of chosen: their logprobs say how the model finds them. `trace`: whether the
        server records where the time goes, for `inflash trace`; None: as it is set. `on_prefill`:
        called by the iterator, some times a second, while a long prompt is worked on. `ValueError`
        for a sampling value out of range; what the server refuses is raised by the iterator.
        """
        sampling = make_sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
            forced=forced,
        )
        self._connect()
        mailbox, frames = self._session.generate(
            prompt, sampling, logits, time.monotonic(), trace=trace
        )
        self._send(frames)
        return Generation(self, mailbox, on_prefill)

    def status(self) -> dict[str, Any]:
        """The server's report: state, services, store, plan, settings, queue, counters."""
        self._connect()
        report = self._ask_status(self.timeout)
        if report is None:
            raise ServerLost("gateway", no_status(self.timeout))
        return report

    def close(self) -> None:
        """Ends the connection; the server gives up what it was still answering."""
        self._disconnect()
        self._context.destroy(linger=0)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self) -> None:
        """Connects unless connected: a server that came back after a loss is found again."""
        if self._socket is not None and self._session.alive:
            return
        self._disconnect()
        self._socket, self._monitor = open_socket(self._context, self.run_dir)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._session = Session(self.timeout, time.monotonic(), self._numbers)
        try:
            found = self._ask_status(min(FIND_S, self.timeout))
        except ServerLost:
            found = None
        if found is None:
            self._disconnect()
            raise ServerNotFound(not_found(self.run_dir))

    def _disconnect(self) -> None:
        if self._socket is None:
            return
        self._session.lost("the client was closed")
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._socket = None

    def _ask_status(self, limit_s: float) -> dict[str, Any] | None:
        """The server's report, or None if none comes in time; `ServerLost`."""
        mailbox, frames = self._session.status(time.monotonic())
        deadline = time.monotonic() + limit_s
        self._send(frames)
        while not mailbox.events:
            if time.monotonic() >= deadline:
                self._session.forget(mailbox.number)
                return None
            self._turn(deadline)
        event = mailbox.events.popleft()
        if isinstance(event, StatusReply):
            return event.report
        raise ServerLost("gateway", GONE)

    def _cancel(self, number: int) -> None:
        if frames := self._session.cancel(number):
            self._send(frames)

    def _send(self, frames: list[Raw]) -> None:
        assert self._socket is not None
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:  # 1,000 messages that nobody takes
            self._session.lost(GONE)

    def _turn(self, deadline: float = math.inf) -> None:
        """Waits until something came or is due, and hands out everything that is there."""
        if self._socket is None or not self._session.alive:
            return  # what there was to say is in the mailboxes
        now = time.monotonic()
        wait_s = max(0.0, min(self._session.wait_s(now), deadline - now))
        ready = dict(self._poller.poll(math.ceil(wait_s * 1000)))
        # First the words, then the end: a gateway that stops says why before it goes.
        came = self._receive()
        if self._monitor in ready and is_disconnect(self._monitor.recv_multipart()):
            self._receive()
            self._session.lost(GONE)
        elif not came and (frames := self._session.check(time.monotonic())):
            self._send(frames)

    def _receive(self) -> bool:
        """Takes all messages that are there; whether there was one."""
        assert self._socket is not None
        came = False
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return came
            came = True
            self._session.receive(frames, time.monotonic())
