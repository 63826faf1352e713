"""The `inflash` command.

Owns the commands of a client (generate, chat, status) and the way to those of a server. Every
error of ours is one line on stderr and status 1; Ctrl-C is status 130.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any, NoReturn

import click

from inflash import _checkout
from inflash._client import Client, Generation
from inflash._errors import InflashError
from inflash._generation import OnPrefill
from inflash._interrupt import cancel_on_interrupt
from inflash._messages import Stats
from inflash._progress import PrefillBar
from inflash._version import __version__

INTERRUPTED = 130

run_dir_option = click.option(
    "--run-dir",
    metavar="DIR",
    help="The server's run directory; default $INFLASH_RUN_DIR, or as `inflash serve` has it.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="inflash")
def cli() -> None:
    """Run language models bigger than memory."""


def sampling_options(command: Any) -> Any:
    """The options that say how tokens are chosen."""
    options = [
        click.option("--max-new-tokens", "-n", default=128, show_default=True, metavar="N"),
        click.option("--temperature", "-t", default=0.0, show_default=True, help="0 is greedy."),
        click.option("--top-k", default=0, help="Choose among the k likeliest; 0: all."),
        click.option("--top-p", default=1.0, help="... among the likeliest that sum to p."),
        click.option("--repetition-penalty", default=1.0, help="Above 1 repeats less."),
        click.option("--seed", type=int, help="The same seed gives the same answer."),
        click.option("--stop", multiple=True, metavar="TEXT", help="Ends the answer; repeatable."),
        click.option("--ignore-eos", is_flag=True, help="Go on after the model's end token."),
        click.option(
            "--trace/--no-trace", default=None, help="For `inflash trace`; default: as the server."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@click.argument("prompt")
@sampling_options
@click.option("--chat", is_flag=True, help="The prompt is a user's turn: use the chat template.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, at the end.")
@click.option("--no-stream", is_flag=True, help="Print the text at the end, not as it comes.")
@run_dir_option
def generate(
    prompt: str,
    chat: bool,
    as_json: bool,
    no_stream: bool,
    run_dir: str | None,
    **sampling: Any,
) -> None:
    """Continue PROMPT ("-": read it from stdin).

    The text goes to stdout, a line of figures to stderr.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    asked = [{"role": "user", "content": text}] if chat else text
    with Client(run_dir) as client, PrefillBar() as bar:
        generation = _ask(client, asked, sampling, bar)
        ids, logprobs = [], []
        shown = 0
        with cancel_on_interrupt(generation) as interrupt:
            for token in generation:
                bar.end()
                ids.append(token.id)
                logprobs.append(token.logprob)
                if not (as_json or no_stream):
                    sys.stdout.write(token.text)
                    sys.stdout.flush()
                    shown += len(token.text)
        bar.end()
        if as_json:
            click.echo(json.dumps(_as_json(generation, ids, logprobs)))
        else:
            click.echo(generation.text[shown:])
            _show_stats(generation.stats)
    if interrupt.seen:
        sys.exit(INTERRUPTED)


@cli.command()
@sampling_options
@run_dir_option
def chat(run_dir: str | None, **sampling: Any) -> None:
    """Talk with the model.

    Ctrl-C cancels an answer, Ctrl-D leaves, /new starts over.
    """
    from inflash._chat import Conversation, converse

    with Client(run_dir) as client:
        has_template = bool(client.status()["model"]["chat_template"])
        conversation = Conversation(has_template, stops=sampling.pop("stop"))

        def ask(prompt: Any, stop: tuple[str, ...], on_prefill: OnPrefill) -> Generation:
            return _ask(client, prompt, sampling | {"stop": stop}, on_prefill)

        converse(conversation, ask)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--watch", is_flag=True, help="Show it every second until Ctrl-C.")
@run_dir_option
def status(as_json: bool, watch: bool, run_dir: str | None) -> None:
    """Show the server: services, store, plan, queue, counters."""
    with Client(run_dir, timeout=5) as client:
        if as_json:
            click.echo(json.dumps(client.status(), indent=2))
            return
        from inflash._tables import show, show_live

        if watch:
            show_live(client.status)
        else:
            show(client.status())


def _ask(
    client: Client, prompt: Any, sampling: dict[str, Any], on_prefill: OnPrefill
) -> Generation:
    try:
        return client.generate(prompt, on_prefill=on_prefill, **sampling)
    except ValueError as error:  # a sampling value out of range
        raise click.UsageError(str(error)) from None


def _as_json(generation: Generation, ids: list[int], logprobs: list[float]) -> dict[str, Any]:
    stats = generation.stats
    assert stats is not None
    derived = {
        "tokens_per_s": stats.tokens_per_s,
        "hit_rate": stats.hit_rate,
        "decode_hit_rate": stats.decode_hit_rate,
        "decode_bytes_per_token": stats.decode_bytes_per_token,
        "decode_late_share": stats.decode_late_share,
        "decode_hidden_share": stats.decode_hidden_share,
        "decode_stall_share": stats.decode_stall_share,
        "decode_python_s": stats.decode_python_s,
    }
    return {
        "text": generation.text,
        "token_ids": ids,
        "logprobs": logprobs,
        "finish_reason": generation.finish_reason,
        "stats": dataclasses.asdict(stats) | derived,
    }


def _show_stats(stats: Stats | None) -> None:
    if stats is not None:
        click.secho(stats_line(stats), err=True, dim=True)


def stats_line(stats: Stats) -> str:
    """The figures of an answer, for a person."""
    reused = [f"{stats.reused_tokens:,} prompt tokens reused"] if stats.reused_tokens else []
    return " · ".join(
        [
            f"{stats.new_tokens} tokens",
            f"{stats.tokens_per_s:.1f} tokens/s",
            f"first after {stats.time_to_first_token_s:.2f} s",
            *reused,
            f"{stats.decode_bytes_per_token / 1e6:.2f} MB read per token",
            f"hit rate {100 * stats.decode_hit_rate:.1f} %",
            f"reads hidden {100 * stats.decode_hidden_share:.0f} %",
            _shares(stats),
        ]
    )


def _shares(stats: Stats) -> str:
    """Where the decode time went, for a person."""
    if not stats.decode_s:
        return "nothing decoded"
    seconds = {
        "compute": stats.decode_compute_s,
        "predictor": stats.decode_predictor_stall_s,
        "queue": stats.decode_queue_stall_s,
        "flash": stats.decode_flash_stall_s,
    }
    parts = [f"{name} {100 * s / stats.decode_s:.0f}" for name, s in seconds.items()]
    return f"time, %: {', '.join(parts)}, rest {100 * stats.decode_python_s / stats.decode_s:.0f}"


def _add_script(name: str, summary: str) -> None:
    """A command that hands everything, --help included, to its script."""

    @cli.command(
        name,
        help=summary,
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def run(arguments: tuple[str, ...]) -> None:
        _checkout.run_script(name, arguments)


for _name, _summary in _checkout.COMMANDS.items():
    _add_script(_name, _summary)


def main() -> NoReturn:
    """The entry point; never returns."""
    try:
        result = cli(standalone_mode=False)
    except InflashError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(INTERRUPTED)
    sys.exit(result if isinstance(result, int) else 0)
