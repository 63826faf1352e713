"""`inflash serve STORE`: starts the Procfile's services and ends them together."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import time
from pathlib import Path

import click

from common.config import Settings
from common.errors import UserError
from common.launch import Server
from common.limits import POLL_S
from common.log import Tail
from common.pagecache import forget_imports
from common.plan import Plan, make_plan, resolve_predictor
from common.store.store import Store
from common.system import swap_written_bytes
from inflash import Stats
from inflash._cli import stats_line
from inflash._errors import InflashError
from scripts.options import server_options


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@server_options
@click.option("--run-dir", type=click.Path(path_type=Path), help="Where sockets and logs go.")
@click.option("--plan", "only_plan", is_flag=True, help="Print the memory plan and start nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --plan: print it as one object.")
def main(
    store: Path, run_dir: Path | None, only_plan: bool, as_json: bool, **options: str | None
) -> None:
    """Serve STORE until Ctrl-C: four processes, found by `inflash generate` and by Client().

    Prints the memory plan, one line when it is ready, and one for each request that has ended.
    Logs: RUN_DIR/log/*.jsonl; where the time went: inflash trace RUN_DIR.
    """
    given = {key: value for key, value in options.items() if value is not None}
    given["store"] = str(store.absolute())
    if run_dir is not None:
        given["run_dir"] = str(run_dir.absolute())
    if as_json and not only_plan:
        raise click.UsageError("--json goes with --plan")
    try:
        if only_plan:
            settings = Server(given).settings
            plan = make_plan(settings, Store.open(settings.store))
            print(json.dumps(dataclasses.asdict(plan)) if as_json else plan_table(plan))
            return
        sys.exit(serve(given))
    except (UserError, InflashError) as error:
        sys.exit(f"error: {error}")


def serve(options: dict[str, str]) -> int:
    """Runs a server until a signal (0) or until one of its services ends (1)."""
    stopping: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: stopping.append(received))
    server, swapped = Server(options), swap_written_bytes()
    store = Store.open(server.settings.store)
    plan = make_plan(server.settings, store)  # a bad one is told before anything starts
    print(plan_table(plan), flush=True)
    ended = Tail(server.run_dir / "log" / "gateway.jsonl")
    try:
        server.start(lambda: bool(stopping))
        if not stopping:
            print(ready_line(server.settings, store, plan), flush=True)
        forget_imports()
        while not stopping:
            for line in ended.read():
                if said := request_line(line):
                    print(said, flush=True)
            if lost := server.lost():
                print(f"error: {' '.join(lost)}; the server stops", file=sys.stderr)
                server.let_gateway_say_why()
                return 1
            time.sleep(POLL_S)
        return 0
    finally:
        server.stop()
        written = (swap_written_bytes() or 0) - (swapped or 0)
        if written > 0:
            print(f"warning: {written:,} bytes were written to swap while it served: memory was"
                  " short; give --memory less, or close something", file=sys.stderr)  # fmt: skip


def ready_line(settings: Settings, store: Store, plan: Plan) -> str:
    """What is served, in a line."""
    geometry = store.geometry
    return (
        f"ready: {settings.store.name} ({store.family}, {geometry.layers} × {geometry.neurons:,}"
        f" neurons, {geometry.dtype}) · predictor {resolve_predictor(settings, store)}"
        f" · cache {plan.cache_bytes / 1e6:,.1f} MB = {plan.cache_bytes / geometry.ffn_bytes:.0%}"
        f" of the FFN · memory {plan.memory_bytes / 1e9:.2f} GB · {settings.run_dir}"
    )


def request_line(line: str) -> str:
    """What is said of a request that has ended, by the gateway's event; "" of other events."""
    event = json.loads(line)
    name = f"request {event.get('ordinal')}"
    if event["event"] == "failed":
        return f"{name} failed: {event['reason']}"
    if event["event"] == "vanished":
        return f"{name} was given up: its client is gone"
    if event["event"] != "finished":
        return ""
    stats = Stats(**event["stats"])
    return f"{name} ({event['reason']}) · prompt {stats.prompt_tokens:,} · {stats_line(stats)}"


def plan_table(plan: Plan) -> str:
    """The plan's lines and their sum, aligned; predictors are weights, predictor is a process."""
    notes = {
        "resident": "without the embedding, which stays on flash" * (plan.embedding == "flash"),
        "kv": f"{plan.kv_tokens:,} tokens",
        "cache": f"{sum(plan.slots):,} slots",
        "reserve": "kept free",
    }
    rows = [*plan.lines().items(), ("memory", plan.memory_bytes)]
    return "\n".join(
        f"{name:<11} {size / 1e6:>10,.1f} MB  {notes.get(name, '')}".rstrip() for name, size in rows
    )


if __name__ == "__main__":
    main(prog_name="inflash serve")
