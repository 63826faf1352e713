"""A server whose first thread of compute has a core of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import Made, serving


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core")
def test_all_others_keep_off_the_core_of_computes_first_thread(made: Made, run_dir: Path) -> None:
    store, all_cores = made.store("opt", "float32"), os.sched_getaffinity(0)
    core = min(all_cores)
    with serving(store, run_dir, apart="on", predictor="exact", cache="20%") as client:
        list(client.generate([5, 6, 7], max_new_tokens=4))
        status = client.status()
        pids = {name: service["pid"] for name, service in status["services"].items()}
        assert os.sched_getaffinity(pids.pop("compute")) == {core}
        for pid in pids.values():
            assert os.sched_getaffinity(pid) == all_cores - {core}
        assert status["machine"]["cores"] == len(all_cores), "it is not taken for a smaller one"
