"""The composition root: the one place that puts a platform, an executor and an engine together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..common.checkpoint.checkpoint import Checkpoint, open_checkpoint
from ..common.checkpoint.source import resolve_model
from ..common.config import EngineConfig
from ..common.decisions import DecisionLog, to_record
from ..common.engine import Engine
from ..common.errors import ConfigError, KernelError
from ..common.messages import Ready
from ..platforms.interface import (
    Decision,
    DeviceFacts,
    EngineSpec,
    ExecutorInfo,
    LoadProgress,
    Probe,
)

log = logging.getLogger("sixfold.engine")

Progress = Callable[[str, int, int], None]
"""(stage, bytes done, bytes in all); all is 0 when it is not known."""


@dataclass(frozen=True, slots=True)
class Located:
    """A model on this machine, and why it was taken."""

    path: Path
    because: str


@dataclass(frozen=True, slots=True)
class Launched:
    engine: Engine
    ready: Ready
    decisions: DecisionLog


def quiet(stage: str, done: int, total: int) -> None:
    """Progress for nobody."""


def locate(model: str, progress: Progress = quiet) -> Located:
    """Find or download the model. Raises CheckpointError."""
    path = resolve_model(model, progress)
    if not model:
        return Located(path, "no model was named, so it is the bundled demo model")
    if Path(model).expanduser().exists():
        return Located(path, "as given")
    return Located(path, f"downloaded from the hub as {model!r}, or cached")


def served_name(model: str, checkpoint: Checkpoint) -> str:
    """A hub id is served under that id, anything local under the checkpoint's own name."""
    from_hub = bool(model) and not Path(model).expanduser().exists()
    return model if from_hub else checkpoint.name


Probes = Mapping[str, Probe]
"""Every platform's judgement of this machine, by name."""


def warm_up(config: EngineConfig) -> Probes | None:
    """Import what `build` will import; the probes for it. None when something is wrong, which is
    for `build` to report."""
    from ..platforms import machine, select

    try:
        found = select.probe_all(machine.observe())
        choice = select.choose(found, config.platform)
        facts = _device(choice.chosen, found[choice.chosen].devices, config.device_index)
        # Making an executor imports its framework; it loads nothing.
        select.platforms()[choice.chosen].executor(_spec(config, Path()), facts).close()
    except Exception as error:
        log.debug("the platform cannot be prepared: %s", error)
        return None
    return found


def build(
    config: EngineConfig,
    located: Located,
    progress: Progress = quiet,
    found: Probes | None = None,
) -> Launched:
    """Choose the platform, load the model, make the engine; `found` by an earlier probe of this
    process saves another. Raises SixfoldError."""
    from ..platforms import machine, select

    log = DecisionLog()
    log.add("model", located.path, located.because)
    checkpoint = open_checkpoint(located.path)
    if found is None:
        found = select.probe_all(machine.observe())
    choice = select.choose(found, config.platform)
    log.extend([choice])
    facts = _device(choice.chosen, found[choice.chosen].devices, config.device_index)
    platform = select.platforms()[choice.chosen]
    executor = platform.executor(_spec(config, located.path), facts)
    try:
        info = executor.load(_staged(progress))
        log.extend(info.decisions)
        log.extend(_settings(config, info))
        if config.strict:
            _refuse_fallbacks(log)
        engine = Engine(executor, info, config, checkpoint.eos_token_ids)
    except BaseException:
        executor.close()
        raise
    return Launched(engine, _ready(choice.chosen, config, info, log), log)


def _staged(progress: Progress) -> LoadProgress:
    def tell(done: int, total: int, stage: str = "loading weights") -> None:
        progress(stage, done, total)

    return tell


def _device(platform: str, devices: tuple[DeviceFacts, ...], index: int) -> DeviceFacts:
    if index >= len(devices):
        raise ConfigError(
            f"device_index {index} does not exist: the platform {platform!r} sees "
            f"{len(devices)} device(s). Use an index below that."
        )
    return devices[index]


def _spec(config: EngineConfig, path: Path) -> EngineSpec:
    """Every field that spec and config share, and the resolved path."""
    shared = {f.name for f in fields(EngineSpec)} & {f.name for f in fields(EngineConfig)}
    return EngineSpec(model_path=str(path), **{name: getattr(config, name) for name in shared})


def _settings(config: EngineConfig, info: ExecutorInfo) -> list[Decision]:
    """The scheduler's settings as decisions: what holds, and whether the user said so."""
    defaults = EngineConfig()
    result = []
    for name in ("max_rows", "max_step_tokens", "max_queue", "prefix_cache", "eviction"):
        value = getattr(config, name)
        because = "default" if value == getattr(defaults, name) else "set by the user"
        result.append(Decision(name.replace("_", " "), str(value), because))
    result.append(_drafts(config))
    if config.draft is not None:
        overlap = Decision("overlap", "off", "drafts follow from the result of the step before")
    elif not config.overlap:
        overlap = Decision("overlap", "off", "set by the user")
    elif info.overlap:
        overlap = Decision("overlap", "on", "the executor takes a step before the last is done")
    else:
        overlap = Decision("overlap", "off", "the executor runs one step at a time")
    return [*result, overlap]


def _drafts(config: EngineConfig) -> Decision:
    if config.draft is None:
        return Decision("drafts", "off", "default: one token of a row in a step; see --draft")
    who = {
        "mtp": "by the model's own head",
        "ngram": "what followed the last tokens where they stood before",
    }[config.draft]
    chosen = f"{config.draft}, up to {config.draft_tokens} of a row in a step"
    return Decision("drafts", chosen, f"set by the user: {who}; verified, so no answer changes")


def _refuse_fallbacks(log: DecisionLog) -> None:
    fallbacks = log.fallbacks()
    if fallbacks:
        listed = "; ".join(f"{d.what}: {d.chosen} ({d.because})" for d in fallbacks)
        raise KernelError(
            f"--strict refuses {len(fallbacks)} generic choice(s): {listed}. "
            "Install what they lack or leave --strict out."
        )


def _ready(platform: str, config: EngineConfig, info: ExecutorInfo, log: DecisionLog) -> Ready:
    groups = {}
    for group in info.groups:
        record = asdict(group)
        groups[record.pop("name")] = record | {"kind": group.kind.value}
    return Ready(
        platform=platform,
        vocab_size=info.vocab_size,
        max_context=info.max_context,
        max_logprobs=info.max_logprobs,
        page_size=info.page_size,
        max_queue=config.max_queue,
        features={n: [s.status.value, s.reason] for n, s in info.features.items()},
        decisions=[to_record(decision) for decision in log],
        groups=groups,
        weight_bytes=info.weight_bytes,
        cache_bytes=info.cache_bytes,
        images=info.images,
    )
