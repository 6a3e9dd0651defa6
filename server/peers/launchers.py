"""Which peers take part, how each is started, and why one is left out.

A peer is an engine of `known.toml` that is installed and can read the model, or a server that runs
already (`--url`). To add an engine, add it to `known.toml`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import socket
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...common.checkpoint.source import resolve_model
from ...common.config import EngineConfig
from ...common.errors import ConfigError

KV_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}

FORMS = {
    "gguf": "a .gguf file (as MODEL)",
    "hf": "a Hugging Face directory (as MODEL or with --hf)",
    "openvino": "a directory with openvino_model.xml (as MODEL or with --hf)",
}


@dataclass(frozen=True, slots=True)
class Known:
    """An entry of known.toml, which explains the fields."""

    name: str
    program: str
    reads: tuple[str, ...]
    arguments: tuple[str, ...]
    model: str
    package: str = ""
    api: str = "/v1"
    dtype: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ()
    prefill: tuple[str, ...] = ()
    asked_only: bool = False


@dataclass(frozen=True, slots=True)
class Peer:
    """A server to measure. Without a command it runs already and is not ours to stop.

    Until it is started, {port} stands for its port: a port is only sure to be free when it is
    taken at once.
    """

    name: str
    api: str  # such as http://127.0.0.1:8000/v1
    model: str  # the name that its requests carry; "": the first that it lists
    command: tuple[str, ...] = ()

    def on(self, port: int) -> Peer:
        command = tuple(part.replace("{port}", str(port)) for part in self.command)
        return replace(self, api=self.api.replace("{port}", str(port)), command=command)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user asked for."""

    model: str = ""  # "": the bundled demo model
    hf: Path | None = None  # the same model as a directory
    names: tuple[str, ...] = ()  # empty: every peer there is
    urls: tuple[str, ...] = ()  # NAME=URL or NAME=URL,MODEL
    arguments: tuple[str, ...] = ()  # NAME=ARGUMENTS, more arguments of a known peer
    programs: Mapping[str, Path] = field(default_factory=dict)  # by name: not the one on PATH
    dtype: str | None = None
    quantize: str | None = None
    prefill: bool = False  # P will be measured


def known() -> dict[str, Known]:
    entries = tomllib.loads(Path(__file__).with_name("known.toml").read_text("utf-8"))
    lists = ("reads", "arguments", "dtype", "quantize", "prefill")
    return {
        name: Known(name, **entry | {key: tuple(entry.get(key, ())) for key in lists})
        for name, entry in entries.items()
    }


def choose(wanted: Wanted) -> tuple[list[Peer], dict[str, str]]:
    """The peers to run, in order, and for each one left out the reason.

    Raises ConfigError for names that mean nothing, CheckpointError for a model that is not there.
    """
    EngineConfig(dtype=wanted.dtype, quantize=wanted.quantize)  # refuses values it does not know
    engines, running = known(), dict(map(_running, wanted.urls))
    names = wanted.names or tuple(
        dict.fromkeys([*(n for n, k in engines.items() if not k.asked_only), *running])
    )
    choices = dict.fromkeys([*engines, *running])
    if unknown := [name for name in names if name not in choices]:
        raise ConfigError(
            f"--peers: no peer {', '.join(unknown)}; there are {', '.join(choices)}, and any other "
            "server as --url NAME=URL."
        )
    launched = [name for name in names if name not in running]
    more = _more_arguments(wanted.arguments, launched)
    forms = _forms(wanted) if launched else {}
    chosen, left_out = [], {}
    for name in names:
        if name in running:
            chosen.append(running[name])
            continue
        found = _launch(engines[name], forms, wanted, more.get(name, ()))
        if isinstance(found, Peer):
            chosen.append(found)
        else:
            left_out[name] = found
    return chosen, left_out


def _running(text: str) -> tuple[str, Peer]:
    name, separator, rest = text.partition("=")
    url, _, model = rest.partition(",")
    if not (name and separator and re.match(r"https?://\S+$", url)):
        raise ConfigError(f"--url wants NAME=URL or NAME=URL,MODEL, got {text!r}.")
    url = url.rstrip("/")
    return name, Peer(name, url if re.search(r"/v\d+$", url) else f"{url}/v1", model)


def _more_arguments(pairs: tuple[str, ...], launched: list[str]) -> dict[str, tuple[str, ...]]:
    more: dict[str, tuple[str, ...]] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or name not in launched:
            raise ConfigError(
                f"--peer-arg wants NAME=ARGUMENTS with a NAME of {', '.join(launched)}, "
                f"got {pair!r}."
            )
        more[name] = (*more.get(name, ()), *shlex.split(text))
    return more


def _forms(wanted: Wanted) -> dict[str, Path]:
    """The model in each form that there is; "any" is the one the user named."""
    given = resolve_model(wanted.model)
    forms = {"any": given}
    for path in filter(None, (given, wanted.hf)):
        if path.is_file():
            forms["gguf"] = path
        else:
            forms["openvino" if (path / "openvino_model.xml").exists() else "hf"] = path
    return forms


def _launch(
    engine: Known, forms: Mapping[str, Path], wanted: Wanted, more: tuple[str, ...]
) -> Peer | str:
    """How to start an engine, or why it cannot take part."""
    program = _find(engine, wanted)
    if program is None:
        return f"{engine.program} is neither beside this Python nor on PATH"
    if engine.package and importlib.util.find_spec(engine.package) is None:
        return f"the Python package {engine.package} is not installed"
    form = next((form for form in engine.reads if form in forms), None)
    if form is None:
        return f"it reads {' or '.join(FORMS[form] for form in engine.reads)}"
    fields = {
        "model": str(forms[form]),
        "port": "{port}",
        "threads": str(usable_cores()),
        "dtype": wanted.dtype or "",
        "kv_dtype": KV_DTYPES.get(wanted.dtype or "", ""),
        "quantize": wanted.quantize or "",
    }
    parts = (
        (engine.arguments, True),
        (engine.dtype, wanted.dtype),
        (engine.quantize, wanted.quantize),
        (engine.prefill, wanted.prefill),
    )
    filled = [part.format(**fields) for arguments, used in parts if used for part in arguments]
    api = f"http://127.0.0.1:{{port}}{engine.api}"
    return Peer(engine.name, api, engine.model.format(**fields), (program, *filled, *more))


def _find(engine: Known, wanted: Wanted) -> str | None:
    if engine.program == "{python}":
        return sys.executable
    if engine.name in wanted.programs:
        return str(wanted.programs[engine.name])
    beside = str(Path(sys.executable).parent)
    return shutil.which(engine.program, path=os.environ.get("PATH", "") + os.pathsep + beside)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def usable_cores() -> int:
    """Cores that this process may use; the affinity counts in containers."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
