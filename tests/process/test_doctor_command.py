"""A visit to the doctor, with shorter probes, and a forecast from what it wrote."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from common import probes
from common.forecast import probe
from common.forecast.machine import load_machine
from common.launch import CHECKOUT
from scripts import doctor, plan
from services.reader import measure
from tests.conftest import Made


@pytest.mark.timeout(180)
def test_the_doctor_measures_and_plan_foretells(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = functools.partial(probes.measure_memory, "--bytes", f"{16 << 20}")
    monkeypatch.setattr(probes, "measure_memory", few)
    monkeypatch.setattr(probe, "DRIVE_SECONDS", 0.03)
    file, store = tmp_path / "machine.json", made.store("opt", "float16")
    done = CliRunner().invoke(
        doctor.main, [str(store.path), "--output", str(file), "--plot", str(tmp_path / "d.png"),
                      "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    machine = load_machine(file)
    assert found["machine"] == json.loads(json.dumps(machine.as_object()))
    assert machine.drive.bytes_per_s > 0
    assert {"aio", "threads", "buffered"} == set(machine.drive.ways)
    assert any("Bundles will be read" in sentence for sentence in found["sentences"])
    assert (tmp_path / "d.png").stat().st_size > 10_000
    said = CliRunner().invoke(
        plan.main, [str(store.path), "--memory", "2GB", "--machine", str(file)]
    )
    assert said.exit_code == 0, said.output
    assert "tokens/s, warm" in said.output


def test_a_folder_is_measured_by_a_file_that_goes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "SCRATCH_BYTES", 8 << 20)
    with measure.opened(tmp_path) as target:
        assert target.scratch
        point = measure.measure(target, 4, 32, 0.05)
        assert point.bytes_per_s > 0
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(doctor.main, [str(tmp_path / "absent")])
    assert done.exit_code == 1
    assert "there is no" in done.output
    done = CliRunner().invoke(doctor.main, [str(tmp_path), "--output", str(tmp_path / "a/b.json")])
    assert done.exit_code == 1
    assert "cannot be written" in done.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    output, where = tmp_path / "machine.json", tmp_path / "drive"
    where.mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "scripts.doctor", str(where), "--output", str(output)],
        cwd=CHECKOUT, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 60
        while not list(where.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(where.iterdir()), "the file to read is being written"
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "nothing was written" in err
    assert list(where.iterdir()) == []
    assert not output.exists()
