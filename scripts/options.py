"""The options of every command that starts a server; each is a setting of common/config.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

_OPTIONS = [
    click.option("--memory", metavar="SIZE", help="Budget for everything. [default: half of RAM]"),
    click.option("--cache", metavar="SIZE|SHARE", help="Cache size instead, as 2GB or 25%."),
    click.option(
        "--resident",
        type=click.Choice(["float", "int8", "int4"]),
        help="Pack the matrices of attention and head when they are loaded: less memory, fewer"
        " bytes for a token, some loss. [default: float, as in the store]",
    ),
    click.option(
        "--embedding",
        type=click.Choice(["auto", "memory", "flash"]),
        help="Where the tokens' embedding is. On flash, a token's row is read; the cache has room."
        " [default: auto: flash, unless all of the FFN is cached or it is the head as well]",
    ),
    click.option(
        "--predictor",
        type=click.Choice(["auto", "all", "exact", "lowrank"]),
        help="[default: auto: lowrank if the store was fitted, else exact]",
    ),
    click.option(
        "--policy",
        type=click.Choice(["auto", "window", "decay"]),
        help="Who leaves the cache. [default: auto: decay unless a window is given]",
    ),
    click.option("--window", metavar="auto|K", help="Tokens a neuron stays. [default: auto]"),
    click.option(
        "--slots",
        type=click.Choice(["global", "equal", "use"]),
        help="One pool for all layers; or of each layer, equal, or by use, as the predictor"
        " names. [default: global]",
    ),
    click.option(
        "--extras",
        type=click.Choice(["none", "ahead", "resident"]),
        help="Neurons that are computed though not named. [default: ahead]",
    ),
    click.option(
        "--lookahead",
        type=click.Choice(["auto", "on", "off"]),
        help="Read for the next layer under this one's work. [default: auto: on, but where nearly"
        " all that a token needs is cached]",
    ),
    click.option("--context", metavar="TOKENS", help="Prompt and answer. [default: 2048]"),
    click.option(
        "--sequences",
        metavar="N",
        help="KV cache room for N sequences of --context tokens; shorter requests share it, so more"
        " than N can run together. [default: 1]",
    ),
    click.option(
        "--block",
        metavar="auto|TOKENS",
        help="Of a prompt, in one pass over the weights. [default: auto: 512, fewer if memory is"
        " short]",
    ),
    click.option(
        "--reuse",
        type=click.Choice(["on", "off"]),
        help="Compute no prompt tokens again that a request before had. [default: on]",
    ),
    click.option("--threads", metavar="N", help="Of compute. [default: all cores]"),
    click.option(
        "--awake",
        type=click.Choice(["auto", "on", "off"]),
        help="Keep cores from halting while a request runs, which takes power. [default: auto:"
        " virtual ones, if this user may write /dev/cpu_dma_latency]",
    ),
    click.option(
        "--apart",
        type=click.Choice(["auto", "on", "off"]),
        help="Give compute's first thread a core of its own. [default: auto: of two virtual ones]",
    ),
    click.option("--backend", type=click.Choice(["auto", "aio", "threads"]), help="How to read."),
    click.option(
        "--trace",
        type=click.Choice(["on", "off"]),
        help="Record where each token's time goes, for `inflash trace`. [default: on]",
    ),
    click.option("--metrics", metavar="[HOST:]PORT", help="Prometheus metrics; host 127.0.0.1."),
    click.option(
        "--slow",
        metavar="WHAT",
        help="For diagnosis: slowed on purpose, as reads:1%:20ms or predictor:3ms.",
    ),
    click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"])),
]


def server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options; a value that was not given is None, and the setting's default holds."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
