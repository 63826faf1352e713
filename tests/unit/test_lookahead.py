"""When look-ahead pays: by the setting, or by what had to be read."""

from __future__ import annotations

import pytest

from services.compute.ahead import ABSENT_MIN, LookAhead
from services.compute.waits import LayerWaits


def step(named: int, prefetched: int, misses: int) -> list[LayerWaits]:
    """Two layers of a token."""
    hits = named - misses
    return [LayerWaits(1, 0, hits=hits, misses=misses, prefetched=prefetched)] * 2


@pytest.mark.parametrize(("setting", "pays"), [("on", True), ("off", False)])
def test_a_setting_holds_whatever_is_read(setting: str, pays: bool) -> None:
    lookahead = LookAhead(setting)
    for misses in (0, 50, 100):
        for _ in range(50):
            lookahead.learn(step(100, 0, misses))
        assert lookahead.pays(whole=False) is pays
        assert lookahead.pays(whole=True) is pays


def test_auto_follows_what_had_to_be_read() -> None:
    lookahead = LookAhead("auto")
    assert lookahead.pays(whole=False), "a cache is empty at first"
    for _ in range(50):
        lookahead.learn(step(1000, 0, 30))
    assert not lookahead.pays(whole=False)
    assert lookahead.pays(whole=True), "of whole layers there is always much to read"
    for _ in range(50):
        lookahead.learn([])
        lookahead.learn(step(0, 0, 0))
    assert not lookahead.pays(whole=False), "nothing was named: nothing is learned"
    for _ in range(50):
        lookahead.learn(step(1000, round(1000 * ABSENT_MIN) + 20, 0))
    assert lookahead.pays(whole=False), "what it brought in time had to be read, too"
