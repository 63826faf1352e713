"""What the rivals that run transformers share: decoding, and weights that really are in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.bench.rivals.program import Packages, Step, load
from common.errors import UserError

DTYPES = ("float16", "bfloat16", "float32")


def open_model(
    packages: Packages, folder: Path, dtype: str, threads: int, **options: object
) -> Any:
    """transformers' causal model of a checkpoint, as `from_pretrained` gives it, on the CPU."""
    torch, transformers = load("torch", packages), load("transformers", packages)
    if not folder.is_dir():  # transformers would look for it on the network
        raise UserError(f"there is no checkpoint at {folder}: no such folder")
    torch.set_num_threads(threads)
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True, **options
    )
    return model.eval()


def keep_in_memory(model: Any) -> int:
    """Copies the weights that are mapped from the checkpoint into memory; returns their bytes.

    transformers leaves them in the file's map: under a cap the kernel would drop them after each
    use, and every token read the whole model. Weights on the "meta" device, which accelerate
    brings in when they are needed, stay there. Tied weights stay tied.
    """
    kept: dict[int, Any] = {}
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            where = parameter.data_ptr()
            if where not in kept:
                kept[where] = parameter.data.clone()
            parameter.data = kept[where]
    return sum(int(tensor.nbytes) for tensor in kept.values())


def make_step(model: Any, packages: Packages) -> Step:
    """Greedy decoding with the library's own KV cache."""
    torch = load("torch", packages)
    cache: Any = None

    def step(ids: list[int]) -> int:
        nonlocal cache
        with torch.inference_mode():
            output = model(
                torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        cache = output.past_key_values
        return int(output.logits[0, -1].argmax())

    return step


def versions(packages: Packages) -> str:
    """ "torch 2.13.0, transformers 5.23.0"."""
    return ", ".join(f"{pip} {load(module, packages).__version__}"
                     for module, pip in packages.items())  # fmt: skip
