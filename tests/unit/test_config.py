"""Settings: every key is known, every value is checked, and an error starts with the key."""

from __future__ import annotations

import pytest

from common.config import cache_bytes, parse_size, read_settings
from common.errors import SettingError


@pytest.mark.parametrize(
    ("text", "size"),
    [("7GB", 7 * 10**9), ("512MiB", 2**29), ("1000", 1000), ("1.5 g", 15 * 10**8), ("2KiB", 2048)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "7XB", "7 GB per day", "1e9"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


def test_shares_of_the_ffn() -> None:
    assert cache_bytes("25%", 1000) == 250
    assert cache_bytes("2KiB", 1000) == 2048


def test_defaults_and_given_values() -> None:
    settings = read_settings(
        {"INFLASH_STORE": "/s", "INFLASH_RUN_DIR": "/r", "INFLASH_WINDOW": "5", "HOME": "/h"}
    )
    assert (settings.window, settings.predictor, str(settings.run_dir)) == (5, "auto", "/r")
    assert read_settings({"INFLASH_STORE": "/s", "INFLASH_WINDOW": "auto"}).window is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("INFLASH_TYPO", "1"),
        ("INFLASH_MEMORY", "plenty"),
        ("INFLASH_CACHE", "0%"),
        ("INFLASH_CACHE", "101%"),
        ("INFLASH_CACHE", "some%"),
        ("INFLASH_PREDICTOR", "guess"),
        ("INFLASH_WINDOW", "-1"),
        ("INFLASH_CONTEXT", "-3"),
        ("INFLASH_BACKEND", "tape"),
        ("INFLASH_THREADS", "two"),
        ("INFLASH_LOG_LEVEL", "loud"),
    ],
)
def test_an_error_names_its_key(key: str, value: str) -> None:
    with pytest.raises(SettingError, match=f"^{key}: "):
        read_settings({"INFLASH_STORE": "/s", key: value})


def test_a_store_is_needed() -> None:
    with pytest.raises(SettingError, match="INFLASH_STORE: not set"):
        read_settings({})


def test_a_window_without_its_policy_is_refused():
    with pytest.raises(SettingError, match=r"INFLASH_WINDOW.*decay"):
        read_settings({"INFLASH_STORE": "/s", "INFLASH_WINDOW": "5", "INFLASH_POLICY": "decay"})
