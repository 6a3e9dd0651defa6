"""Guards what makes Triton's interpreter quick here: a launch replaces each module of the language
once, however many functions its kernel calls, what there is to replace is looked for once in a
process, and nothing of it stays when the launch has ended."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from sixfold.platforms.torch_runtime.interpreter_speed import looked_up_once, once_a_launch, quicken


@triton.jit
def _plus_row(total, x_ptr, row, N: tl.constexpr):
    return total + tl.max(tl.load(x_ptr + row * N + tl.arange(0, N)), axis=0)


@triton.jit
def _sum_of_largest(x_ptr, out_ptr, ROWS: tl.constexpr, N: tl.constexpr):
    total = tl.zeros((1,), tl.float32)
    for row in range(ROWS):
        total = _plus_row(total, x_ptr, row, N)
    tl.store(out_ptr + tl.arange(0, 1), total)


def launch(rows: int) -> None:
    x, out = torch.arange(rows * 16, dtype=torch.float32), torch.empty(1)
    _sum_of_largest[(1,)](x, out, ROWS=rows, N=16)
    assert out.item() == x.view(rows, 16).amax(1).sum().item()


def replacements(monkeypatch: pytest.MonkeyPatch, rows: int) -> int:
    calls: list[Any] = []
    replace = interpreter._patch_builtin
    with monkeypatch.context() as patched:
        patched.setattr(interpreter, "_patch_builtin", lambda *a: calls.append(a) or replace(*a))
        launch(rows)
    return len(calls)


def test_calls_between_functions_replace_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(1)  # the first one adds names to the modules of the functions that it calls
    few, many = (replacements(monkeypatch, rows) for rows in (1, 9))
    assert 0 < few == many


def test_names_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(1)
    looked: list[Any] = []
    look = inspect.getmembers
    monkeypatch.setattr(inspect, "getmembers", lambda *a: looked.append(a) or look(*a))
    launch(2)
    assert not looked


def test_what_another_hand_replaced_stays_so() -> None:
    def negate(module: Any, builder: Any, scope: Any) -> None:
        for name in ("a", "b"):
            scope.set_attr(module, name, -getattr(module, name))

    module: Any = ModuleType("module")
    module.a, module.b = 1, 2
    patch, scope = looked_up_once(negate), interpreter._LangPatchScope()
    for _ in range(2):
        patch(module, None, scope)
        assert (module.a, module.b) == (-1, -2)
        scope.restore()
        assert (module.a, module.b) == (1, 2)
    module.a = 7
    patch(module, None, scope)
    assert (module.a, module.b) == (7, -2)


def test_a_launch_leaves_the_language_as_it_was() -> None:
    def original(name: str) -> bool:
        return bool(tl.core.is_builtin(getattr(tl, name)))

    assert original("load")
    launch(2)
    assert original("load")
    with pytest.raises(Exception, match="division"):
        _divides_by_zero[(1,)](torch.empty(1), 0)
    assert original("load")
    launch(3)


@triton.jit
def _divides_by_zero(out_ptr, ZERO: tl.constexpr):
    tl.store(out_ptr, 1 // ZERO)


def test_types_are_those_of_the_interpreter() -> None:
    for kind in (tl.int1, tl.int8, tl.uint32, tl.float16, tl.bfloat16, tl.float8e4nv):
        width = interpreter._get_np_dtype(kind).itemsize * 8
        assert width == max(8, kind.primitive_bitwidth)
        assert interpreter._get_np_dtype(tl.block_type(kind, [4])).itemsize * 8 == width
    assert interpreter._get_np_dtype(tl.pointer_type(tl.int8)).itemsize == 8


def test_done_again_it_changes_nothing() -> None:
    before = interpreter._patch_lang
    quicken(interpreter, tl)
    assert interpreter._patch_lang is before


def test_another_module_is_replaced_as_well() -> None:
    class Scope:
        def restore(self) -> None:
            ended.append(1)

    asked: list[str] = []
    ended: list[int] = []
    uses = {"kernel": {"a"}, "helper": {"a"}, "other": {"b"}}

    def replace(fn: str) -> Scope:
        asked.append(fn)
        return Scope()

    patch = once_a_launch(replace, lambda fn: frozenset(uses[fn]))
    for _ in range(2):
        scope = patch("kernel")
        for fn in ("helper", "other", "helper", "other"):
            patch(fn)
        scope.restore()
    assert asked == ["kernel", "other"] * 2
    assert ended == [1, 1]
