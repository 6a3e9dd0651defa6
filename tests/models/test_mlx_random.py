"""Guards the promise of test_engine_random.py with mlx-lm's models under the scheduler: the same
random traffic, the same crowds and the same audit of the cache after every step, on the MLX
executor; every request gets what mlx-lm's model gives it alone, over mlx-lm's own caches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from support.engine_scenarios import scenario
from support.engine_traffic import EOS, Arrival, Wrong, audit_empty, compare, run
from support.engine_worlds import LATENT, STATE, crowd, world
from support.mlx_worlds import Models

from sixfold.common.config import EngineConfig
from sixfold.common.engine import Engine
from sixfold.platforms.interface import ExecutorInfo
from sixfold.platforms.mlx.pools import LayerPages, LayerStates

APART = 1e-4
"""How far a log-probability may be from the one alone."""
SETTINGS = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("worlds"))


def serve(
    models: Models, info: ExecutorInfo, config: EngineConfig, requests: list[Arrival]
) -> Engine:
    """As `engine_traffic.serve`, over a real executor."""
    with models.executor(info) as (executor, real):
        engine = Engine(executor, real, config, EOS)
        heard = run(engine, requests)
        compare(requests, heard, real, models.oracle(models.path(info)), APART)
        audit_empty(engine)
    return engine


Case = tuple[ExecutorInfo, EngineConfig, list[Arrival], bool]


@settings(SETTINGS, max_examples=12)
@given(scenario())
def test_any_traffic_gives_each_request_what_it_has_alone(models: Models, case: Case) -> None:
    info, config, requests, _ = case
    serve(models, info, config, requests)


@pytest.mark.wide
@settings(SETTINGS, max_examples=60)
@given(scenario())
def test_much_more_traffic(models: Models, case: Case) -> None:
    info, config, requests, _ = case
    serve(models, info, config, requests)


SHAPES = {"llama": (0,), "gemma3_text": (0, 3), "qwen3_5": (0, STATE), "deepseek_v3": (LATENT,)}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.wide)])
def test_crowds_on_a_small_cache(models: Models, name: str, number: int) -> None:
    rng = np.random.default_rng([number, len(name)])
    info = world(4, SHAPES[name], 2, 48, max_rows=5, max_step_tokens=20, overlap=number == 0)
    assert models.path(info).name.startswith(name)
    oracle = models.oracle(models.path(info))
    engine = serve(models, info, EngineConfig(), crowd(rng, info, 12, 10, oracle))
    assert engine.stats().cached_tokens > (40, 0)[number]
    assert engine.stats().preemptions > 0 or name == "qwen3_5" or number


# ---- the detectors fire


def traffic(models: Models, shape: tuple[int, ...]) -> None:
    info = world(4, shape, 2, 48, max_rows=5, max_step_tokens=20)
    oracle = models.oracle(models.path(info))
    serve(models, info, EngineConfig(), crowd(np.random.default_rng(1), info, 8, 6, oracle))


def test_a_key_in_the_wrong_place_is_found(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    read = LayerPages.read

    def shifted(self: LayerPages, plan: object) -> object:
        keys, values = read(self, plan)  # type: ignore[arg-type]
        late = keys.shape[2] > 20
        return (keys, values[:, :, ::-1]) if late else (keys, values)

    monkeypatch.setattr(LayerPages, "read", shifted)
    with pytest.raises(Wrong):
        traffic(models, (0,))


def test_a_state_that_is_not_restored_is_found(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LayerStates, "copy", lambda self, sources, targets: None)
    with pytest.raises(Wrong):
        traffic(models, (0, STATE))
