"""`inflash eval STORE --text FILE`: what prediction costs in accuracy, and what it saves in bytes.

Thin: the dense model is common/model/streamed.py, the counts are common/evaluate.py.

Exit status: 0 done, 1 refused or failed, 2 wrong usage, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from common.cgroup import machine_bytes
from common.config import Settings
from common.errors import SettingError, UserError
from common.evaluate import Counting, Evaluation, Found, Served, add_stats, demand_by_layer
from common.launch import Server
from common.learn.recording import windows_per_pass
from common.learn.windows import windows_of
from common.lowrank import has_predictors, read_predictors
from common.model.streamed import Bits, Ids, load_streamed, run
from common.outputs import sentences
from common.plan import make_plan
from common.spans import read_spans
from common.store.store import Store
from inflash import Client, Stats
from inflash._errors import InflashError
from scripts.options import server_options

CACHE = "25%"  # of the FFN, where neither a budget nor a cache is given
LENGTH_MIN = 8  # of a window: its first token is given, and nothing looks ahead for it
NOT_OURS = ("predictor", "trace")  # both predictors run, and what is late is in the spans

Tick = Callable[[float], None]
"""Told how many tokens more are done."""

_ERR = Console(stderr=True, highlight=False)


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--text",
    "texts",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="File or folder of text that the predictors were not fitted on; may be repeated.",
)
@click.option(
    "--tokens",
    type=click.IntRange(LENGTH_MIN),
    default=4096,
    show_default=True,
    help="For the dense model, and to count what is named.",
)
@click.option(
    "--length",
    type=click.IntRange(LENGTH_MIN),
    default=256,
    show_default=True,
    help="Of a window of text, in tokens.",
)
@click.option(
    "--decode-tokens",
    type=click.IntRange(LENGTH_MIN),
    default=1024,
    show_default=True,
    help="Of those, for each server: the first windows.",
)
@click.option(
    "--against",
    metavar="STORE",
    type=click.Path(path_type=Path),
    help="What packing loses, instead: perplexity beside that of this other store of the same"
    " checkpoint, whose bundles are floats. Takes no predictors.",
)
@server_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    store: Path,
    texts: tuple[Path, ...],
    tokens: int,
    length: int,
    decode_tokens: int,
    against: Path | None,
    as_json: bool,
    **options: str | None,
) -> None:
    """Evaluate the fitted predictors of STORE on text: accuracy, and bytes read for a token.

    Runs the dense model over windows of the text, a layer's weights at a time, and counts what
    the predictors name of what fires: `same`, from the layer's own input, and `ahead`, one layer
    before. Then starts a server with the predictor exact, then one with lowrank, and feeds the
    first windows to each, token by token, as an answer is generated. Perplexities are of the same
    tokens. Late are neurons that a layer had to wait for.

    With --against: runs both dense models over the text, then serves STORE, with the predictor
    exact and --resident as given, the first windows token by token: its perplexity, too, is beside
    the other store's of the same tokens.

    The cache is 25% of the FFN unless --memory or --cache is given. Use text that the predictors
    have not seen.

    \b
      inflash eval my-store --text held-out.txt
      inflash eval my-store --text held-out.txt --memory 4GB --json
      inflash eval my-store-int8 --text held-out.txt --against my-store --resident int8
    """
    given = {key: value for key, value in options.items() if value is not None}
    try:
        with sentences(f"the evaluation of {store} stopped"):
            if against is None:
                found = evaluate(store, texts, tokens, length, decode_tokens, given).as_object()
            else:
                found = compare(store, against, texts, tokens, length, decode_tokens, given)
    except (UserError, InflashError) as error:
        _ERR.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        _ERR.print("stopped before the end: there are no figures")
        sys.exit(130)
    if as_json:
        print(json.dumps(found))
    elif against is not None:
        print("\n".join(losses(found)))
    else:
        show(found)


main.params = [parameter for parameter in main.params if parameter.name not in NOT_OURS]


def evaluate(
    path: Path,
    texts: Sequence[Path],
    tokens: int,
    length: int,
    decode_tokens: int,
    options: dict[str, str],
) -> Evaluation:
    """The whole evaluation; whatever can be refused is, before any work. `UserError`."""
    tempfile.gettempdir()  # `OSError` where it cannot be written: the servers' sockets go there
    store = Store.open(path)
    if not has_predictors(store):
        raise UserError(f"the store {path} has no fitted predictors: run `inflash fit {path}`")
    counting = Counting(read_predictors(store), length)
    windows = windows_of(store, texts, tokens, length)
    lowrank = options_for(store, options, "lowrank", length)
    make_plan(Server(lowrank).settings, store)
    exact = options_for(store, options, "exact", length)
    problem = exact_problem(Server(exact).settings, store)
    if problem:
        _ERR.print(f"note: exact is left out: {problem}", soft_wrap=True)
    if windows.note:
        _ERR.print(f"note: {windows.note}", soft_wrap=True)
    some = windows.ids[: max(1, decode_tokens // length)]
    columns = (TextColumn("{task.description:8}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeRemainingColumn(), console=_ERR) as bar:

        def follow(name: str, total: int) -> Tick:
            task = bar.add_task(name, total=total)
            return lambda done: bar.advance(task, done)

        dense = run_dense(store, windows.ids, counting, follow("dense", windows.ids.size))
        proved = None if problem else serve(store, exact, some, follow("exact", some.size))
        fitted = serve(store, lowrank, some, follow("lowrank", some.size))
    return Evaluation(length, dense, counting.same, counting.ahead, fitted, proved)


def compare(
    path: Path,
    against: Path,
    texts: Sequence[Path],
    tokens: int,
    length: int,
    decode_tokens: int,
    options: dict[str, str],
) -> dict[str, Any]:
    """Perplexities of the store in `path`, dense and served, beside the dense one of `against`;
    `UserError` where they are not of one checkpoint's shape."""
    tempfile.gettempdir()
    store, other = Store.open(path), Store.open(against)
    if dataclasses.replace(other.geometry, packed=store.geometry.packed) != store.geometry:
        raise UserError(f"{against} and {path} are of models of different shapes")
    exact = options_for(store, options, "exact", length)
    settings = Server(exact).settings
    make_plan(settings, store)
    ids = windows_of(store, texts, tokens, length).ids
    some = ids[: max(1, decode_tokens // length)]
    columns = (TextColumn("{task.description:8}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeRemainingColumn(), console=_ERR) as bar:

        def follow(name: str, total: int) -> Tick:
            task = bar.add_task(name, total=total)
            return lambda done: bar.advance(task, done)

        theirs = run_dense(other, ids, None, follow("against", ids.size))
        ours = run_dense(store, ids, None, follow("dense", ids.size))
        served = serve(store, exact, some, follow("served", some.size)).found
    base = theirs.first(len(some))
    return {
        "against": str(against),
        "bundles": store.geometry.number_format,
        "resident": settings.resident,
        "tokens_scored": theirs.tokens,
        "perplexity_against": theirs.perplexity,
        "perplexity_dense": ours.perplexity,
        "top1_agreement_dense": ours.agreement(theirs),
        "tokens_scored_served": served.tokens,
        "perplexity_against_served": base.perplexity,
        "perplexity_served": served.perplexity,
        "top1_agreement_served": served.agreement(base),
    }


def losses(found: dict[str, Any]) -> Iterator[str]:
    """What `compare` found, in sentences."""
    for what, key in (
        (f"{found['bundles']} bundles, run dense", "dense"),
        (f"the same served, {found['resident']} resident", "served"),
    ):
        end = "_served" if key == "served" else ""
        base, own = found[f"perplexity_against{end}"], found[f"perplexity_{key}"]
        yield (
            f"{what}: perplexity {own:.4f}, {found['against']} {base:.4f} ({own / base - 1:+.3%}),"
            f" the same top token in {percent(found[f'top1_agreement_{key}'])} of"
            f" {found[f'tokens_scored{end}']:,} places"
        )


def options_for(
    store: Store, options: dict[str, str], predictor: str, length: int
) -> dict[str, str]:
    """A server's options, checked for what this evaluation needs of them."""
    chosen = options | {"store": str(store.path.absolute()), "predictor": predictor}
    chosen["trace"] = "on"
    settings = Server(chosen).settings
    if settings.memory is None and settings.cache is None:
        chosen["cache"] = CACHE
    if settings.context < length:
        if "context" in options:
            raise UserError(f"--context {settings.context}: a window has {length:,} tokens")
        chosen["context"] = str(length)
    return chosen


def exact_problem(settings: Settings, store: Store) -> str:
    """Why a server with `settings` would not fit in memory; "" if it does."""
    try:
        needed = make_plan(settings, store).memory_bytes
    except SettingError as error:
        return str(error)
    if needed > machine_bytes():
        return f"it takes {needed:,} bytes, and the machine has {machine_bytes():,}"
    return ""


def run_dense(store: Store, ids: Ids, counting: Counting | None, tick: Tick) -> Found:
    """The dense model over windows `ids` [count, length]; `counting` hears what fired."""
    passes = store.geometry.layers + 1  # the embedding is observed, too

    def observe(layer: int, x: torch.Tensor, fired: Bits | None) -> None:
        if counting is not None:
            counting.observe(layer, x.numpy(), fired)
        tick(len(x) / passes)

    model = load_streamed(store, observe)
    scores = list(run(model, ids, batch=windows_per_pass(store.geometry, ids.shape[1])))
    nll = torch.cat([score.nll for score in scores])
    top = torch.cat([score.top for score in scores])[:, :-1]  # what follows a window is unknown
    return Found(nll.numpy(), top.numpy())


def serve(store: Store, options: dict[str, str], ids: Ids, tick: Tick) -> Served:
    """A server of its own, fed windows `ids` [count, length] one after the other."""
    with tempfile.TemporaryDirectory(prefix="inflash-") as run_dir:
        server = Server(options | {"run_dir": run_dir}, quiet=True)
        cache_bytes = make_plan(server.settings, store).cache_bytes
        with server, Client(run_dir) as client:
            fed = [feed(client, window.tolist(), tick) for window in ids]
        # The spans are whole now: compute's heart has written its last.
        demands = demand_by_layer(read_spans(Path(run_dir), "compute"), store.geometry.layers)
    found = Found(np.array([nll for nll, _, _ in fed]), np.array([top for _, top, _ in fed]))
    return Served(found, add_stats([stats for _, _, stats in fed]), demands, cache_bytes)


def feed(client: Client, window: list[int], tick: Tick) -> tuple[list[float], list[int], Stats]:
    """One window, its first token the prompt and the others forced: `nll` and `top` as `Found` has
    them, and the request's figures."""
    answer = client.generate(
        window[:1],
        max_new_tokens=len(window) - 1,
        forced=window[1:],
        ignore_eos=True,
        logits=True,
    )
    nll, top = [], []
    for token in answer:
        assert token.logits is not None
        nll.append(-token.logprob)
        top.append(int(np.asarray(token.logits).argmax()))
        tick(1)
    tick(1)  # the prompt
    if len(nll) != len(window) - 1 or answer.stats is None:
        raise UserError(
            f"the server answered {len(nll)} tokens of {len(window) - 1}"
            f" ({answer.finish_reason}): it was stopped"
        )
    return nll, top, answer.stats


def show(found: dict[str, Any]) -> None:
    """A table of the layers, and a summary."""
    console = Console(highlight=False)
    console.print(table(found))
    for line in summary(found):
        console.print(line, soft_wrap=True)


def table(found: dict[str, Any]) -> Table:
    result = Table(box=None, pad_edge=False)
    for heading in ("layer", "active", "recall", "named ÷ active"):
        result.add_column(heading, justify="right")
    for heading in ("recall, ahead", "named ÷ active, ahead", "late"):
        result.add_column(heading, justify="right")
    for row in found["layers"]:
        result.add_row(str(row["layer"]), percent(row["active"]), *cells(row, "same"),
                       *cells(row, "ahead"), percent(row["late_fraction"]))  # fmt: skip
    result.add_section()
    after_first = [*cells(found, "ahead_after_first"), percent(found["late_fraction"])]
    result.add_row("after 0", "", "", "", *after_first)
    result.add_row("all", percent(found["active"]), *cells(found, "same"), *cells(found, "ahead"))
    return result


def cells(row: dict[str, Any], kind: str) -> list[str]:
    ratio = row["named_per_active"][kind]
    return [percent(row["recall"][kind]), "–" if ratio is None else f"{ratio:.2f}"]


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"


def summary(found: dict[str, Any]) -> Iterator[str]:
    perplexity, dense = found["perplexity"], found["perplexity"]["dense"]
    served = [name for name in ("exact", "lowrank") if perplexity[name] is not None]
    others = "".join(
        f", {name} {perplexity[name]:.4f} ({perplexity[name] / dense - 1:+.3%})" for name in served
    )
    yield (
        f"perplexity of {found['tokens_scored']:,} tokens: dense {dense:.4f}{others};"
        f" dense over all {found['tokens']:,}: {found['perplexity_dense_all']:.4f}"
    )
    yield f"top token of lowrank: as dense ranks it in {percent(found['top1_agreement'])} of places"
    for name in served:
        read = found["bytes_per_token" if name == "lowrank" else "bytes_per_token_exact"]
        yield (
            f"{name}: {decimal(int(read))} read for a token, hit rate"
            f" {percent(found['hit_rate'][name])}, reads hidden"
            f" {percent(found['hidden_share'][name])}, {found['tokens_per_s'][name]:.1f} tokens/s,"
            f" cache {decimal(found['cache_bytes'][name])}"
        )
    for key, what in (("late", "neurons that fired"), ("waited", "neurons that were named")):
        after, first = (percent(found[f"{key}_fraction{layer}"]) for layer in ("", "_layer0"))
        yield (
            f"lowrank waited for {after} of the {what} after layer 0, {first} in it"
            f" ({found['late_tokens']:,} tokens)"
        )


if __name__ == "__main__":
    main(prog_name="inflash eval")
