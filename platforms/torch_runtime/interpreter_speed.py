"""Three costs of Triton's interpreter (3.7), which were most of a conformance run's time and are
paid here once: at every call of one kernel function by another it replaces the language again, at
every launch it looks for what there is to replace, and at every operation it makes its table of
numpy's types again. What kernels compute stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


class Scope(Protocol):
    """What a launch replaced in the language."""

    def restore(self) -> None: ...


class Replacing(Protocol):
    """What is replaced goes through it."""

    def set_attr(self, obj: object, name: str, value: object) -> None: ...


class _Nothing:
    """The modules that a function uses were replaced already in this launch."""

    def restore(self) -> None:
        return


class _Launch:
    """The scope of a launch's own kernel, with which the launch ends."""

    def __init__(self, scope: Scope, replaced: set[Any]) -> None:
        self._scope, self._replaced = scope, replaced

    def restore(self) -> None:
        self._replaced.clear()
        self._scope.restore()


def once_a_launch(
    patch: Callable[[Any], Scope], modules_of: Callable[[Any], frozenset[Any]]
) -> Callable[[Any], Scope]:
    """`patch` for those functions only whose modules no earlier one of the launch has replaced."""
    replaced: set[Any] = set()

    def patched(fn: Any) -> Scope:
        modules = modules_of(fn)
        if modules and modules <= replaced:
            return _Nothing()
        begins = not replaced
        scope = patch(fn)
        replaced.update(modules)
        return _Launch(scope, replaced) if begins else scope

    return patched


@dataclass(slots=True)
class _Seen:
    """A scope that writes down what is replaced: (name, what it was, what takes its place)."""

    scope: Replacing
    replaced: list[tuple[str, object, object]] = field(default_factory=list)

    def set_attr(self, obj: object, name: str, value: object) -> None:
        self.replaced.append((name, getattr(obj, name), value))
        self.scope.set_attr(obj, name, value)


def looked_up_once(patch: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    """`patch(module, builder, scope)`, which looks at every name of a module for the first time
    only. What was replaced by another hand since is left, as `patch` leaves it."""
    known: dict[Any, list[tuple[str, object, object]]] = {}

    def patched(module: Any, builder: Any, scope: Replacing) -> None:
        if module not in known:
            seen = _Seen(scope)
            patch(module, builder, seen)
            known[module] = seen.replaced
            return
        for name, original, value in known[module]:
            if getattr(module, name) is original:
                scope.set_attr(module, name, value)

    return patched


def quicken(interpreter: Any, language: Any) -> None:
    """Changes `triton.runtime.interpreter` in this process; done again it does nothing."""
    if hasattr(interpreter, "_sixfold_quickened"):
        return
    known: dict[Any, frozenset[Any]] = {}

    def modules_of(fn: Any) -> frozenset[Any]:
        if fn not in known:
            both = (language, language.core)
            used = [value for value in fn.__globals__.values() if any(value is m for m in both)]
            known[fn] = frozenset(used)
        return known[fn]

    make, table = interpreter._get_np_dtype, {}

    def np_dtype(kind: Any) -> np.dtype[Any]:
        element = kind.element_ty if isinstance(kind, language.block_type) else kind
        if isinstance(element, language.pointer_type):
            return np.dtype(np.uint64)
        if element.name not in table:
            table[element.name] = make(element)
        return table[element.name]

    interpreter._patch_builtin = looked_up_once(interpreter._patch_builtin)
    interpreter._patch_lang = once_a_launch(interpreter._patch_lang, modules_of)
    interpreter._get_np_dtype = np_dtype
    interpreter._sixfold_quickened = True
