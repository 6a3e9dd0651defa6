"""Guards the laws of the architecture that a syntax tree can show: no hardware outside
`platforms/`, no framework in `common/` and `server/`, platforms apart, contracts pure, packages
complete."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from sixfold.platforms import select

ROOT = Path(__file__).resolve().parents[2]
PLATFORMS = ("cuda", "rocm", "npu", "xpu", "cpu", "mlx")
IN_PLATFORMS = "sixfold.platforms."
FRAMEWORKS = {"torch", "torch_npu", "mlx", "mlx_lm", "triton"}


def predicates() -> ModuleType:
    spec = importlib.util.spec_from_file_location("predicates", ROOT / "ci/count_predicates.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources(*rooms: str) -> list[Path]:
    found = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    assert found
    return found


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(absolute dotted module, is it imported when the file is) of every import; `from a import b`
    gives a.b."""
    package = ["sixfold", *path.relative_to(ROOT).parts[:-1]]
    tree = ast.parse(path.read_text())
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in guarded
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            for alias in node.names:
                name = ".".join([*base, *([node.module] if node.module else []), alias.name])
                yield name, id(node) not in guarded


# ---- law 1: no hardware outside platforms/


def test_no_platform_predicate_outside_platforms(capsys: pytest.CaptureFixture[str]) -> None:
    assert predicates().main() == 0
    assert capsys.readouterr().out == "platform predicates outside platforms/: 0\n"


def test_the_count_is_a_script() -> None:
    script = [sys.executable, str(ROOT / "ci/count_predicates.py")]
    run = subprocess.run(script, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "platform predicates outside platforms/: 0\n")


GUILTY = [
    "import torch.cuda",
    "from torch import cuda",
    "import torch_npu",
    "import mlx.core as mx",
    "def f():\n    import triton.language as tl",
    "from ..platforms.cuda import PLATFORM",
    "from ..platforms import rocm",
    "from sixfold.platforms.torch_runtime.executor import TorchExecutor",
    "torch.cuda.synchronize()",
    "x = torch.version.hip",
    "torch.backends.mkldnn",
    "if x.is_cuda: pass",
    "if tensor.device.type == kind: pass",
    "if facts.kind == 'cpu': pass",
    "if name in ('cpu', 'other'): pass",
    "if facts.kind == 'npu': pass",
    "match kind:\n    case 'cpu': pass",
    "device = f'cuda:{index}'",
    "x.to('xpu')",
    "is_rocm = True",
    "def use_nvidia_path(): pass",
    "class AscendRunner: pass",
    "self.has_mlx = 1",
    "build(cuda_graphs=True)",
    "def f(*, use_amd=False): pass",
    "message = 'install the Intel driver'",
    "table = {'gfx942': 1}",
]
INNOCENT = [
    '"""Also runs on CUDA, as the docstring may say."""',
    "# nvidia, in a comment",
    "class A:\n    x: int = 0\n    '''On ROCm this is 1.'''",
    "torch.device('cpu')",
    "x = torch.empty(3, device='cpu')",
    "metallic = hippo = amdahl = intelligence = 1",
    "from ..platforms.interface import Platform",
    "from ..platforms import machine, select",
    "import torch",
    "torch.nn.functional.silu(x)",
    "if facts.lane_width == 64: pass",
    "kind = group.kind.value",
]


@pytest.mark.parametrize("source", GUILTY)
def test_the_detector_fires(source: str) -> None:
    assert predicates().findings(source, "injected.py")


@pytest.mark.parametrize("source", INNOCENT)
def test_the_detector_spares_the_innocent(source: str) -> None:
    assert predicates().findings(source, "innocent.py") == []


def test_an_injected_file_is_counted_and_a_scan_of_nothing_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        predicates().count(tmp_path)
    (tmp_path / "common" / "deep").mkdir(parents=True)
    (tmp_path / "common" / "deep" / "bad.py").write_text("\nx.is_cuda\n")
    (tmp_path / "platforms").mkdir()
    (tmp_path / "platforms" / "fine.py").write_text("x.is_cuda\n")
    (found,) = predicates().count(tmp_path)
    assert (found.path, found.line) == ("common/deep/bad.py", 2)


# ---- law 2: common and server need no framework


def test_common_and_server_import_no_framework() -> None:
    for path in sources("common", "server"):
        for module, top_level in imports(path):
            root = module.split(".")[0]
            assert root not in FRAMEWORKS, f"{path}: {module}"
            assert not (root == "transformers" and top_level), f"{path}: {module}"


def test_common_imports_of_the_platforms_only_contracts() -> None:
    for path in sources("common"):
        for module, _ in imports(path):
            assert not module.startswith(("sixfold.server", "sixfold.models")), f"{path}: {module}"
            if module.startswith("sixfold.platforms"):
                assert module.startswith("sixfold.platforms.interface"), f"{path}: {module}"


BLOCKED = """
import importlib, pkgutil, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in %r:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import sixfold.common, sixfold.server
count = 0
for package in (sixfold.common, sixfold.server):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
        count += 1
print(count)
"""


def test_every_module_of_common_and_server_imports_with_frameworks_blocked() -> None:
    program = BLOCKED % (FRAMEWORKS | {"transformers"},)
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= len(sources("common", "server")) - 2


# ---- platforms


def test_platforms_do_not_import_each_other() -> None:
    seen = 0
    for name in PLATFORMS:
        allowed = {name, "torch_runtime"} if name != "mlx" else {name}
        if name in ("cuda", "rocm", "xpu"):
            allowed.add("triton_kernels")
        for path in sources(f"platforms/{name}"):
            inner = [m.split(".")[2] for m, _ in imports(path) if m.startswith(IN_PLATFORMS)]
            packages = [part for part in inner if (ROOT / "platforms" / part).is_dir()]
            seen += len(packages)
            assert set(packages) <= allowed, f"{path}: {packages}"
    assert seen


def test_the_shared_runtime_knows_no_platform() -> None:
    for path in sources("platforms/torch_runtime"):
        for module, _ in imports(path):
            assert module.split(".")[:2] != ["sixfold", "server"], f"{path}: {module}"
            assert not any(module.startswith(f"sixfold.platforms.{p}") for p in PLATFORMS), module


@pytest.mark.parametrize("name", PLATFORMS)
def test_a_platform_is_its_folder_and_imports_its_framework_late(name: str) -> None:
    assert select.platforms()[name].name == name
    for module, top_level in imports(ROOT / "platforms" / name / "__init__.py"):
        heavy = module.split(".")[0] in FRAMEWORKS or ".torch_runtime" in module
        assert not (heavy and top_level), module


# ---- contracts, packages, guards


def test_interfaces_are_protocols_dataclasses_and_enums_over_numpy() -> None:
    paths = sorted((ROOT / "platforms").glob("interface*.py"))
    assert len(paths) >= 5
    for path in paths:
        for module, _ in imports(path):
            outside = module.split(".")[0]
            assert outside in {"sixfold", "numpy"} | set(sys.stdlib_module_names), module
            if outside == "sixfold":
                assert module.startswith("sixfold.platforms.interface"), module
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                marks = " ".join(map(ast.unparse, [*node.bases, *node.decorator_list]))
                assert any(w in marks for w in ("Protocol", "dataclass", "Enum", "IntFlag")), (
                    node.name
                )
            elif isinstance(node, ast.FunctionDef):
                assert len(node.body) <= 2, f"{path}: {node.name} is logic, not a contract"


def test_listed_packages_and_files_are_those_on_disk() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = ("common", "models", "platforms", "server")
    on_disk = {p.parent for room in rooms for p in (ROOT / room).rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in on_disk)
    names = {"sixfold"} | {".".join(["sixfold", *p.relative_to(ROOT).parts]) for p in on_disk}
    assert sorted(settings["packages"]) == sorted(names)
    shipped = {
        ROOT / Path(*package.split(".")[1:]) / name
        for package, files in settings.get("package-data", {}).items()
        for name in files
    }
    others = {p for folder in on_disk for p in folder.iterdir() if p.is_file()}
    built = {p for p in others if p.name.startswith("_native.")}  # setup.py compiles it in place
    assert {p for p in others if p.suffix not in (".py", ".pyc")} - built == shipped


def test_no_assert_outside_tests() -> None:
    for path in sources("common", "models", "platforms", "server"):
        bad = [n.lineno for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)]
        assert not bad, f"{path}: {bad}"
