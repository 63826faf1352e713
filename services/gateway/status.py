"""The report that `inflash status` shows: plain values, ready for the wire. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config import Settings
from common.limits import QUEUE_MAX, RUNNING_MAX
from common.plan import Plan
from common.store.store import Store
from common.system import core_cache_bytes, cores
from services.gateway.health import Watch
from services.gateway.prompts import Prompts
from services.gateway.requests import Requests


class Report:
    """What does not change in a server's life, made once; `make` adds what does."""

    def __init__(self, settings: Settings, store: Store, plan: Plan, prompts: Prompts):
        shape = store.geometry
        self.room = plan.kv_tokens
        """Of the KV cache, tokens."""
        self._fixed = {
            "store": {
                "path": str(settings.store),
                "id": store.id,
                "family": store.family,
                "layers": shape.layers,
                "neurons": shape.neurons,
                "hidden": shape.hidden,
                "dtype": shape.dtype,
                "ffn_bytes": shape.ffn_bytes,
            },
            "model": {
                "vocabulary": prompts.vocabulary,
                "tokenizer": prompts.tokenizer is not None,
                "chat_template": prompts.has_chat_template,
            },
            "machine": {"cores": cores(), "core_cache_bytes": core_cache_bytes()},
            "plan": _plain(dataclasses.asdict(plan)),
            "settings": _plain(dataclasses.asdict(settings)),
        }

    def facts(self) -> dict[str, Any]:
        """What does not change."""
        return self._fixed

    def make(self, watch: Watch, requests: Requests, counters: Mapping[str, int]) -> dict[str, Any]:
        """The report of this moment."""
        queue = {
            "running": len(requests.running),
            "waiting": len(requests.waiting),
            "max": QUEUE_MAX,
            "running_max": RUNNING_MAX,
            "room_tokens": requests.room,
            "room_taken_tokens": requests.room_taken,
        }
        return {
            "state": watch.state,
            "services": watch.report(),
            **self._fixed,
            "queue": queue,
            "counters": dict(counters),
            "figures": requests.totals.report(),
        }


def _plain(value: Any) -> Any:
    """Paths as text and tuples as lists: what JSON and the wire know."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
