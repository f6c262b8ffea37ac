"""A GPU for tests, without one: tensors that say ``cuda`` and lie in the host's memory.

Within :func:`twin` what is made on ``cuda`` or moved there is a :class:`Twin`: computed by the CPU, but refused wherever CUDA
would refuse it, that is where tensors of both devices meet. So a tensor that was left on the wrong device is found on a machine
without a GPU, and every wait of the host for the device is counted.
"""

from __future__ import annotations

import contextlib
import copy
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("twin")
aten = torch.ops.aten
DEVICE = torch.device("twin", 0)
_WAITS = (
    aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default, aten.bincount.default,
    aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default, aten.repeat_interleave.Tensor,
)  # fmt: skip
"""Give a number, or what the host must know the size of."""
_ANY_SIDE = (aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default)
"""Take tensors of both devices."""
_INDEX = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)
"""Take indices in the host's memory, too, which is a copy; counted as one."""


class Twin(Tensor):
    """A tensor that says it lies on the GPU."""

    inner: Tensor  # type: ignore[assignment]  # hides torch.inner

    @staticmethod
    def __new__(cls, inner: Tensor) -> Twin:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=DEVICE, requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Twin({self.inner!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Twin:
        if id(self) not in memo:
            made = self.detach().clone().requires_grad_(self.requires_grad)
            made.__dict__.update(
                copy.deepcopy({name: value for name, value in vars(self).items() if name != "inner"}, memo)
            )
            memo[id(self)] = made
        return memo[id(self)]

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_placed(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_placed(index), value)

    def tolist(self) -> Any:
        """A wait, as on CUDA; torch has none for subclasses."""
        return self.to("cpu").tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"{func}: a tensor of the GPU that outlived it")


def _placed(index: Any) -> Any:
    """An index with its lists on the device, where torch itself would put them, below what a mode sees."""
    if isinstance(index, tuple):
        return tuple(_placed(one) for one in index)
    return torch.tensor(index, device=DEVICE) if isinstance(index, list) else index


def _indices(given: Any) -> list[Tensor]:
    return [one for one in given if isinstance(one, Tensor)]


def _goes_there(args: Any, to_gpu: bool) -> bool:
    """Whether something of the host's memory is copied to the GPU: then CUDA waits for all that it was asked before."""
    if len(args) == 1:
        return to_gpu and not isinstance(args[0], Twin)
    there, here = (tree_flatten(one)[0] for one in args[:2])
    pairs = zip(there, here, strict=False)
    return any(isinstance(a, Twin) and isinstance(b, Tensor) and not isinstance(b, Twin) for a, b in pairs)


def _goes_by_itself(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the host goes on meanwhile."""
    return bool(kwargs.get("non_blocking") or (func is not aten._to_copy.default and len(args) > 2 and args[2]))


class _Mode(TorchDispatchMode):
    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        flat, _ = tree_flatten((args, kwargs))
        tensors = [one for one in flat if isinstance(one, Tensor)]
        here = [one for one in tensors if isinstance(one, Twin)]
        asked = kwargs.get("device")
        to_gpu = asked is not None and torch.device(asked).type == "twin"
        if to_gpu:
            kwargs["device"] = torch.device("cpu")
            kwargs.pop("pin_memory", None)
        if here and func in _WAITS:
            self.seen.wait(func)
        if here and func in _INDEX and any(one.dtype in (torch.bool, torch.uint8) for one in _indices(args[1])):
            self.seen.wait(func)  # how many are true?
        if func in _ANY_SIDE and _goes_there(args, to_gpu) and not _goes_by_itself(func, args, kwargs):
            self.seen.wait(func)
        if here and asked is not None and not to_gpu and not kwargs.get("non_blocking"):
            self.seen.wait(func)
        if here and func not in _ANY_SIDE:
            strange = [one for one in tensors if not isinstance(one, Twin) and one.dim() > 0]
            if strange and func in _INDEX:
                self.seen.wait(func)
            elif strange:
                raise AssertionError(f"{func}: of {[type(one).__name__ for one in tensors]} some lie on the CPU")
        if func is aten.copy_.default and here and not isinstance(args[0], Twin):
            self.seen.wait(func)
        bare = tree_map(lambda one: one.inner if isinstance(one, Twin) else one, (args, kwargs))
        out = func(*bare[0], **bare[1])
        on_gpu = to_gpu or (asked is None and bool(here) and func is not aten._local_scalar_dense.default)
        if func in (aten.copy_.default,):
            on_gpu = isinstance(args[0], Twin)
        known = {id(one.inner): one for one in here}
        return tree_map(lambda one: self._out(one, on_gpu, known) if isinstance(one, Tensor) else one, out)

    def _out(self, value: Tensor, on_gpu: bool, known: dict[int, Twin]) -> Tensor:
        if id(value) in known:
            return known[id(value)]
        return Twin(value) if on_gpu else value


class Seen:
    """How often the host waited for the device, and where."""

    def __init__(self) -> None:
        self.waits: list[str] = []

    def wait(self, what: Any) -> None:
        frames = [
            one for one in traceback.extract_stack() if "/lotus/" in one.filename or "/selection/" in one.filename
        ]
        where = f"{frames[-1].filename.rsplit('/lotus/', 1)[-1]}:{frames[-1].name}" if frames else "elsewhere"
        self.waits.append(f"{where} {what}")


@contextlib.contextmanager
def twin() -> Iterator[Seen]:
    """A machine with a GPU, for the length of a ``with``."""
    seen = Seen()
    with pytest.MonkeyPatch.context() as patch, torch.autograd.set_multithreading_enabled(False), _Mode(seen):
        patch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
        patch.setattr(torch, "inference_mode", torch.no_grad)  # of which tensors that hold others know nothing
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) shows its move to a mode then
        try:
            yield seen
        finally:
            torch._C._set_only_lift_cpu_tensors(before)
