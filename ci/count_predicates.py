"""Count platform predicates outside `platforms/`: places that name a vendor, test a device type or
import a vendor's module. The design allows none.

    python ci/count_predicates.py

Reads the syntax tree, so comments and docstrings may speak of hardware, code may not. Prints each
finding and the count; exits 1 when the count is not 0.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("common", "models", "server", "__init__.py", "__main__.py")

PLATFORMS = frozenset("cuda rocm npu xpu mlx".split())
VENDORS = PLATFORMS | frozenset(
    "nvidia amd intel apple huawei ascend hip gfx cann metal mps hpu radeon geforce".split()
)
DEVICE_TYPES = PLATFORMS | {"cpu", "mps", "hip"}
MODULES = ("torch_npu", "mlx", "mlx_lm", "triton", "intel_extension_for_pytorch", "pynvml")
TORCH_PARTS = frozenset("cuda xpu npu mps hip version backends".split())
"""Parts of torch that exist for one kind of device (`torch.version` tells the build)."""
DEVICE_TESTS = frozenset("is_cuda is_xpu is_npu is_mps is_cpu is_hip device_type".split())


class Finding(NamedTuple):
    path: str
    line: int
    what: str


def words(text: str) -> set[str]:
    """Lower-case words of an identifier or a string: snake_case, CamelCase, digits cut off."""
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", text)
    return {word.lower() for word in re.findall(r"[A-Za-z]+", spaced.replace("_", " "))}


def findings(source: str, path: str) -> list[Finding]:
    """All predicates in one file's source, in order of lines, one for each place."""
    tree = ast.parse(source, path)
    docstrings = set(_docstrings(tree))
    found = {
        (node.lineno, what)
        for node in ast.walk(tree)
        if hasattr(node, "lineno") and node not in docstrings
        for what in _judge(node)
    }
    return [Finding(path, line, what) for line, what in sorted(found)]


def _docstrings(tree: ast.AST) -> Iterator[ast.AST]:
    """Strings that are statements: docstrings and the notes below fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.value


def _judge(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            for alias in names:
                yield from _module(alias.name)
        case ast.ImportFrom(module=module, names=names):
            for alias in names:
                yield from _module(f"{module or ''}.{alias.name}")
        case ast.Attribute(value=ast.Name(id="torch"), attr=attr) if attr in TORCH_PARTS:
            yield f"uses torch.{attr}"
        case ast.Attribute(attr="type", value=ast.Attribute(attr="device")):
            yield "tests a device type"
        case ast.Attribute(attr=attr) if attr in DEVICE_TESTS:
            yield f"tests a device type: {attr}"
        case ast.Compare():
            yield from _comparison(node)
        case ast.MatchValue(value=ast.Constant(value=str(text))) if text in DEVICE_TYPES:
            yield f"matches {text!r}"
        case ast.Constant(value=str(text)):
            yield from _names(text, "a string")
        case ast.Name(id=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
            yield from _names(name, "an identifier")
        case ast.Attribute(attr=name):
            yield from _names(name, "an attribute")
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield from _names(name, "a definition")


def _module(name: str) -> Iterator[str]:
    parts = name.split(".")
    if parts[0] in MODULES:
        yield f"imports {parts[0]}"
    if parts[0] == "torch" and len(parts) > 1 and parts[1] in TORCH_PARTS:
        yield f"imports torch.{parts[1]}"
    if "platforms" in parts[:-1]:
        after = parts[parts.index("platforms") + 1]
        if after in PLATFORMS | {"cpu", "torch_runtime", "triton_kernels"}:
            yield f"imports the platform {after}"


def _comparison(node: ast.Compare) -> Iterator[str]:
    """`kind == "cpu"`, `name in ("cpu", …)`; other vendors' names are found as strings anyway."""
    for side in (node.left, *node.comparators):
        for part in ast.walk(side):
            if isinstance(part, ast.Constant) and part.value == "cpu":
                yield "compares with 'cpu'"


def _names(text: str, where: str) -> Iterator[str]:
    named = sorted(words(text) & VENDORS)
    if named:
        yield f"{where} names {', '.join(named)}"


def files(root: Path = ROOT) -> list[Path]:
    paths = [path for room in ROOMS for path in [root / room] if path.is_file()]
    return paths + sorted(p for room in ROOMS if (root / room).is_dir()
                          for p in (root / room).rglob("*.py"))  # fmt: skip


def count(root: Path = ROOT) -> list[Finding]:
    """Findings of every file outside `platforms/`. Raises FileNotFoundError when there are none to
    read, for a scan of nothing proves nothing."""
    paths = files(root)
    if not paths:
        raise FileNotFoundError(f"no source files under {root}")
    return [f for path in paths for f in findings(path.read_text(), str(path.relative_to(root)))]


def main() -> int:
    found = count()
    for finding in found:
        print(f"{finding.path}:{finding.line}: {finding.what}")
    print(f"platform predicates outside platforms/: {len(found)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
