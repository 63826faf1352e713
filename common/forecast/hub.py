"""What the Hub tells of a model before it is downloaded: small files, sizes, safetensors headers.

huggingface_hub has addresses, token, proxies and offline mode; what is read is bounded here: a
server that sends a whole file where a range of it was asked for is left after the header.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants, get_session, hf_hub_url
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from common.errors import UserError

HEADER_BYTES_MAX = 32 << 20  # the largest that were seen have a few MB
FIRST_BYTES = 128 << 10  # most headers are shorter
TIMEOUT_S = 10.0
_ID = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,128})?$")
_LENGTH = 8  # bytes before a header, that say how long it is
_MISSING, _REFUSED = 404, (401, 403)


def is_id(text: str) -> bool:
    """Whether `text` may name a model of the Hub: owner/name, or owner/name@revision."""
    return _ID.match(text) is not None


class Repository:
    """One model of the Hub. Every method asks the network; `UserError` says what went wrong."""

    def __init__(self, model: str) -> None:
        self._name, _, revision = model.partition("@")
        self._revision = revision or constants.DEFAULT_REVISION
        self._host = urlsplit(constants.ENDPOINT).netloc
        self.where = f"{model} at {self._host}"

    def read(self, file: str, bytes_max: int) -> bytes | None:
        """A small file; None if there is none."""
        with self._answer("GET", file) as answer:
            return None if answer is None else _take(answer, bytes_max, f"{file} of {self.where}")

    def size(self, file: str) -> int | None:
        """A file's bytes; None if there is none, or it is not told."""
        with self._answer("HEAD", file) as answer:
            if answer is None:
                return None
            length = answer.headers.get("x-linked-size") or answer.headers.get("content-length")
            return int(length) if length and length.isdecimal() else None

    def header(self, file: str) -> bytes | None:
        """The length and the header of a safetensors file; None if there is no such file."""
        where = f"{file} of {self.where}"
        raw = self._first(file, FIRST_BYTES)
        if raw is None:
            return None
        if len(raw) < _LENGTH:
            raise UserError(f"{where} is no safetensors file: it has {len(raw)} bytes")
        wanted = _LENGTH + int.from_bytes(raw[:_LENGTH], "little")
        if wanted > HEADER_BYTES_MAX:
            raise UserError(
                f"{where} is no safetensors file: its header would have {wanted:,} bytes"
            )
        if len(raw) < wanted:
            raw = self._first(file, wanted) or b""
        if len(raw) < wanted:
            raise UserError(f"{where} ends inside its header: {len(raw):,} of {wanted:,} bytes")
        return raw[:wanted]

    def _first(self, file: str, count: int) -> bytes | None:
        """The first `count` bytes of a file, or all that it has."""
        with self._answer("GET", file, {"Range": f"bytes=0-{count - 1}"}) as answer:
            if answer is None:
                return None
            taken = bytearray()
            for block in answer.iter_bytes():
                taken += block
                if len(taken) >= count:
                    break
            return bytes(taken[:count])

    @contextlib.contextmanager
    def _answer(
        self, method: str, file: str, headers: dict[str, str] | None = None
    ) -> Iterator[Any]:
        """The answer to a request, its body not read; None if there is no such file."""
        url = hf_hub_url(self._name, file, revision=self._revision)
        # A range is of a file as it lies there: compressed on the way, it would be another.
        asked = build_hf_headers() | {"Accept-Encoding": "identity"} | (headers or {})
        try:
            with get_session().stream(
                method, url, headers=asked, timeout=TIMEOUT_S, follow_redirects=True
            ) as answer:
                status = answer.status_code
                if status in _REFUSED:
                    raise UserError(
                        f"{self.where} may not be read ({status}): there is no such model, or its"
                        " owner lets in only who has accepted its terms; `hf auth login`, or set"
                        " HF_TOKEN"
                    )
                if status != _MISSING and not 200 <= status < 300:
                    raise UserError(f"{self.where} answered {status} for {file}; try again later")
                yield None if status == _MISSING else answer
        except UserError:
            raise
        except Exception as error:  # the client's library has a tree of errors of its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{self._host} cannot be asked about {self._name}: {reason}; see that there is a"
                " network, or name a config.json or a folder that is here"
            ) from None


def _take(answer: Any, bytes_max: int, where: str) -> bytes:
    taken = bytearray()
    for block in answer.iter_bytes():
        taken += block
        if len(taken) > bytes_max:
            raise UserError(f"{where} has more than {bytes_max:,} bytes: it is not what it says")
    return bytes(taken)
