"""The shipped demo model is what its card says: small, whole, sparse, and it writes Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parents[2] / "models" / "demo"
FOLDER_BYTES_MAX = 32_000_000

# Written for this test, so no training run can have seen it.
SOURCE = '''"""Track the loans of a small tool library."""

from dataclasses import dataclass, field
from datetime import date, timedelta


class LoanError(Exception):
    """A tool cannot be lent or taken back."""


@dataclass
class Tool:
    name: str
    owner: str
    borrower: str | None = None
    due: date | None = None


@dataclass
class Library:
    """All tools by name, and how long a loan lasts."""

    days: int = 14
    tools: dict[str, Tool] = field(default_factory=dict)

    def add(self, name, owner):
        if name in self.tools:
            raise LoanError(f"{name} is already here")
        self.tools[name] = Tool(name, owner)

    def lend(self, name, borrower, today=None):
        """Lend a tool and return the day on which it is due."""
        tool = self.tools.get(name)
        if tool is None:
            raise LoanError(f"no tool named {name}")
        if tool.borrower is not None:
            raise LoanError(f"{name} is with {tool.borrower}")
        tool.borrower = borrower
        tool.due = (today or date.today()) + timedelta(days=self.days)
        return tool.due

    def overdue(self, today):
        result = []
        for tool in self.tools.values():
            if tool.due is not None and tool.due < today:
                result.append(tool)
        return sorted(result, key=lambda tool: tool.due)


if __name__ == "__main__":
    library = Library()
    library.add("drill", owner="Ada")
    print(library.lend("drill", "Grace"))
'''


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def encode() -> Callable[[str], torch.Tensor]:
    """Text -> token ids of (1, length)."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    return lambda text: tokenizer(text, return_tensors="pt").input_ids


def test_the_folder_is_whole_and_small() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= FOLDER_BYTES_MAX


def test_no_path_of_the_machine_that_trained_it() -> None:
    for name in ("README.md", "config.json", "generation_config.json", "tokenizer_config.json"):
        text = (FOLDER / name).read_text()
        assert not [mark for mark in ("/tmp", "/root", "/home", "/work") if mark in text], name


def test_the_shape_is_worth_streaming(model: Any) -> None:
    assert model.config.activation_function == "relu"
    assert model.config.hidden_size >= 256
    assert model.config.num_hidden_layers >= 6
    assert model.config.vocab_size == 2048
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_tokenizer_gives_back_every_text(encode: Callable[[str], torch.Tensor]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    for text in (SOURCE, "def ", "\tx = 'é – 漢字'\n\n", ""):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id not in ids


def test_it_predicts_python_with_few_neurons(
    model: Any, encode: Callable[[str], torch.Tensor]
) -> None:
    shares: list[float] = []

    def see(_: torch.nn.Module, inputs: tuple[torch.Tensor], __: torch.Tensor) -> None:
        shares.append((inputs[0] > 0).float().mean().item())

    layers = model.model.decoder.layers
    hooks = [layer.activation_fn.register_forward_hook(see) for layer in layers]
    ids = encode(SOURCE)
    with torch.no_grad():
        logits = model(ids).logits
    for hook in hooks:
        hook.remove()

    assert F.cross_entropy(logits[0, :-1], ids[0, 1:]).item() < 4.0
    assert len(shares) == len(layers)
    assert max(shares) <= 0.30
    assert min(shares) > 0.001  # a dead layer would make every figure about sparsity a lie
    assert sum(shares) / len(shares) <= 0.12


def test_it_continues_a_function(model: Any, encode: Callable[[str], torch.Tensor]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    ids = encode("def ")
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False
    )
    text = str(tokenizer.decode(out[0]))
    assert text.startswith("def ")
    name, _, rest = text.removeprefix("def ").partition("(")
    assert name.isidentifier(), text
    assert ":" in rest, text  # greedy, so small a model may list parameters without an end
