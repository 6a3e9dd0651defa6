"""A platform in numpy with a suite of three ops, right or with one kernel off by one; registered
for the commands that look for platforms by `CheckedPlatform.installed`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from toy_platform import FACTS, ToyPlatform

from sixfold.common.ops import OPS
from sixfold.common.ops.conformance import as_list
from sixfold.platforms import interface as hw
from sixfold.platforms import select
from sixfold.platforms.interface_kernels import Case, Subject, Suite


def subject(op: str, fn: Callable[..., Any], provider: str = "numpy", **rest: Any) -> Subject:
    def run(case: Case, dtype: str) -> list[Any]:
        return as_list(fn(**case.args))

    return Subject(op, provider, rest.pop("requires", lambda case, dtype: None), run, **rest)


def one_row_late(ids: Any, table: Any, scale: float) -> Any:
    """An embedding whose last row is the one before: an off-by-one that few ids show."""
    return OPS["embedding"].reference(np.minimum(ids, max(0, len(table) - 2)), table, scale)


class CheckedPlatform(ToyPlatform):
    name = "checked"

    def __init__(self, *subjects: Subject) -> None:
        self.subjects = subjects

    def conformance(self, facts: hw.DeviceFacts | None, interpreted: bool = False) -> Suite:
        return Suite(FACTS.name, "interpreted" if interpreted else "device", self.subjects)

    def installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(select, "platforms", lambda: {self.name: self})
