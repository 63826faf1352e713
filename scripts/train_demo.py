"""Train a demo model: a small, sparse ReLU model of Python source, made on one CPU.

Does: trains an OPT-class model, or a smaller Llama-class one with a gated FFN, under a sparsity
pressure on the text that demo_corpus gathers, measures it on files that it never saw, and publishes
a Hugging Face folder with its model card by rename. It can be interrupted (Ctrl-C) and run again:
it goes on from its last checkpoint.
Refuses: a corpus or checkpoint made with other settings, a folder above the size limit, and an
output folder that holds something other than a model. Needs torch 2.9 or newer (its Muon).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Before torch loads its OpenMP: threads that spin while another process holds their core make a
# step ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast

from scripts.demo_card import Figures, write_card
from scripts.demo_corpus import END, Batches, Settings, Tokens, make_corpus
from scripts.demo_model import KINDS, Kind, Sparsity, build_model, layers_of

CHECKPOINT_S = 120.0
LOG_S = 30.0


def build_optimizers(model: Any, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices (fewer tokens to the same loss), AdamW for the rest."""
    inner = [p for p in layers_of(model).parameters() if p.ndim == 2]
    chosen = {id(p) for p in inner}
    other = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(inner, lr=settings.lr_matrix, weight_decay=0.01),
        torch.optim.AdamW(
            other, lr=settings.lr_other, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        ),
    ]


def lr_factor(progress: float, settings: Settings) -> float:
    """Warm-up over 2 %, constant, then linear to (almost) zero."""
    rising = progress / 0.02
    falling = (1.0 - progress) / settings.decay_share
    return max(0.01, min(1.0, rising, falling))


@torch.no_grad()
def evaluate(model: Any, sparsity: Sparsity, held: Tokens, tokens_max: int) -> dict[str, Any]:
    """Held-out loss and active fractions, float32 products, windows of the full context."""
    length = sparsity.settings.context
    count = min(tokens_max, len(held) - 1) // length
    model.eval()
    sparsity.fired.zero_()
    loss = 0.0
    for first in range(0, count, 4):
        starts = range(first * length, min(first + 4, count) * length, length)
        rows = np.stack([held[s : s + length + 1] for s in starts]).astype(np.int64)
        ids = torch.from_numpy(rows)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    model.train()
    seen = count * length
    return {
        "tokens": seen,
        "loss": loss / seen,
        "active": (sparsity.fired.mean(1) / seen).tolist(),
        "silent": (sparsity.fired == 0).float().mean().item(),
    }


# ---------------------------------------------------------------- training


class Trainer:
    """Model, optimisers, sparsity and where they stand; what a checkpoint holds."""

    def __init__(self, work: Path, kind: Kind) -> None:
        self.path = work / "checkpoint.pt"
        self.kind = kind
        self.settings = settings = kind.settings
        self.model = build_model(kind)
        self.sparsity = Sparsity(self.model, kind)
        self.optimizers = build_optimizers(self.model, settings)
        self.tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
        self.batches = Batches(np.load(work / "train.npy"), self.tokenizer, settings)
        self.step, self.tokens_seen, self.elapsed_s, self.loss = 0, 0, 0.0, 0.0
        if self.path.exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.path, weights_only=True)
        if state["settings"] != asdict(self.settings):
            raise SystemExit(f"{self.path} was made with other settings: use another --work")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens_seen, self.elapsed_s, self.loss = state["counters"]
        self.sparsity.coefs, self.sparsity.active = state["sparsity"]

    def save(self) -> None:
        state = {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "counters": (self.step, self.tokens_seen, self.elapsed_s, self.loss),
            "sparsity": (self.sparsity.coefs, self.sparsity.active),
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)

    def advance(self, progress: float) -> None:
        """One optimiser step."""
        short = self.step % self.settings.long_every
        length = self.settings.context_short if short else self.settings.context
        ids = self.batches.take(self.step, length)
        # bf16 on the matrix units, float32 master weights
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        (loss + self.sparsity.take_penalty()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rates = (self.settings.lr_matrix, self.settings.lr_other)
        for optimizer, rate in zip(self.optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * lr_factor(progress, self.settings)
            optimizer.step()
            optimizer.zero_grad()
        self.sparsity.adapt(progress)
        self.step += 1
        self.tokens_seen += ids.shape[0] * length
        self.loss += max(0.02, 1.0 / self.step) * (loss.item() - self.loss)

    @torch.no_grad()
    def round_weights(self) -> None:
        """To the values that the folder will hold, so that what is measured is what is published.

        They stay float32 tensors. No training may follow: the optimisers need the lost digits.
        """
        for parameter in self.model.parameters():
            parameter.copy_(parameter.to(self.kind.dtype))

    def figures(self) -> Figures:
        parameters = sum(p.numel() for p in self.model.parameters())
        return Figures(self.elapsed_s / 60, self.step, self.tokens_seen, parameters)

    def status(self) -> str:
        active = " ".join(f"{100 * a:.0f}" for a in self.sparsity.active)
        return f"step {self.step}  loss {self.loss:.3f}  active % {active}"


def train(trainer: Trainer, minutes: float, console: Console) -> bool:
    """Run the schedule by the clock, so that it ends on time anywhere. False: interrupted."""
    stop = threading.Event()
    # Set by hand, because a shell that starts a job in the background makes it ignore Ctrl-C's
    # signal; and only a flag, so that no checkpoint is made in the middle of a step.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    status = TextColumn("{task.fields[status]}")
    columns = (BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(), status)
    saved = logged = now = time.monotonic()
    began = now - trainer.elapsed_s
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("train", total=60 * minutes, status="")
        while trainer.elapsed_s < 60 * minutes and not stop.is_set():
            trainer.advance(trainer.elapsed_s / (60 * minutes))
            now = time.monotonic()
            trainer.elapsed_s = now - began
            bar.update(task, completed=trainer.elapsed_s, status=trainer.status())
            if now - saved > CHECKPOINT_S:
                saved = now
                trainer.save()
            if now - logged > LOG_S and not console.is_terminal:
                logged = now
                console.print(f"{trainer.elapsed_s / 60:5.1f} min  {trainer.status()}")
    trainer.save()
    return not stop.is_set()


def publish(out: Path, facts: dict[str, Any], seen: dict[str, Any], trainer: Trainer) -> None:
    """Build the whole folder beside its place, check its size, then rename."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / "new"
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=trainer.tokenizer,
            bos_token=END,
            eos_token=END,
            clean_up_tokenization_spaces=False,
            model_max_length=trainer.settings.context,
        )
        trainer.model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0)
        trainer.model.set_attn_implementation("sdpa")
        trainer.model.to(trainer.kind.dtype).save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)  # safetensors lets only its owner read it
        tokenizer.save_pretrained(folder)
        write_card(folder, trainer.kind, facts, seen, trainer.figures())
        size = sum(path.stat().st_size for path in folder.iterdir())
        if size > (limit := trainer.kind.folder_bytes_max):
            raise SystemExit(f"the folder has {size} bytes, more than {limit}")
        if out.exists():
            out.rename(Path(scratch) / "old")
        folder.rename(out)


def arguments() -> argparse.Namespace:
    kinds = KINDS.values()
    minutes = " or ".join(f"{kind.minutes:.0f}" for kind in kinds)
    outs = " or ".join(f"models/{kind.name}" for kind in kinds)
    works = " or ".join(f"{tempfile.gettempdir()}/inflash-{kind.name}" for kind in kinds)
    parser = argparse.ArgumentParser(
        description="Train a demo model (a sparse ReLU model of Python source) on this machine.",
        epilog="Ctrl-C saves a checkpoint; the same command goes on from it. A larger --minutes "
        "trains a finished run further. Use 'nice' where the machine has other work. Defaults "
        f"that depend on the family are in the order {', '.join(KINDS)}.",
    )
    add = parser.add_argument
    add("--family", choices=KINDS, default="opt", help="transformers' class (default: opt)")
    add(
        "--minutes",
        type=float,
        help=f"training time in all, with resumed parts (default: {minutes})",
    )
    add("--out", type=Path, help=f"folder to publish the model in (default: {outs})")
    add("--work", type=Path, help=f"folder for tokens and checkpoint (default: {works})")
    add(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="CPU threads (default: %(default)s)",
    )
    add(
        "--held-out-tokens",
        type=int,
        default=260_000,
        help="most tokens to measure on (default: %(default)s)",
    )
    options = parser.parse_args()
    kind = KINDS[options.family]
    options.minutes = kind.minutes if options.minutes is None else options.minutes
    options.out = options.out or Path("models") / kind.name
    options.work = options.work or Path(tempfile.gettempdir()) / f"inflash-{kind.name}"
    return options


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks: fresh pages for every step's tensors cost 25 % of it."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for option, value in ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 1 << 28)):
            getattr(libc, "mallopt", lambda *_: 0)(option, value)


def main() -> int:
    """Trains, measures, publishes. Exit status 0: published; 130: interrupted, checkpoint saved."""
    options = arguments()
    out: Path = options.out
    if out.exists() and not (out / "config.json").is_file():
        raise SystemExit(f"{out} exists and holds no model: choose another --out")
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    console = Console(soft_wrap=True)
    options.work.mkdir(parents=True, exist_ok=True)
    kind = KINDS[options.family]
    facts = make_corpus(options.work, kind.settings, console)
    trainer = Trainer(options.work, kind)
    if not train(trainer, options.minutes, console):
        console.print(f"stopped, checkpoint saved: {trainer.status()}")
        return 130
    trainer.round_weights()
    held = np.load(options.work / "held.npy")
    seen = evaluate(trainer.model, trainer.sparsity, held, options.held_out_tokens)
    publish(out, facts, seen, trainer)
    active = ", ".join(f"{100 * a:.1f}" for a in seen["active"])
    console.print(f"{out}: held-out loss {seen['loss']:.3f} nats a token, active % {active}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
