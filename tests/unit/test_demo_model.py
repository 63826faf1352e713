"""The shipped demo models are what their cards say: small, whole, sparse; they write Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Shipped:
    """A demo model and what it must keep to."""

    folder: Path
    bytes_max: int
    dtype: torch.dtype  # of the weights in the file
    hidden_min: int
    activation_key: str  # of config.json
    activation: str  # path of the activation function within a layer
    active_max: float  # of any layer; the mean may be at most 0.12
    opening: str  # of a function, that a greedy answer continues


MODELS = Path(__file__).parents[2] / "models"
SHIPPED = (
    Shipped(
        folder=MODELS / "demo",
        bytes_max=32_000_000,
        dtype=torch.float32,
        hidden_min=256,
        activation_key="activation_function",
        activation="activation_fn",
        active_max=0.3,
        opening="def ",
    ),
    Shipped(
        folder=MODELS / "demo-gated",
        bytes_max=6_000_000,
        dtype=torch.float16,
        hidden_min=192,
        activation_key="hidden_act",
        activation="mlp.act_fn",
        active_max=0.15,
        # After a bare 'def ' its greedy answer is one name that has no end.
        opening="class Point:\n    def ",
    ),
)

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


@pytest.fixture(scope="module", params=SHIPPED, ids=lambda shipped: shipped.folder.name)
def shipped(request: pytest.FixtureRequest) -> Shipped:
    return request.param


@pytest.fixture(scope="module")
def model(shipped: Shipped) -> Any:
    return AutoModelForCausalLM.from_pretrained(shipped.folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(shipped: Shipped) -> Any:
    return AutoTokenizer.from_pretrained(shipped.folder)


@pytest.fixture(scope="module")
def encode(tokenizer: Any) -> Callable[[str], torch.Tensor]:
    """Text -> token ids of (1, length)."""
    return lambda text: tokenizer(text, return_tensors="pt").input_ids


def test_the_folder_is_whole_and_small(shipped: Shipped) -> None:
    names = {path.name for path in shipped.folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    assert sum(path.stat().st_size for path in shipped.folder.iterdir()) <= shipped.bytes_max


def test_no_path_of_the_machine_that_trained_it(shipped: Shipped) -> None:
    for name in ("README.md", "config.json", "generation_config.json", "tokenizer_config.json"):
        text = (shipped.folder / name).read_text()
        assert not [mark for mark in ("/tmp", "/root", "/home", "/work") if mark in text], name


def test_the_weights_have_the_dtype_that_the_config_names(shipped: Shipped) -> None:
    assert AutoConfig.from_pretrained(shipped.folder).dtype == shipped.dtype
    tensors = load_file(shipped.folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {shipped.dtype}


def test_the_shape_is_worth_streaming(shipped: Shipped, model: Any) -> None:
    assert getattr(model.config, shipped.activation_key) == "relu"
    assert model.config.hidden_size >= shipped.hidden_min
    assert model.config.num_hidden_layers >= 6
    assert model.config.vocab_size == 2048
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_tokenizer_gives_back_every_text(tokenizer: Any) -> None:
    for text in (SOURCE, "def ", "\tx = 'é – 漢字'\n\n", ""):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id not in ids


def test_it_predicts_python_with_few_neurons(
    shipped: Shipped, model: Any, encode: Callable[[str], torch.Tensor]
) -> None:
    shares: list[float] = []

    def see(_: torch.nn.Module, inputs: tuple[torch.Tensor], __: torch.Tensor) -> None:
        shares.append((inputs[0] > 0).float().mean().item())

    layers = model.get_decoder().layers
    hooks = [x.get_submodule(shipped.activation).register_forward_hook(see) for x in layers]
    ids = encode(SOURCE)
    with torch.no_grad():
        logits = model(ids).logits
    for hook in hooks:
        hook.remove()

    assert F.cross_entropy(logits[0, :-1], ids[0, 1:]).item() < 4.0
    assert len(shares) == len(layers)
    assert max(shares) <= shipped.active_max
    assert min(shares) > 0.001  # a dead layer would make every figure about sparsity a lie
    assert sum(shares) / len(shares) <= 0.12


def test_it_continues_a_function(
    shipped: Shipped, model: Any, tokenizer: Any, encode: Callable[[str], torch.Tensor]
) -> None:
    ids = encode(shipped.opening)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False
    )
    text = str(tokenizer.decode(out[0]))
    assert text.startswith(shipped.opening)
    name, _, rest = text.removeprefix(shipped.opening).partition("(")
    assert name.isidentifier(), text
    assert ":" in rest, text  # greedy, so small a model may list parameters without an end
