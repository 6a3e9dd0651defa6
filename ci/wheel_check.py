"""Build the wheel, install it in an environment of its own, and serve one chat request from it.

    python ci/wheel_check.py FOLDER

The environment sees the tensor framework of the one that runs this script (nothing is downloaded
twice), but `sixfold` only from the wheel.
"""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START_LIMIT_S = 180
QUESTION = {"role": "user", "content": "What is the capital of France?"}


def run(*command: str | Path, cwd: Path) -> None:
    if subprocess.run([str(c) for c in command], cwd=cwd, check=False).returncode:
        sys.exit(f"wheel check: failed: {' '.join(str(c) for c in command)}")


def fresh_environment(folder: Path) -> Path:
    """A venv whose packages are this environment's, except for sixfold."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    here = next(p for p in sys.path if p.endswith("site-packages"))
    link = folder / "lib" / version / "site-packages" / "outer.pth"
    link.write_text(here + "\n")  # .pth files inside `here` (the editable install) are not followed
    return python


def serve_once(sixfold: Path, cwd: Path) -> str:
    """Start the server on a free port, ask one question, stop it; returns the answer."""
    command = [str(sixfold), "serve", "--port", "0", "--max-rows", "4", "--cache-tokens", "4096"]
    # In the file's four bits "Paris" and "L'Étoile" are a near tie, here as in llama.cpp.
    command += ["--dtype", "float32"]
    # S603: the command is our own.
    server = subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    lines: queue.Queue[str] = queue.Queue()
    stdout = server.stdout or sys.exit("wheel check: no output pipe")
    threading.Thread(target=lambda: [lines.put(x) for x in stdout], daemon=True).start()
    try:
        address = wait_for_address(server, lines)
        with urllib.request.urlopen(address + "/v1/models", timeout=30) as reply:
            model = json.load(reply)["data"][0]["id"]
        body = {"model": model, "max_tokens": 16, "temperature": 0, "messages": [QUESTION]}
        request = urllib.request.Request(
            address + "/v1/chat/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=120) as reply:
            return str(json.load(reply)["choices"][0]["message"]["content"])
    finally:
        server.terminate()
        server.wait(60)


def wait_for_address(server: subprocess.Popen[str], lines: queue.Queue[str]) -> str:
    """The address from the curl line, which is printed when the server is ready."""
    deadline = time.monotonic() + START_LIMIT_S
    seen = []
    while time.monotonic() < deadline:
        try:
            line = lines.get(timeout=1)
        except queue.Empty:
            if server.poll() is not None:
                break
            continue
        seen.append(line)
        if found := re.search(r"curl.*?(http://[^/\s]+)/v1", line):
            return found.group(1)
    sys.exit("wheel check: the server did not become ready:\n" + "".join(seen))


def main() -> None:
    work = Path(sys.argv[1]).resolve()
    run(sys.executable, "-m", "build", "--wheel", "--outdir", work / "dist", cwd=ROOT)
    python = fresh_environment(work / "wheel-venv")
    wheel = next((work / "dist").glob("sixfold-*.whl"))
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel, cwd=work)
    ask = [str(python), "-c", "import sixfold; print(sixfold.__file__)"]
    found = subprocess.run(ask, cwd=work, capture_output=True, text=True, check=True)
    where = found.stdout.strip()
    if not where.startswith(str(work)):
        sys.exit(f"wheel check: sixfold was imported from {where}, not from the wheel")
    answer = serve_once(python.parent / "sixfold", work)
    print("answer from the installed wheel:", answer)
    if "Paris" not in answer:
        sys.exit("wheel check: the demo model's answer does not name Paris")


if __name__ == "__main__":
    main()
