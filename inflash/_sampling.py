"""The sampling options that users give, as the wire has them."""

from __future__ import annotations

from collections.abc import Sequence

from inflash._messages import Sampling


def make_sampling(
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    seed: int | None,
    stop: str | Sequence[str],
    ignore_eos: bool,
    forced: Sequence[int],
) -> Sampling:
    """`ValueError` for a value out of range, `TypeError` for one of another type."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) for s in stops):
        raise TypeError(f"stop={stop!r:.60}: it must be a text or a sequence of texts")
    return Sampling(
        max_new_tokens=int(max_new_tokens),
        temperature=float(temperature),
        top_k=int(top_k),
        top_p=float(top_p),
        repetition_penalty=float(repetition_penalty),
        seed=None if seed is None else int(seed),
        stop=stops,
        ignore_eos=bool(ignore_eos),
        forced=tuple(int(token) for token in forced),
    )
