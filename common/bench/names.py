"""The contenders' names, what each runs on, and the groups that `--only` takes.

inflash_FORMAT      a store whose bundles are packed so, attention and head packed so, too
llama_cpp_MODE      llama.cpp on an F16 file of the same shape: mapped, or all of it in memory
llama_cpp_FORMAT    the same file quantised, mapped
"""

from __future__ import annotations

from common.errors import UserError

PACKED = {"inflash_int8": "int8", "inflash_int4": "int4"}
"""Number format of those of ours whose weights are packed."""

GGUF = {
    "llama_cpp_mmap": "f16",
    "llama_cpp_ram": "f16",
    "llama_cpp_q8_0": "q8_0",
    "llama_cpp_q4_0": "q4_0",
}
"""Number format of the GGUF file that each llama.cpp runs on."""

PEERS = {"llama_cpp_q8_0": "inflash_int8", "llama_cpp_q4_0": "inflash_int4"}
"""Which of ours has as many bits a number as a rival; of the others it is `inflash`."""

OURS = ("inflash", *PACKED)
RIVALS = ("accelerate", *GGUF)
NAMES = (*OURS, *RIVALS)
UNCAPPED = ("llama_cpp_ram",)
DEFAULT = ("inflash", "accelerate", "llama_cpp_mmap", "llama_cpp_ram")
GROUPS = {"default": DEFAULT, "packed": (*PACKED, *PEERS), "all": NAMES}
NOT_ASKED = "not asked for"  # why a contender is absent that --only does not name


def chosen(only: str) -> tuple[str, ...]:
    """The contenders that `only` names, groups resolved, in NAMES' order; `UserError`."""
    words = [word.strip() for word in only.split(",") if word.strip()]
    known = GROUPS | {name: (name,) for name in NAMES}
    if unknown := [word for word in words if word not in known]:
        raise UserError(
            f"--only: {', '.join(unknown)}: there are {', '.join(NAMES)}, and the groups"
            f" {', '.join(GROUPS)}"
        )
    named = {name for word in words for name in known[word]}
    if "inflash" not in named:
        raise UserError("--only: inflash is what the others are measured beside; name it, too")
    return tuple(name for name in NAMES if name in named)
