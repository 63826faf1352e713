"""The asynchronous client: the same, for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from inflash._connection import GONE, is_disconnect, no_status, not_found, open_socket
from inflash._errors import ServerLost, ServerNotFound
from inflash._generation import End, GenerationState, OnPrefill, Token
from inflash._messages import StatusReply
from inflash._rundir import default_run_dir
from inflash._sampling import make_sampling
from inflash._session import FIND_S, Mailbox, Prompt, Session
from inflash._wire import Raw


class AsyncGeneration(GenerationState):
    """An answer on its way: an asynchronous iterator of `Token`.

    It ends by itself, after `cancel`, or with `RequestFailed` (`RequestRefused`, `ServerLost`).
    As a context manager it cancels, on leaving, an answer that is not over.
    """

    def __init__(
        self,
        client: AsyncClient,
        mailbox: Mailbox,
        came: asyncio.Event,
        on_prefill: OnPrefill | None,
    ):
        super().__init__(mailbox, on_prefill)
        self._client = client
        self._came = came

    async def cancel(self) -> None:
        """Asks the server to stop; the iterator then ends with finish_reason "cancelled"."""
        await self._client._cancel(self._mailbox.number)

    def __aiter__(self) -> AsyncGeneration:
        return self

    async def __anext__(self) -> Token:
        try:
            while (token := self._take()) is None:
                self._came.clear()
                await self._came.wait()  # the client's reader ends every wait: see Session.check
        except End:
            raise StopAsyncIteration from None
        return token

    async def __aenter__(self) -> AsyncGeneration:
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._over:
            await self.cancel()


class AsyncClient:
    """A connection to the server in `run_dir`, by default where `inflash serve` puts it.

        async with inflash.AsyncClient() as client:
            async for token in await client.generate("def add(a, b):"):
                print(token.text, end="", flush=True)

    `timeout`: seconds that a connected but silent server has to answer a status request; it does
    not limit an answer. It connects on entering or at the first call, which may raise
    `ServerNotFound`. Any number of tasks of one event loop may share it.
    """

    def __init__(self, run_dir: str | Path | None = None, timeout: float = 60):
        self.run_dir = default_run_dir() if run_dir is None else Path(run_dir).absolute()
        self.timeout = timeout
        self._numbers = itertools.count(1)
        self._session = Session(timeout, time.monotonic(), self._numbers)
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._reader: asyncio.Task[None] | None = None
        self._connecting = asyncio.Lock()

    async def generate(
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
    ) -> AsyncGeneration:
        """As `Client.generate`; awaiting it sends the request."""
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
        await self._connect()
        came = asyncio.Event()
        now = time.monotonic()
        mailbox, frames = self._session.generate(prompt, sampling, logits, now, came.set, trace)
        await self._send(frames)
        return AsyncGeneration(self, mailbox, came, on_prefill)

    async def status(self) -> dict[str, Any]:
        """The server's report: state, services, store, plan, settings, queue, counters."""
        await self._connect()
        report = await self._ask_status(self.timeout)
        if report is None:
            raise ServerLost("gateway", no_status(self.timeout))
        return report

    async def close(self) -> None:
        """Ends the connection; the server gives up what it was still answering."""
        await self._disconnect()
        self._context.destroy(linger=0)

    async def __aenter__(self) -> AsyncClient:
        try:
            await self._connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _connect(self) -> None:
        """Connects unless connected: a server that came back after a loss is found again."""
        async with self._connecting:
            if self._socket is not None and self._session.alive:
                return
            await self._disconnect()
            self._socket, self._monitor = open_socket(self._context, self.run_dir)
            self._session = Session(self.timeout, time.monotonic(), self._numbers)
            self._reader = asyncio.create_task(self._read(), name="inflash reader")
            try:
                found = await self._ask_status(min(FIND_S, self.timeout))
            except ServerLost:
                found = None
            if found is None:
                await self._disconnect()
                raise ServerNotFound(not_found(self.run_dir))

    async def _disconnect(self) -> None:
        if self._socket is None:
            return
        self._session.lost("the client was closed")
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._socket = None

    async def _ask_status(self, limit_s: float) -> dict[str, Any] | None:
        """The server's report, or None if none comes in time; `ServerLost`."""
        came = asyncio.Event()
        mailbox, frames = self._session.status(time.monotonic(), came.set)
        await self._send(frames)
        try:
            await asyncio.wait_for(came.wait(), limit_s)
        except TimeoutError:
            self._session.forget(mailbox.number)
            return None
        event = mailbox.events.popleft()
        if isinstance(event, StatusReply):
            return event.report
        raise ServerLost("gateway", GONE)

    async def _cancel(self, number: int) -> None:
        if frames := self._session.cancel(number):
            await self._send(frames)

    async def _send(self, frames: list[Raw]) -> None:
        assert self._socket is not None
        try:
            await self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:  # 1,000 messages that nobody takes
            self._session.lost(GONE)

    async def _read(self) -> None:
        """The reader: one task that takes all messages and wakes whom they are for."""
        try:
            while self._session.alive:
                await self._turn()
        except Exception as error:
            self._session.lost(f"the client's reader failed: {error!r}")
            raise

    async def _turn(self) -> None:
        """Waits until something came or is due, and hands out everything that is there."""
        assert self._socket is not None
        poller = zmq.asyncio.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        wait_s = self._session.wait_s(time.monotonic())
        ready = dict(await poller.poll(math.ceil(wait_s * 1000)))
        # First the words, then the end: a gateway that stops says why before it goes.
        came = await self._receive()
        if self._monitor in ready and is_disconnect(await self._monitor.recv_multipart()):
            await self._receive()
            self._session.lost(GONE)
        elif not came and (frames := self._session.check(time.monotonic())):
            await self._send(frames)

    async def _receive(self) -> bool:
        """Takes all messages that are there; whether there was one."""
        assert self._socket is not None
        came = False
        while True:
            try:
                frames = await self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return came
            came = True
            self._session.receive(frames, time.monotonic())
