"""Guards the law that looking at a machine imports no framework and initialises no device: in a
process of its own, with every driver library that a process could load made to be noticed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from toy_checkpoint import toy_environment

PROGRAM = """
import ctypes, os, sys

opened = []
sys.addaudithook(lambda event, args: opened.append((event, args)) if event in WATCHED else None)
WATCHED = {"open", "os.open", "ctypes.dlopen"}

from sixfold.platforms import machine, select
seen = machine.observe()
found = select.probe_all(seen)
select.choose(found)
for platform in select.platforms().values():
    platform.supports("logprobs", next(p for p in found.values() if p.devices).devices[0])
select.install_extra(seen)

heavy = {"torch", "torch_npu", "mlx", "mlx_lm", "triton", "transformers", "tokenizers"}
print("imported:", sorted(heavy & set(sys.modules)))
loads = [args[0] for event, args in opened if event == "ctypes.dlopen"]
print("loaded:", [name for name in loads if name])
nodes = ("/dev/nvidia", "/dev/kfd", "/dev/dri", "/dev/davinci", "/dev/dxg")
print("opened:", [a[0] for e, a in opened if "open" in e and str(a[0]).startswith(nodes)])
maps = open("/proc/self/maps").read() if os.path.exists("/proc/self/maps") else ""
drivers = "libcuda libnvidia-ml libamdhip libhsa libze_ libascendcl libtorch libmlx".split()
print("mapped:", [name for name in drivers if name in maps])
print("platforms:", list(found))
"""


def test_observing_and_probing_touch_no_framework_and_no_device(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=toy_environment(tmp_path / "site"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    said = dict(line.split(": ", 1) for line in run.stdout.splitlines())
    assert said["imported"] == said["loaded"] == said["opened"] == said["mapped"] == "[]"
    assert said["platforms"] == "['cuda', 'rocm', 'npu', 'xpu', 'mlx', 'cpu', 'toy']"


def test_the_check_would_notice_a_framework(tmp_path: Path) -> None:
    """The same program after a platform that imports torch in its probe."""
    environment = toy_environment(tmp_path / "site")
    module = tmp_path / "site" / "toy_platform.py"
    (tmp_path / "site" / "triton.py").write_text("")  # a light stand-in for a framework
    text = module.read_text().replace("-> hw.Probe:\n", "-> hw.Probe:\n        import triton\n")
    module.write_text(text)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    assert "imported: ['triton']" in run.stdout
