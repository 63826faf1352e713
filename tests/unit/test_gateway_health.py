"""Verdicts on the services: what ends a server and what does not."""

from __future__ import annotations

import pytest

from common.limits import HANG_S, HEALTH_LOST_S, START_S
from common.messages import SERVICES, Fault, Health, Ready
from inflash._wire import VERSION
from services.gateway.health import Watch

PIDS = {name: 1000 + i for i, name in enumerate(SERVICES)}
STORE = "f00d"


def everyone(_: int) -> bool:
    return True


def ready_watch(now: float = 0.0) -> Watch:
    watch = Watch(STORE, now)
    for name in SERVICES:
        assert watch.receive(Ready(name, PIDS[name], VERSION, STORE), PIDS.get, now)
    assert watch.ready
    return watch


def beat(watch: Watch, name: str, number: int, now: float) -> bool:
    return watch.receive(Health(name, PIDS[name], now, number, {"reads": number}), PIDS.get, now)


def pass_time(watch: Watch, seconds: float, silent: str = "", start: float = 0.0) -> float:
    """Everyone but `silent` beats; returns the time at which someone is lost, or the end."""
    steps = int(seconds / 0.2)
    for step in range(1, steps + 1):
        now = start + step * 0.2
        for name in SERVICES:
            if name != silent:
                beat(watch, name, step, now)
        if watch.look(now, everyone):
            return now
    return start + steps * 0.2


def test_all_ready_and_beating() -> None:
    watch = ready_watch()
    pass_time(watch, 300.0)
    assert watch.loss is None
    assert watch.state == "ready"
    assert watch.report()["reader"]["counters"] == {"reads": 1500}


@pytest.mark.parametrize("name", sorted(set(SERVICES) - {"gateway"}))
def test_silence_is_a_loss_in_time(name: str) -> None:
    watch = ready_watch()
    end = pass_time(watch, 10.0, silent=name)
    assert watch.loss is not None
    assert watch.loss.service == name
    assert "silent for 2.6 s" in watch.loss.reason or "silent for 2.5 s" in watch.loss.reason
    assert end <= HEALTH_LOST_S + 0.25
    assert watch.state == "failing"
    assert watch.report()[name]["state"] == "lost"


def test_the_observer_is_not_judged() -> None:
    watch = ready_watch()
    pass_time(watch, 10.0, silent="gateway")
    assert watch.loss is None


def test_a_process_that_is_gone_is_lost_at_the_next_look() -> None:
    watch = ready_watch()
    loss = watch.look(0.2, lambda pid: pid != PIDS["reader"])
    assert loss is not None
    assert (loss.service, loss.reason) == ("reader", f"process {PIDS['reader']} has ended")


def test_a_fault_explains_the_end_but_is_not_the_end() -> None:
    watch = ready_watch()
    assert watch.receive(Fault("reader", PIDS["reader"], "the disk burns"), PIDS.get, 0.1)
    assert watch.look(0.2, everyone) is None
    loss = watch.look(0.4, lambda pid: pid != PIDS["reader"])
    assert loss is not None
    assert loss.reason == "the disk burns"


def test_the_killed_one_is_named_and_not_the_one_that_followed() -> None:
    watch = ready_watch()
    watch.receive(Fault("compute", PIDS["compute"], "no answer from reader"), PIDS.get, 0.1)
    gone = {PIDS["reader"], PIDS["compute"]}
    loss = watch.look(0.2, lambda pid: pid not in gone)
    assert loss is not None
    assert loss.service == "reader"


def test_a_service_that_dies_before_ready_is_lost() -> None:
    watch = Watch(STORE, 0.0)
    beat(watch, "compute", 1, 0.1)
    loss = watch.look(0.2, lambda pid: pid != PIDS["compute"])
    assert loss is not None
    assert loss.service == "compute"


def test_never_ready_is_lost_after_start_s() -> None:
    watch = Watch(STORE, 0.0)
    now = 0.0
    while now < START_S - 0.5:
        now += 0.2
        assert watch.look(now, everyone) is None
    loss = watch.look(now + 0.6, everyone)
    assert loss is not None
    assert "START_S" in loss.reason


def test_a_loop_that_hangs_is_lost() -> None:
    watch = ready_watch()
    for step in range(1, int(HANG_S / 0.2) + 10):
        for name in SERVICES:
            beat(watch, name, 7 if name == "compute" else step, step * 0.2)
        watch.look(step * 0.2, everyone)
    assert watch.loss is not None
    assert watch.loss.service == "compute"
    assert "HANG_S" in watch.loss.reason


def test_the_gateways_own_sleep_is_nobodys_silence() -> None:
    watch = ready_watch()
    pass_time(watch, 2.0)
    assert watch.look(500.0, everyone) is None
    pass_time(watch, 5.0, start=500.0)
    assert watch.loss is None


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (Ready("reader", PIDS["reader"], VERSION + 1, STORE), "protocol"),
        (Ready("reader", PIDS["reader"], VERSION, "beef"), "'beef'"),
    ],
)
def test_a_service_of_another_server_is_a_loss(message: Ready, said: str) -> None:
    watch = Watch(STORE, 0.0)
    assert watch.receive(message, PIDS.get, 0.0)
    assert watch.loss is not None
    assert watch.loss.service == "reader"
    assert said in watch.loss.reason


@pytest.mark.parametrize(
    "message",
    [
        Ready("reader", 1, VERSION, STORE),
        Ready("reader", PIDS["reader"], VERSION, "beef"),  # it has said Ready already
        Health("reader", 1, 1.0, 1, {}),
        Fault("reader", 1, "made up"),
        Ready("oven", 1, VERSION, STORE),
    ],
)
def test_what_does_not_come_from_the_service_is_refused(message: Ready | Health | Fault) -> None:
    watch = ready_watch()
    assert not watch.receive(message, PIDS.get, 0.0)
    assert watch.look(0.2, everyone) is None
    assert watch.ready


def test_a_stranger_cannot_take_a_place_that_is_not_taken_yet() -> None:
    watch = Watch(STORE, 0.0)
    assert not watch.receive(Ready("reader", 1, VERSION, "beef"), PIDS.get, 0.0)
    assert not watch.receive(Ready("reader", 1, VERSION, STORE), lambda _: None, 0.0)
    assert watch.loss is None
    assert watch.receive(Ready("reader", PIDS["reader"], VERSION, STORE), PIDS.get, 0.0)


def test_one_wrong_beat_does_not_stop_the_clock() -> None:
    watch = ready_watch()
    beat(watch, "compute", 2**62, 0.0)
    pass_time(watch, 2 * HANG_S)
    assert watch.loss is None
