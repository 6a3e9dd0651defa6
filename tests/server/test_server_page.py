"""Contract guarded: the chat page. Its script, run against a real server with the little of a
browser that it uses, greets, streams, shows the speed, and stops. Needs node; skipped without."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from serving import Running

BROWSER = r"""
const base = process.argv[2], stopAfter = Number(process.argv[3]);
const elements = {};
function element(id) {
  return elements[id] ??= {
    textContent: "", value: "", className: "", children: [], handlers: {},
    scrollHeight: 0, scrollTop: 0, clientHeight: 0,
    classList: { add(name) { elements[id].className += " " + name; } },
    append(child) { this.children.push(child); },
    addEventListener(name, handler) { this.handlers[name] = handler; },
    scrollIntoView() {},
    requestSubmit() { this.handlers.submit({ preventDefault() {} }); },
  };
}
let made = 0;
globalThis.document = {
  getElementById: element,
  createElement: () => element("made" + made++),
};
globalThis.sessionStorage = { getItem: () => null, setItem() {} };
const fetched = fetch;
globalThis.fetch = (path, options) => fetched(base + path, options);
require("vm").runInThisContext(require("fs").readFileSync(process.argv[4], "utf8"));

const poll = (ready, then) => ready() ? then() : setTimeout(() => poll(ready, then), 5);
poll(() => element("model").textContent.includes(" on "), () => {
  element("text").value = "Talk to me";
  element("text").handlers.keydown({ key: "Enter", preventDefault() {} });
  const turns = element("log").children;
  if (stopAfter) {
    poll(() => turns[1].textContent.length >= stopAfter, () => element("form").requestSubmit());
  }
  poll(() => element("send").textContent === "Send", () => {
    console.log(JSON.stringify({
      model: element("model").textContent, speed: element("speed").textContent,
      turns: turns.map((turn) => [turn.className, turn.textContent]),
    }));
    process.exit(0);
  });
});
"""

NODE = shutil.which("node")


def visit(server: Running, folder: Path, stop_after: int) -> dict[str, Any]:
    if NODE is None:
        pytest.skip("node is not installed")
    found = re.search(r"<script>(.*)</script>", server.http.get("/").text, re.S)
    assert found is not None
    (folder / "page.js").write_text(found[1])
    (folder / "browser.cjs").write_text(BROWSER)
    done = subprocess.run(
        [NODE, "browser.cjs", server.url, str(stop_after), "page.js"],
        capture_output=True, text=True, cwd=folder, timeout=server.deadline,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_talks(scripted: Running, script: str, tmp_path: Path) -> None:
    seen = visit(scripted, tmp_path, 0)
    assert seen["model"] == f"{scripted.model} on toy"
    assert seen["turns"] == [["turn user", "Talk to me"], ["turn assistant", script]]
    assert re.fullmatch(r"[\d.]+ tok/s", seen["speed"])


def test_stop_button_ends_the_work(server: Running, tmp_path: Path) -> None:
    """The model may end before its first word, at random: then there was nothing to stop."""
    for _ in range(5):
        (who, said) = visit(server, tmp_path, 1)["turns"][1]
        assert who == "turn assistant"
        if said:
            break
    assert said
    server.until_running(0)
