"""What is read from flash: less with a larger cache, and nothing when all of it is there."""

from __future__ import annotations

from pathlib import Path

from inflash import Stats
from tests.conftest import Made, serving

PROMPT = list(range(10, 40))


def stats_of(made: Made, run_dir: Path, requests: int = 1, **options: str) -> list[Stats]:
    found = []
    given = {"predictor": "exact", "reuse": "off"} | options
    with serving(made.store("opt"), run_dir, **given) as client:
        for _ in range(requests):
            answer = client.generate(PROMPT, max_new_tokens=32, ignore_eos=True)
            assert len(list(answer)) == 32
            assert answer.stats is not None
            found.append(answer.stats)
    return found


def test_bytes_fall_with_the_cache(made: Made, run_dir: Path) -> None:
    small, half = (stats_of(made, run_dir, cache=cache)[0] for cache in ("3%", "40%"))
    first, second = stats_of(made, run_dir, requests=2, cache="100%")
    assert small.bytes_read > half.bytes_read > first.bytes_read
    geometry = made.store("opt").geometry
    assert first.bytes_read == geometry.ffn_bytes, "with all in the cache, each is read once"
    assert first.decode_bytes_read == 0, "a prompt of 30 tokens reads a layer whole"
    # The same prompt again reads nothing.
    assert (second.bytes_read, second.reads, second.misses) == (0, 0, 0)
    assert second.hit_rate == 1.0
    assert second.hits == first.hits + first.misses
    # A window of one token keeps less.
    (window,) = stats_of(made, run_dir, cache="100%", window="1")
    assert window.decode_bytes_read > 0
