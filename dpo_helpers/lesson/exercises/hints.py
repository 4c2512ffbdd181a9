"""What can be said of a wrong answer that is no known mistake: how it is related to the right one, or what it lacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .values import Other, as_tensor, same

Change = Callable[[Any], Tensor | None]


def _each(change: Callable[[Tensor], Tensor]) -> Change:
    """The change for every number of a value; None where there are no numbers."""

    def apply(value: Any) -> Tensor | None:
        tensor = as_tensor(value)
        return None if tensor is None or tensor.dtype == torch.bool else change(tensor)

    return apply


def _row(change: Callable[[Tensor], Tensor]) -> Change:
    """The change of a row of numbers; None for a single number."""

    def apply(value: Any) -> Tensor | None:
        tensor = as_tensor(value)
        return None if tensor is None or not tensor.dim() else _each(change)(tensor)

    return apply


def _flipped(value: Any) -> Tensor | None:
    tensor = as_tensor(value)
    return ~tensor if tensor is not None and tensor.dtype == torch.bool else None


# what people do to the right answer, and how that is seen: tried in this order, on all cases
RELATIONS: Sequence[tuple[str, Change]] = (
    ("The sign is the other way round", _each(lambda x: -x)),
    ("True and False are swapped", _flipped),
    ("That is 1 minus what is asked for", _each(lambda x: 1 - x)),
    ("That is in percent, and asked for is a share", _each(lambda x: 100 * x)),
    ("It is 1 too large", _each(lambda x: x + 1)),
    ("It is 1 too small", _each(lambda x: x - 1)),
    ("That is twice as much as is asked for", _each(lambda x: 2 * x)),
    ("That is half of what is asked for", _each(lambda x: x / 2)),
    ("That is the exponential of what is asked for", _each(lambda x: x.exp())),
    ("That is the exponential of minus what is asked for", _each(lambda x: (-x).exp())),
    ("That is the logarithm of what is asked for", _each(lambda x: x.log())),
    ("That is minus the logarithm of what is asked for", _each(lambda x: -x.log())),
    ("The logarithm has the base 2; asked for is the natural one", _each(lambda x: x / math.log(2))),
    ("The logarithm has the base 10; asked for is the natural one", _each(lambda x: x / math.log(10))),
    ("That is 1 divided by what is asked for", _each(lambda x: 1 / x)),
    ("That is the square of what is asked for", _each(lambda x: x**2)),
    ("That is the square root of what is asked for", _each(lambda x: x.sqrt())),
    ("You took the absolute value", _each(lambda x: x.abs())),
    ("You dropped what is below 0", _each(lambda x: x.clamp_min(0) if (x > 0).any() else x)),
    ("That is the sum of what is asked for", _row(lambda x: x.sum())),
    ("That is the mean of what is asked for", _row(lambda x: x.mean())),
    ("That is minus the mean of what is asked for", _row(lambda x: -x.mean())),
    ("Those are running sums of what is asked for", _row(lambda x: x.cumsum(-1))),
    ("The right values, the last one first", _row(lambda x: x.flip(-1))),
)


def relation(wanted: Sequence[Any], got: Sequence[Any], tolerance: float) -> str:
    """How the answers to all cases are related to the right ones, in words; empty if in no way that is known here."""
    for text, change in RELATIONS:
        if all(_is(change(want), as_tensor(value), tolerance) for want, value in zip(wanted, got, strict=True)):
            return text
    if all(_reordered(a, b, tolerance) for a, b in zip(wanted, got, strict=True)):
        return "The values are right, but in another order"
    return _proportional(wanted, got, tolerance) or _of_one_part(wanted, got, tolerance)


def _proportional(wanted: Sequence[Any], got: Sequence[Any], tolerance: float) -> str:
    """Whether all numbers are off by the same factor, or by the same amount; three different ones can show it."""
    tensors = [(as_tensor(a), as_tensor(b)) for a, b in zip(wanted, got, strict=True)]
    if any(a is None or b is None or a.shape != b.shape or a.dtype != b.dtype for a, b in tensors):
        return ""
    want = torch.cat([a.flatten().double() for a, _ in tensors if a is not None])
    have = torch.cat([b.flatten().double() for _, b in tensors if b is not None])
    if len(set(want.tolist())) < 3 or not (want.isfinite().all() and have.isfinite().all()):
        return ""
    factor, offset = ((have * want).sum() / (want * want).sum()).item(), (have - want).mean().item()
    if abs(factor) > tolerance and torch.allclose(have / factor, want, rtol=tolerance, atol=tolerance):
        return f"That is always {factor:.4g} times what is asked for: a factor is missing, or one too many"
    if torch.allclose(have, want + offset, rtol=tolerance, atol=tolerance):
        return f"That is always {abs(offset):.4g} too {'large' if offset > 0 else 'small'}"
    return ""


def _of_one_part(wanted: Sequence[Any], got: Sequence[Any], tolerance: float) -> str:
    """Of answers that are tuples: which of their values is wrong, if only one is, and how that one is related."""
    sizes = {len(value) if isinstance(value, (list, tuple)) else 0 for value in (*wanted, *got)}
    if len(sizes) != 1 or not 2 <= (size := sizes.pop()) <= 3:
        return ""
    wrong = [i for i in range(size) if not all(same(a[i], b[i], tolerance) for a, b in zip(wanted, got, strict=True))]
    if len(wrong) != 1:
        return ""
    how = relation([value[wrong[0]] for value in wanted], [value[wrong[0]] for value in got], tolerance)
    return f"Value {wrong[0] + 1} of {size} is wrong" + (f". {how}" if how else "")


def _is(a: Tensor | None, b: Tensor | None, tolerance: float) -> bool:
    return a is not None and b is not None and same(a, b, tolerance)


def _reordered(want: Any, got: Any, tolerance: float) -> bool:
    """Whether a list or tuple of numbers or of texts holds what is wanted, in whatever order."""
    if not (isinstance(want, (list, tuple)) and isinstance(got, (list, tuple)) and len(want) == len(got)):
        return False
    alike = any(all(isinstance(item, kind) for item in (*want, *got)) for kind in (str, (int, float)))
    return alike and same(sorted(want), sorted(got), tolerance)


def hint(want: Any, got: Any, tolerance: float) -> str:
    """What can be said of one wrong value: nothing there, its shape, its type, NaN, rounding; or nothing."""
    if got is None:
        return "Here your function returns nothing: does every way through it end in a return?"
    if isinstance(got, Other) and got.type in ("generator", "set", "map", "filter", "zip", "dict_values"):
        return f"The type should be {_kind(want)}, and is {got.type}; list(…) makes a list of it"
    if isinstance(want, (list, tuple)) and isinstance(got, (list, tuple)) and len(want) != len(got):
        return f"There should be {len(want)} value{'s' * (len(want) != 1)}, and there are {len(got)}"
    if isinstance(want, Tensor) and isinstance(got, tuple):
        return f"One tensor is asked for, and you return {len(got)} values"
    a, b = as_tensor(want), as_tensor(got)
    if a is None or b is None:
        alike = type(want) is type(got) or (isinstance(want, (list, tuple)) and isinstance(got, (list, tuple)))
        return "" if alike else f"The type should be {_kind(want)}, and is {_kind(got)}"
    if a.shape != b.shape:
        right = a.numel() == b.numel() and same(a.flatten(), b.flatten(), tolerance)
        start = "The values are right, but the shape" if right else "The shape"
        return f"{start} should be {list(a.shape)}, and is {list(b.shape)}"
    if a.dtype != b.dtype:
        wanted, are = ("True and False", "numbers") if a.dtype == torch.bool else ("numbers", "True and False")
        return f"Asked for are {wanted}, and yours are {are}"
    if b.isnan().any() and not a.isnan().any():
        return "There is a NaN in it: from 0/0, from ∞ − ∞, from 0·∞, or from the logarithm of a negative number"
    if b.isinf().any() and not a.isinf().any():
        return "There is an infinite number in it: such as the logarithm of 0, or an exponential of something large"
    if isinstance(got, Tensor) and got.dtype in (torch.float16, torch.bfloat16) and same(a, b, 1e-2):
        return "Those are numbers of 16 bits, which are rounded to three digits or fewer: stay in 32 bits"
    return "Close, but not close enough: did you round?" if same(a, b, max(1e-2, 10 * tolerance)) else ""


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    return value.type if isinstance(value, Other) else "tensor" if isinstance(value, Tensor) else type(value).__name__
