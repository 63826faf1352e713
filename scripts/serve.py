"""`inflash serve STORE`: starts the Procfile's services and ends them together."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import click

from common.config import Settings
from common.errors import UserError
from common.launch import Server
from common.limits import POLL_S
from common.plan import make_plan
from common.store.store import Store
from inflash._errors import InflashError
from scripts.options import server_options


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@server_options
@click.option("--run-dir", type=click.Path(path_type=Path), help="Where sockets and logs go.")
def main(store: Path, run_dir: Path | None, **options: str | None) -> None:
    """Serve STORE until Ctrl-C: four processes, found by `inflash generate` and by Client().

    Prints one line when it is ready. Logs: RUN_DIR/log/*.jsonl.
    """
    given = {key: value for key, value in options.items() if value is not None}
    given["store"] = str(store.absolute())
    if run_dir is not None:
        given["run_dir"] = str(run_dir.absolute())
    try:
        sys.exit(serve(given))
    except (UserError, InflashError) as error:
        sys.exit(f"error: {error}")


def serve(options: dict[str, str]) -> int:
    """Runs a server until a signal (0) or until one of its services ends (1)."""
    stopping: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: stopping.append(received))
    server = Server(options)
    line = ready_line(server.settings)  # a bad store or plan is told before anything starts
    try:
        server.start(lambda: bool(stopping))
        if not stopping:
            print(line, flush=True)
        while not stopping:
            if lost := server.lost():
                print(f"error: {' '.join(lost)}; the server stops", file=sys.stderr)
                server.let_gateway_say_why()
                return 1
            time.sleep(POLL_S)
        return 0
    finally:
        server.stop()


def ready_line(settings: Settings) -> str:
    """What is served, in a line."""
    store = Store.open(settings.store)
    plan, geometry = make_plan(settings, store), store.geometry
    return (
        f"ready: {settings.store.name} ({store.family}, {geometry.layers} × {geometry.neurons:,}"
        f" neurons, {geometry.dtype}) · predictor {settings.predictor}"
        f" · cache {plan.cache_bytes / 1e6:,.1f} MB = {plan.cache_bytes / geometry.ffn_bytes:.0%}"
        f" of the FFN · memory {plan.memory_bytes / 1e9:.2f} GB · {settings.run_dir}"
    )


if __name__ == "__main__":
    main(prog_name="inflash serve")
