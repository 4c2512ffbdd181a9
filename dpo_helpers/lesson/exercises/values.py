"""Any answer as plain values, which compare and print without surprises: what a learner returns may be anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ...untrusted import one_line

SHOWN = 160  # characters of a value in a message
_ITEMS, _DEPTH = 10_000, 8  # longer and deeper lists are no answer to any exercise


@dataclass(frozen=True)
class Other:
    """A value that is no number, text, tensor, list or dict: the name of its type, and how it prints."""

    type: str
    text: str = field(compare=False)


@dataclass(frozen=True)
class Raised:
    """What a function raised instead of returning: the error's type, its text, and the learner's line."""

    type: str
    text: str = field(compare=False)
    line: str = field(compare=False, default="")


def plain(value: Any) -> Any:
    """The value as None, bool, int, float, str, tensor on the CPU, list, tuple or dict of such; else an `Other`.

    Arrays and scalars of NumPy become lists and numbers. Nothing of the learner's own code is left in the result.
    """
    return _plain(value, 0)


def _plain(value: Any, depth: int) -> Any:
    try:
        return _convert(value, depth)
    except Exception:  # whatever a learner's object does when it is looked at
        return Other(type(value).__name__, "")


def _convert(value: Any, depth: int) -> Any:
    if value is None or value is ... or value is NotImplemented:
        return None
    if isinstance(value, (bool, Other, Raised)):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Tensor) and not value.is_complex():
        return value.detach().to("cpu").to_dense().clone().as_subclass(Tensor)
    if isinstance(value, (Real, Decimal)):
        number = float(value)
        return int(value) if isinstance(value, Integral) and abs(number) < 2**53 else number
    if depth < _DEPTH and isinstance(value, Mapping) and len(value) <= _ITEMS:
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if depth < _DEPTH and isinstance(value, (list, tuple, range)) and len(value) <= _ITEMS:
        items = [_plain(item, depth + 1) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if depth < _DEPTH and hasattr(value, "tolist") and hasattr(value, "dtype") and not isinstance(value, Tensor):
        return _plain(value.tolist(), depth + 1)
    return Other(type(value).__name__, one_line(repr(value)))


def as_tensor(value: Any) -> Tensor | None:
    """A number, or nested lists of numbers and tensors, as one tensor, bool or float64; None if that cannot be."""
    if isinstance(value, Tensor):
        return value if value.dtype == torch.bool else value.double()
    if isinstance(value, (bool, int, float)):
        return torch.tensor(value) if isinstance(value, bool) else torch.tensor(float(value), dtype=torch.float64)
    if not isinstance(value, (list, tuple)):
        return None
    parts = [part for part in map(as_tensor, value) if part is not None]
    alike = len(parts) == len(value) and len({(part.shape, part.dtype) for part in parts}) == 1
    return torch.stack(parts) if alike else None


def same(want: Any, got: Any, tolerance: float = 1e-4) -> bool:
    """Whether two plain values are equal: numbers within the tolerance, absolute and relative; all else exactly.

    A number is never the same as True or False, nor a tensor of numbers the same as a tensor of bool.
    """
    if isinstance(want, Tensor) or isinstance(got, Tensor):
        a, b = as_tensor(want), as_tensor(got)
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            return False
        return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
    if isinstance(want, (list, tuple)) and isinstance(got, (list, tuple)):
        return len(want) == len(got) and all(same(a, b, tolerance) for a, b in zip(want, got, strict=True))
    if isinstance(want, dict) and isinstance(got, dict):
        return want.keys() == got.keys() and all(same(want[key], got[key], tolerance) for key in want)
    if _is_number(want) and _is_number(got):
        return math.isclose(want, got, rel_tol=tolerance, abs_tol=tolerance) or (want != want and got != got)
    return type(want) is type(got) and bool(want == got)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def first_difference(want: Any, got: Any, tolerance: float, where: str = "") -> tuple[str, Any, Any]:
    """(where, wanted, got) of the first entry in which two dicts differ; of other values, the values themselves."""
    if isinstance(want, dict) and isinstance(got, dict):
        for key in want:
            if key not in got or not same(want[key], got[key], tolerance):
                return first_difference(want[key], got.get(key), tolerance, key)
    return where, want, got


def show(value: Any, digits: int = 4) -> str:
    """A value in a message: numbers rounded, tensors as lists with their shape, on one line, shortened."""
    text = one_line(_text(plain(value), digits))
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def show_both(want: Any, got: Any, tolerance: float) -> tuple[str, str]:
    """Two values that differ, so that it shows: with more digits if need be, or from where they differ on."""
    for digits in (4, 8, 16):
        shown = show(want, digits), show(got, digits)
        if shown[0] != shown[1]:
            return shown
    a, b = (value.flatten().tolist() if isinstance(value, Tensor) else value for value in (want, got))
    if not (isinstance(a, (list, tuple)) and isinstance(b, (list, tuple))):
        return shown
    differ = [i for i, (x, y) in enumerate(zip(a, b, strict=False)) if not same(x, y, tolerance)]
    start = differ[0] if differ else min(len(a), len(b))
    return f"… {show(list(a[start:]))}", f"… {show(list(b[start:]))}"


def _text(value: Any, digits: int) -> str:
    if isinstance(value, Tensor):
        few = value.numel() <= SHOWN // 2
        values = _text((value if few else value.flatten()[: SHOWN // 8]).tolist(), digits)
        return f"{values if few else values[:-1] + ', …]'} (shape {list(value.shape)})"
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, (list, tuple)):
        left, right = "[]" if isinstance(value, list) else "()"
        return left + ", ".join(_text(item, digits) for item in value[:SHOWN]) + right
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_text(item, digits)}" for key, item in value.items()) + "}"
    if isinstance(value, Raised):
        return f"{value.type}: {value.text}"
    if isinstance(value, Other):
        return value.text or f"a value of type {value.type}"
    return "nothing" if value is None else repr(value)
