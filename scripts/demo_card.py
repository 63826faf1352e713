"""A demo model's card (README.md): every figure in it is measured, none is typed in.

Owns the card's text and the sample continuations, which it makes as a user would: from the folder,
with AutoTokenizer and generate. No path of the machine that trained the model is written.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.demo_corpus import HELD_OUT_EVERY
from scripts.demo_model import Kind

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [python, relu, sparse, {family}]
---
# inflash {title}

A {parameters:.2f} M-parameter ReLU language model of Python source: transformers' {cls} class from
random weights, {layers} layers, hidden {hidden}, {ffn_words} {ffn}, {head_words}, {vocab} tokens of
byte-level BPE, context {context}, {dtype}. On average {mean:.1f} % of its FFN neurons fire for a
token, so it shows what inflash does at a size that any machine trains and runs. It knows the look
of Python and nothing else: not a code assistant.

## Held-out figures
Files that were never trained on (one in {every}, by the hash of the relative path);
{seen[tokens]:,} tokens in windows of {context}, {weight_words}, a neuron is active when its
{pre_activation} is above 0.

| | |
| --- | --- |
| loss | {seen[loss]:.3f} nats a token |
| bits per byte | {bits:.3f} |
| neurons that never fired there | {silent:.1f} % |

| layer | active neurons per token |
| --- | --- |
{rows}
| mean | {mean:.1f} % |

## Training
| | |
| --- | --- |
| steps | {steps:,} of {batch_tokens:,} tokens ({millions:.1f} M tokens) |
| time | {minutes:.0f} minutes on CPU, bfloat16 products, float32 weights |
| windows | {context_short} tokens; {context} in one step of {long_every} |
| | {opener_share:.0%} of them start at `def`, `class`, `import` or `from`, as prompts do |
| optimisers | Muon (learning rate {lr_matrix}) for the layers' matrices, AdamW ({lr_other}) else |
| schedule | by the clock: warm-up 2 %, constant, linear to 1 % over the last {decay_share:.0%} |
| sparsity | mean over rms of each layer's {acts} as a penalty, its coefficient per layer set |
| | by a controller; targets {target_first:.1%} in layer 0 and {target_rest:.1%} in the others |
| split tokens | {split_share:.0%} of ` name` tokens, {split_share_keyword:.0%} after a keyword, |
| | are cut after the space, so that a prompt can end in one: `def ` |
| seed | {seed} |

Made by (the schedule goes by the clock and the text is what is installed, so another machine
gets a similar model, not the same bytes):

```
python -m scripts.train_demo {family_option}--minutes {minutes:.0f}
```

## Data
Python source found on the machine: the standard library and installed packages, without tests,
tables, generated and very large files, each content once, at most {package_mb:.0f} MB a package.

| part | files | bytes | tokens |
| --- | --- | --- | --- |
| train | {train[files]:,} | {train[bytes]:,} | {train[tokens]:,} |
| held out | {held[files]:,} | {held[bytes]:,} | {held[tokens]:,} |

Held-out files come from the same packages as the rest, so they share names and idioms with it.
None of the text ships with the model; it stays under its own licences.

Python {python} and: {source_list}.

Trained with {packages}.

## Samples
`def `, greedy:

```python
{greedy}
```

`def `, temperature 0.7, top-k 40, seed 0:

```python
{sampled}
```
"""

# What the card says differently of each family.
WORDS = {
    "opt": {
        "title": "demo model",
        "cls": "OPT",
        "ffn_words": "FFN",
        "head_words": "{heads} heads",
        "weight_words": "float32 weights",
        "pre_activation": "pre-activation",
        "acts": "activations",
        "family_option": "",
    },
    "llama": {
        "title": "gated demo model",
        "cls": "Llama",
        "ffn_words": "gated FFN",
        "head_words": "{heads} heads ({kv_heads} key-value) of {head_dim}",
        "weight_words": "float16 weights as float32",
        "pre_activation": "gate's pre-activation",
        "acts": "gate activations",
        "family_option": "--family llama ",
    },
}


@dataclass(frozen=True)
class Figures:
    """How far the training went."""

    minutes: float
    steps: int
    tokens: int
    parameters: int


def continuation(folder: Path, prompt: str, **how: Any) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    ids = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=96, **how)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True)).rstrip()


def write_card(
    folder: Path, kind: Kind, facts: dict[str, Any], seen: dict[str, Any], figures: Figures
) -> None:
    """`facts` as demo_corpus gives them, `seen` as evaluate gives it."""
    settings = asdict(kind.settings)
    words = {name: text.format(**settings) for name, text in WORDS[kind.family].items()}
    active = seen["active"]
    held = facts["held"]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
    text = CARD.format(
        **settings,
        **words,
        family=kind.family,
        dtype=str(kind.dtype).removeprefix("torch."),
        train=facts["train"],
        held=held,
        seen=seen,
        every=HELD_OUT_EVERY,
        bits=seen["loss"] / math.log(2) * held["tokens"] / held["bytes"],
        silent=100 * seen["silent"],
        rows="\n".join(f"| {layer} | {100 * share:.1f} % |" for layer, share in enumerate(active)),
        mean=100 * sum(active) / len(active),
        parameters=figures.parameters / 1e6,
        minutes=figures.minutes,
        steps=figures.steps,
        millions=figures.tokens / 1e6,
        package_mb=kind.settings.package_bytes_max / 1e6,
        python=platform.python_version(),
        source_list=", ".join(facts["sources"]),
        packages=", ".join(versions),
        greedy=continuation(folder, "def ", do_sample=False),
        sampled=continuation(folder, "def ", do_sample=True, temperature=0.7, top_k=40),
    )
    (folder / "README.md").write_text(text)
