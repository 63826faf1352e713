"""The layout is the architecture: imports run one way, and files and functions stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("inflash", "common", "services", "scripts")
# Who may import whom, beside itself and libraries.
ALLOWED = {
    "inflash": set[str](),
    "common": {"inflash"},
    "services": {"inflash", "common"},
    "scripts": {"inflash", "common"},
}
# Only compute runs the model; a process that needs no torch does not import it.
TORCH_FREE = ("inflash", "services/gateway", "services/predictor", "services/reader")
HEAVY = {"torch", "transformers", "accelerate"}
FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70
EXCEPTIONS: dict[str, str] = {}  # "path" or "path:function" → the reason

SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_run_one_way(path: Path) -> None:
    package, *rest = path.relative_to(ROOT).parts
    for module in imports(path):
        top, *inner = module.split(".")
        if top not in PACKAGES:
            continue
        assert top == package or top in ALLOWED[package], f"{name(path)} imports {module}"
        if top == package == "services":
            assert inner[:1] == rest[:1], f"{name(path)} imports another service: {module}"


@pytest.mark.parametrize("folder", TORCH_FREE)
def test_torch_stays_where_the_model_is(folder: str) -> None:
    seen: set[str] = set()
    todo = [f"{name(p)[:-3].replace('/', '.')}" for p in (ROOT / folder).rglob("*.py")]
    while todo:
        module = todo.pop()
        path = ROOT / f"{module.replace('.', '/')}.py"
        path = path if path.exists() else ROOT / module.replace(".", "/") / "__init__.py"
        if module in seen or not path.exists():
            continue
        seen.add(module)
        for imported in imports(path):
            assert imported.split(".")[0] not in HEAVY, f"{folder} reaches {imported} by {module}"
            todo.append(imported)


@pytest.mark.parametrize("module", ["services.gateway.loop", "services.reader.loop"])
def test_numba_stays_where_products_are(module: str) -> None:
    """It is half of a process's memory, and the plan has no room for it in these (common/plan.py).
    What imports it only when it is called is in order."""
    code = f"import sys, {module}; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    long = {name(path): len(text.splitlines()) - FILE_LINES_MAX}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            long[f"{name(path)}:{node.name}"] = lines - FUNCTION_LINES_MAX
    over = {where for where, excess in long.items() if excess > 0} - EXCEPTIONS.keys()
    assert not over, f"too long, and no reason given in EXCEPTIONS: {sorted(over)}"
