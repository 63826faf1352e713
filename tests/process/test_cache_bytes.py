"""What is read from flash: less with a larger cache, and nothing when all of it is there."""

from __future__ import annotations

from pathlib import Path

from inflash import Stats
from tests.conftest import Made, serving

PROMPT = list(range(10, 40))


def stats_of(made: Made, run_dir: Path, cache: str, requests: int = 1) -> list[Stats]:
    found = []
    options = {"predictor": "exact", "cache": cache, "reuse": "off"}
    with serving(made.store("opt"), run_dir, **options) as client:
        for _ in range(requests):
            answer = client.generate(PROMPT, max_new_tokens=32, ignore_eos=True)
            assert len(list(answer)) == 32
            assert answer.stats is not None
            found.append(answer.stats)
    return found


def test_bytes_fall_with_the_cache(made: Made, run_dir: Path) -> None:
    read = [stats_of(made, run_dir, cache)[0].bytes_read for cache in ("3%", "40%", "100%")]
    assert read == sorted(read, reverse=True)
    assert len(set(read)) == 3
    geometry = made.store("opt").geometry
    assert read[-1] == geometry.ffn_bytes, "with all in the cache, each bundle is read once"


def test_a_second_identical_prompt_reads_nothing(made: Made, run_dir: Path) -> None:
    first, second = stats_of(made, run_dir, "100%", requests=2)
    assert first.bytes_read > 0
    assert (second.bytes_read, second.reads, second.misses) == (0, 0, 0)
    assert second.hit_rate == 1.0
    assert second.hits == first.hits + first.misses


def test_a_window_of_one_token_keeps_less(made: Made, run_dir: Path) -> None:
    store = made.store("opt")
    read = []
    for window in ("auto", "1"):
        with serving(store, run_dir, predictor="exact", cache="100%", window=window) as client:
            answer = client.generate(PROMPT, max_new_tokens=32, ignore_eos=True)
            list(answer)
            assert answer.stats is not None
            read.append(answer.stats.decode_bytes_read)
    assert read[0] == 0
    assert read[1] > 0
