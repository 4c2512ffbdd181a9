"""A GPU that is not there: tensors on the CPU that answer as if they lay on a GPU, and refuse what a GPU refuses.

Code that never met a GPU breaks on its first one in a few known ways: an operation gets one tensor from each memory, a
tensor of the GPU is read by NumPy, a new tensor is made in the wrong place. `pretend_gpu` finds these without a GPU. A
tensor's storage carries a mark; "cuda" in a call is carried out on the CPU and marks what comes out; every operation
that PyTorch dispatches, backward ones included, checks that the marks of its tensors agree as a GPU's kernels do.
What it cannot find: errors of the kernels themselves, their rounding, their speed, and running out of memory.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
MIXED = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
HOST_ONLY = {"numpy", "__array__", "__dlpack__"}
# A GPU's tensor may be picked from with indices of the CPU, and copied to and from it.
INDEXED = ("aten.index.", "aten.index_put", "aten._index_put", "aten._unsafe_index")
COPIES = ("aten.copy_", "aten._to_copy")
# CUDA's lists of what autocast runs in 16 bits and what in 32 (PyTorch's "CUDA op-specific behavior"), as far as used.
IN_16 = {"linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention"}
IN_32 = {
    "softmax", "log_softmax", "layer_norm", "cross_entropy", "nll_loss", "softplus", "exp", "log", "log1p", "expm1",
    "pow", "__pow__", "rsqrt", "reciprocal", "sum", "prod", "cumsum", "norm",
}  # fmt: skip
HALF = (torch.float16, torch.bfloat16)
# A GPU multiplies halves and adds up in float32. Few CPUs can; this one takes float32 and rounds what comes out.
PRODUCTS = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.", "aten._scaled_dot_product")


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor's storage is marked as the GPU's."""
    with torch._C.DisableTorchFunction():
        return getattr(tensor.untyped_storage(), "pretended", False)


def mark(tensor: torch.Tensor, gpu: bool) -> torch.Tensor:
    """The tensor, its storage marked."""
    with torch._C.DisableTorchFunction():
        tensor.untyped_storage().pretended = gpu
    return tensor


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _product(func: Any, args: Any, kwargs: Any) -> Any:
    """A matrix product or attention in float32, its results rounded to the half precision of its arguments, if any."""
    half = next((t.dtype for t in _tensors((args, kwargs)) if t.dtype in HALF), None)
    if half is None:
        return func(*args, **kwargs)
    wide = tree_map_only(torch.Tensor, lambda t: t.float() if t.dtype in HALF else t, (args, kwargs))
    out = func(*wide[0], **wide[1])
    if "_scaled_dot_product" in str(func) and "backward" not in str(func):
        return (out[0].to(half), *out[1:])  # the logarithm of attention's sums is float32 in every precision
    return tree_map_only(torch.Tensor, lambda t: t.to(half) if t.is_floating_point() else t, out)


class _Autocast:
    """torch.autocast("cuda") for the pretended GPU: what `_Calls` reads in `running`, innermost last."""

    running: ClassVar[list[torch.dtype | None]] = []

    def __init__(self, device_type: str, dtype: torch.dtype = torch.float16, enabled: bool = True, **_: Any):
        self.dtype = dtype if enabled else None

    def __enter__(self) -> None:
        self.running.append(self.dtype)

    def __exit__(self, *_: object) -> None:
        self.running.pop()

    @classmethod
    def dtype_now(cls) -> torch.dtype | None:
        """The dtype of the innermost context, None outside of all."""
        return cls.running[-1] if cls.running else None


class _Kernels(TorchDispatchMode):
    """Below autograd: checks each operation's tensors and marks its results; counts and times those of the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        given = _tensors((args, kwargs))
        marks = [on_gpu(t) for t in given]
        gpu = any(marks)
        if gpu:
            self._require_one_place(name, given, marks)
        started = time.perf_counter()
        out = _product(func, args, kwargs) if name.startswith(PRODUCTS) else func(*args, **kwargs)
        if gpu:
            self.count[name] += 1
            self.seconds[name] += time.perf_counter() - started
        old = {id(t) for t in given}
        for tensor in _tensors(out):
            if gpu and id(tensor) not in old:
                mark(tensor, True)
        return out

    @staticmethod
    def _require_one_place(name: str, given: list[torch.Tensor], marks: list[bool]) -> None:
        if name.startswith(COPIES) or all(marks):
            return
        if name.startswith(INDEXED) and marks[0]:
            return
        strangers = [t for t, marked in zip(given, marks, strict=True) if not marked]
        if any(t.dim() for t in strangers):
            shapes = ", ".join(str(tuple(t.shape)) for t in strangers)
            raise RuntimeError(f"{MIXED} ({name}: on the CPU are {shapes})")


class _Calls(TorchFunctionMode):
    """Above autograd: carries out on the CPU what names the GPU, and answers for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if (half := _Autocast.dtype_now()) and name in IN_16 | IN_32:
            wanted, given = (half, torch.float32) if name in IN_16 else (torch.float32, half)
            args, kwargs = tree_map_only(
                torch.Tensor, lambda t: t.to(wanted) if t.dtype == given and on_gpu(t) else t, (args, kwargs)
            )
        if name == "__get__":
            return self._attribute(func, args)
        if name in HOST_ONLY and on_gpu(args[0]):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first"
            )
        if name in ("to", "cpu", "cuda") and isinstance(args[0], torch.Tensor):
            return self._move(name, args, kwargs)
        if name == "__deepcopy__":
            return mark(func(*args, **kwargs), on_gpu(args[0]))
        if name != "_parse_to" and (device := kwargs.get("device")) is not None:
            gpu = torch.device(device).type == "cuda"
            if gpu and isinstance(kwargs.get("generator"), torch.Generator):
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
            kwargs["device"] = "cpu"
            out = func(*args, **kwargs)
            for tensor in _tensors(out):
                mark(tensor, gpu)
            return out
        return func(*args, **kwargs)

    @staticmethod
    def _attribute(func: Any, args: Any) -> Any:
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if attribute in ("device", "is_cuda", "is_cpu") and isinstance(args[0], torch.Tensor):
            gpu = on_gpu(args[0])
            return {"device": GPU if gpu else CPU, "is_cuda": gpu, "is_cpu": not gpu}[attribute]
        return func(*args)

    @staticmethod
    def _move(name: str, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        tensor, *rest = args
        gpu = here = on_gpu(tensor)
        if name != "to":
            gpu, rest, kwargs = name == "cuda", [], {}
        elif "device" in kwargs:
            device = kwargs.pop("device")
            gpu = here if device is None else torch.device(device).type == "cuda"
        elif rest and isinstance(rest[0], str | torch.device | torch.Tensor):
            first = rest.pop(0)
            gpu = on_gpu(first) if isinstance(first, torch.Tensor) else torch.device(first).type == "cuda"
            if isinstance(first, torch.Tensor):
                rest.insert(0, first.dtype)
        elif rest and rest[0] is None:
            rest.pop(0)
        kwargs.pop("non_blocking", None)
        rest = [x for x in rest if isinstance(x, torch.dtype)]
        moved = tensor.to(*rest, **kwargs) if rest or kwargs else tensor
        return moved if gpu == here else mark(moved.clone(), gpu)


@contextlib.contextmanager
def pretend_gpu(patch: Any, capability: tuple[int, int] = (7, 5), free: float = 15e9) -> Iterator[_Kernels]:
    """A context in which torch.cuda has one GPU; yields the operations that ran on it.

    patch: pytest's monkeypatch. capability: (7, 5) is a T4's, (9, 0) an H100's. free: bytes of its memory.
    """
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "Pretended GPU",
        "get_device_capability": capability, "is_bf16_supported": True, "mem_get_info": (int(free), int(free)),
        "max_memory_allocated": 0, "reset_peak_memory_stats": None, "synchronize": None, "empty_cache": None,
        "get_rng_state": None, "set_rng_state": None, "manual_seed_all": None, "is_initialized": True,
    }  # fmt: skip
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    real, is_on = torch.autocast, torch.is_autocast_enabled
    patch.setattr(torch, "autocast", lambda kind, *a, **k: (_Autocast if kind == "cuda" else real)(kind, *a, **k))
    patch.setattr(
        torch, "is_autocast_enabled", lambda *k: bool(_Autocast.dtype_now()) if k[:1] == ("cuda",) else is_on(*k)
    )
    kernels = _Kernels()
    with _Calls(), kernels:
        yield kernels


# IPython runs it as a kernel starts, before the first cell. The process is the notebook's: nothing has to be undone.
_STARTUP = """
import json, sys
from pathlib import Path
sys.path.insert(0, {here!r})
import pytest
from pretend_gpu import pretend_gpu
_pretended = pretend_gpu(pytest.MonkeyPatch())
_gpu = _pretended.__enter__()
def _note(*_):
    Path({log!r}).write_text(json.dumps({{"count": _gpu.count, "seconds": _gpu.seconds}}))
get_ipython().events.register("post_run_cell", _note)
"""


def pretending_kernels(folder: Path) -> Path:
    """Make an IPYTHONDIR in `folder` whose kernels start on a pretended T4; returns where they note what ran on it."""
    startup = folder / "profile_default" / "startup"
    startup.mkdir(parents=True)
    log = folder / "gpu.json"
    script = _STARTUP.format(here=str(Path(__file__).parent), log=str(log))
    (startup / "00-gpu.py").write_text(script, encoding="utf-8")
    return log
