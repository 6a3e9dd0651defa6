"""Guards the whole platform on its real device: the stages of `ci/run_platform`, as tests. Without
the device each is skipped with the reason. Where there are several, also that they join.

    pytest tests/device --platform cuda
"""

from __future__ import annotations

import pytest
from device.card import Card, NoCard, open_card
from device.stages import FULL, STAGES

from sixfold.platforms import select
from sixfold.platforms.machine import observe
from sixfold.server.verification import collectives


@pytest.fixture(scope="module")
def card(request: pytest.FixtureRequest) -> Card:
    platform = request.config.getoption("--platform")
    if platform == "toy":
        pytest.skip("no platform is named: pytest tests/device --platform cuda")
    try:
        return open_card(platform, FULL)
    except NoCard as reason:
        pytest.skip(str(reason))


@pytest.mark.device
@pytest.mark.parametrize("stage", STAGES)
def test_stage(card: Card, stage: str) -> None:
    result = STAGES[stage](card)
    assert result["ok"], result


@pytest.mark.device
def test_collectives(card: Card) -> None:
    devices = select.probe_all(observe())[card.platform].devices
    result = collectives(select.platforms()[card.platform], devices)
    if result.state == "skipped":
        pytest.skip(result.reason)
    assert result.state == "passed", result.reason
