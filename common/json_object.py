"""A JSON object that somebody else wrote, or a sentence that says why it is none."""

from __future__ import annotations

import json
from typing import Any

from common.errors import StoreError


def read_object(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object; `StoreError` names `where` if it is none."""
    try:
        content = json.loads(raw)
    except ValueError as error:
        raise StoreError(f"{where} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise StoreError(f"{where} holds no JSON object")
    return content
