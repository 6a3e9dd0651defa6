"""Servers for the tests of this folder.

The suite runs on the platform named by `--platform` (default: the toy). What can only be seen with
a scripted model, or with faults, always runs on the toy.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import (
    DEADLINE,
    HOSTED,
    NAMED,
    PATIENCE,
    SERVING_DEMO,
    Launcher,
    Options,
    Running,
    arguments,
    install_hosted,
)
from tiny_babbler import write_babbler
from toy_checkpoint import write_toy_checkpoint


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--served"):
        return
    chosen = {one for one in items if "served_options" in getattr(one, "fixturenames", ())}
    config.hook.pytest_deselected(items=[one for one in items if one not in chosen])
    items[:] = [one for one in items if one in chosen]


@pytest.fixture(scope="session")
def launcher(
    tmp_path_factory: pytest.TempPathFactory, platform: str, pytestconfig: pytest.Config
) -> Iterator[Launcher]:
    deadline = PATIENCE if pytestconfig.getoption("--demo") else DEADLINE
    launcher = Launcher(tmp_path_factory.mktemp("serving"), deadline)
    if platform in HOSTED:
        install_hosted(launcher.folder / "env", platform)
    yield launcher
    launcher.close()


@pytest.fixture
def faults(launcher: Launcher) -> Iterator[Path]:
    """The folder that steers the faulty platform; emptied afterwards."""
    yield launcher.faults
    for file in launcher.faults.iterdir():
        file.unlink()


@pytest.fixture(scope="session")
def platform(pytestconfig: pytest.Config) -> str:
    return str(pytestconfig.getoption("--platform"))


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Babbles printable ASCII; a byte is a token."""
    return write_toy_checkpoint(tmp_path_factory.mktemp("models") / "babbler", max_context=4096)


SCRIPT = "Grüße, 世界! 🙂👍🏽 STOP. The end\n\nof it."


@pytest.fixture(scope="session")
def scripted_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers SCRIPT to every chat; a byte is a token."""
    return write_toy_checkpoint(tmp_path_factory.mktemp("models") / "parrot", script=SCRIPT)


@pytest.fixture(scope="session")
def script() -> str:
    return SCRIPT


@pytest.fixture(scope="session")
def served_options(
    platform: str,
    toy_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    pytestconfig: pytest.Config,
) -> Options:
    """Model and platform: the toy's, a tiny one where the device is emulated and nothing else is
    asked for, or the demo model anywhere else."""
    if platform == "toy":
        return {"model": str(toy_model), "platform": platform}
    sizes = {"platform": platform, "threads": 1, "cache_tokens": 16384, **NAMED.get(platform, {})}
    if platform in HOSTED and not pytestconfig.getoption("--demo"):
        tiny = write_babbler(tmp_path_factory.mktemp("models") / "tiny", max_context=1024)
        return {"model": str(tiny), **sizes}
    # A short context keeps the tests at its limit quick.
    return {"max_context": 1024, **sizes, **SERVING_DEMO.get(platform, {})}


@pytest.fixture(scope="session")
def model_arguments(served_options: Options) -> list[str]:
    """The same for `sixfold serve`."""
    return arguments(served_options)


@pytest.fixture(scope="session")
def few_rows(model_arguments: list[str]) -> list[str]:
    """For a server of one test: steps of few rows are soon recorded, where a device records."""
    return [*model_arguments, "--max-rows", "4"]


@pytest.fixture(scope="session")
def server(launcher: Launcher, model_arguments: list[str]) -> Running:
    """One server for all tests that leave it as it was."""
    return launcher.start(*model_arguments)


@pytest.fixture(scope="session")
def scripted(launcher: Launcher, scripted_model: Path) -> Running:
    return launcher.start(scripted_model, "--platform", "toy")
