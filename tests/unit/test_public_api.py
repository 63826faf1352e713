"""What `import inflash` gives, and what it does not load."""

from __future__ import annotations

import subprocess
import sys

import inflash


def test_all_is_sorted_and_complete() -> None:
    assert inflash.__all__ == sorted(inflash.__all__)
    public = {name for name in vars(inflash) if not name.startswith("_")}
    assert public | {"__version__"} == set(inflash.__all__)


def test_what_is_public_says_so_in_its_docstring() -> None:
    for name in inflash.__all__:
        if name != "__version__":
            assert (getattr(inflash, name).__doc__ or "").strip(), name


def test_the_error_tree() -> None:
    assert issubclass(inflash.ServerNotFound, inflash.InflashError)
    assert issubclass(inflash.RequestFailed, inflash.InflashError)
    assert issubclass(inflash.RequestRefused, inflash.RequestFailed)
    assert issubclass(inflash.ServerLost, inflash.RequestFailed)


def test_importing_loads_no_numpy_no_torch_and_nothing_of_the_server() -> None:
    heavy = "numpy torch transformers tokenizers rich click common services scripts"
    program = f"import sys, inflash; print([m for m in {heavy.split()} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"
