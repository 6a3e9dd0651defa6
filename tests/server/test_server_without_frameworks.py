"""Contract guarded: common/ and server/ need no tensor framework, and the MLX platform needs no
torch. A whole server, engine process included, serves while every import of one raises."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from serving import Launcher

BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Block())
with open({log!r}, "a") as log:
    print("blocked", file=log)
"""

ABSENT = """
import sys

for name in ("torch", "torch_npu", "triton", "jax"):
    sys.modules[name] = None  # as if it were not installed
with open({log!r}, "a") as log:
    print("blocked", file=log)
"""

FRAMEWORKS = {"torch", "mlx", "mlx_lm", "triton", "transformers", "torch_npu", "jax"}


def test_everything_works_with_the_frameworks_blocked(tmp_path: Path, scripted_model: Path) -> None:
    launcher = Launcher(tmp_path)
    log = tmp_path / "blocked.log"
    block = BLOCK.format(names=FRAMEWORKS, log=str(log))
    (tmp_path / "env" / "sitecustomize.py").write_text(block)
    try:
        server = launcher.start(scripted_model, "--platform", "toy")
        answer = server.openai().chat.completions.create(
            model=server.model, messages=[{"role": "user", "content": "x"}], logprobs=True
        )
        assert answer.choices[0].finish_reason == "stop"
        assert server.http.get("/metrics").status_code == 200
        assert server.http.get("/v1/platform").json()["platform"] == "toy"
        server.terminate()
        assert server.exit_code() == 0
        assert log.read_text().count("blocked") >= 2, "the block was not active in both processes"
        done = launcher.run("generate", "x", scripted_model, "--platform", "toy", "--chat")
        assert done.returncode == 0, done.stderr
        doctor = launcher.run("doctor")
        assert "toy" in doctor.stdout, doctor.stderr
    finally:
        launcher.close()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mlx") is None, reason="MLX has no wheel for this machine")
def test_mlx_serves_with_torch_blocked(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)
    log = tmp_path / "blocked.log"
    (tmp_path / "env" / "sitecustomize.py").write_text(ABSENT.format(log=str(log)))
    try:
        server = launcher.start("--platform", "mlx", "--max-context", "256", "--max-rows", "4")
        answer = server.openai().completions.create(
            model=server.model, prompt="The capital of France is", max_tokens=4, temperature=0
        )
        assert "Paris" in answer.choices[0].text
        assert server.http.get("/v1/platform").json()["platform"] == "mlx"
        server.terminate()
        assert server.exit_code() == 0
        assert log.read_text().count("blocked") >= 2, "the block was not active in both processes"
    finally:
        launcher.close()
