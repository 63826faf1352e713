"""What a bench is asked to do, and what of that cannot be done. Pure but for a look at --placed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.bench import ablation, studies
from common.bench.caps import Asked, settings_of
from common.bench.clients import PROMPT_TOKENS
from common.bench.made import Shape
from common.bench.names import DEFAULT, GGUF, PACKED
from common.bench.rivals.gguf import row_problem
from common.bench.studies import PREFILL_TOKENS
from common.errors import UserError
from common.limits import QUEUE_MAX
from common.plan import kv_room
from common.store.geometry import pack_problem
from common.store.store import Store


@dataclass(frozen=True)
class Options:
    """What a bench is to do."""

    shape: str | Path  # a name, or a config.json
    work: Path
    cap_bytes: int | None = None  # None: see default_cap
    tokens: int = 32  # of an answer
    rival_tokens: int = 8  # of whoever reads the whole model for each
    prompt: int = 64  # tokens
    prompts: int = 3
    rounds: int = 3
    names: tuple[str, ...] = DEFAULT  # of contenders, inflash among them
    settings: Mapping[str, str] = field(default_factory=dict)  # of inflash's server
    python: str = ""  # interpreter that has the rivals' packages
    ablation: bool = False
    placed: Path | None = None  # a store of the same model, made with `convert --placement`
    prefill: bool = False
    clients: tuple[int, ...] = ()  # at once, one after the other
    growth: bool = False
    context_cost: bool = False
    everything_cached: bool = False
    remove: bool = False  # what was made, at the end


def check(options: Options, shape: Shape) -> None:
    """`UserError` for options that cannot go together, or that no server would take."""
    for what, needed in _contexts(options).items():
        if needed > shape.context:
            raise UserError(
                f"{what}: {needed:,} tokens do not fit into the context of {shape.name},"
                f" {shape.context:,}: choose fewer"
            )
    if any(not 0 < count <= QUEUE_MAX for count in options.clients):
        raise UserError(f"--clients: a server takes 1 to {QUEUE_MAX} at once (limit QUEUE_MAX)")
    for name in options.names:
        if problem := _format_problem(name, shape):
            raise UserError(f"--only: {name} cannot be made of {shape.name}: {problem}")
    for key in ("store", "run_dir", "threads", "parent"):
        if key in options.settings:
            raise UserError(f"--set: {key} is the bench's own to choose")
    settings_of(Asked("", options.settings))  # raises and names the key
    if options.placed is not None:
        geometry = Store.open(options.placed).geometry
        if geometry != shape.geometry:
            raise UserError(f"--placed: {options.placed} is not a store of {shape.name}")


def _format_problem(name: str, shape: Shape) -> str:
    """Why the shape's rows cannot have a contender's number format; "" if they can."""
    if name in PACKED:
        return pack_problem(PACKED[name], shape.geometry.hidden)
    if name in GGUF:
        widths = [shape.geometry.hidden]
        if shape.geometry.gated:  # else the file's FFN has a width of its own
            widths.append(shape.geometry.neurons)
        return next(filter(None, (row_problem(GGUF[name], width) for width in widths)), "")
    return ""


def _contexts(options: Options) -> dict[str, int]:
    """Tokens that a server has to have room for, by what for."""
    answer = options.tokens + 1  # its first comes with the prompt, and is not timed
    found = {f"a prompt of {options.prompt:,} and an answer of {answer:,}": options.prompt + answer}
    if options.prefill:
        found["--prefill"] = prefill_context()
    if options.clients:
        found[f"--clients {max(options.clients)}"] = clients_context(options)
    return found


def prefill_context() -> int:
    """Tokens: the prompt, and an answer of one that comes with it and one that is timed."""
    return PREFILL_TOKENS + 2


def clients_context(options: Options) -> int:
    """Tokens of all clients together, each with the room that a request takes; or of the request
    that goes before them."""
    together = max(options.clients) * kv_room(PROMPT_TOKENS + options.tokens)
    return max(together, options.prompt + options.tokens + 1)


def server_settings(options: Options, cap_bytes: int | None, context: int) -> dict[str, str]:
    """The promise that is measured: all of inflash in no more than the cap; room for as many tokens
    as the others make room for, or more where --set says so."""
    cap = {} if cap_bytes is None else {"memory": f"{cap_bytes}"}
    room = max(context, int(options.settings.get("context", 0)))
    return cap | dict(options.settings) | {"context": f"{room}"}


def capped_runs(options: Options, shape: Shape, cap_bytes: int | None) -> list[Asked]:
    """What will run under the cap, of ours; the cap None: it is not known yet."""
    runs = []
    for what, context in _contexts(options).items():
        runs.append(Asked(f"inflash with {what}", server_settings(options, cap_bytes, context)))
    base = dict(runs[0].settings)
    for name in options.names:
        if name in PACKED:
            packed = PACKED[name]
            runs.append(Asked(name, base | {"resident": packed}, packed))
    if options.context_cost:
        long = {"context": f"{min(studies.LONG_CONTEXT, shape.context)}"}
        runs.append(Asked("inflash with --context-cost", base | long))
    if options.ablation:
        for step in ablation.make_steps(shape.geometry, options.placed):
            if step.settings is not None:
                settings = ablation.settings_of(step, base)
                runs.append(Asked(f"the ablation's step {step.name}", settings))
    return runs
