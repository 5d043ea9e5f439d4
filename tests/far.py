"""A device of which the host can't read, in Python: memory of the CPU behind a wrapper, for machines without a GPU.

torch lets nobody mix tensors of a GPU with those of the CPU, and code that was only run on CPUs does so unseen. Here it
fails as it would there; and transfers are counted: `uploads`, `downloads`, and `waits`, for scalars that the host asks
for. Triton's kernels run in the interpreter, on the memory behind the wrapper (`reached`).

Registers torch's one device for such purposes, for the whole process: use it in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

backend_registration._setup_privateuseone_for_python_backend("far")  # type: ignore[no-untyped-call]
DEVICE = torch.device("far:0")
_MOVES = {"aten::_to_copy", "aten::copy_", "aten::to.dtype_layout"}
# an index may lie on the CPU, as it may for a GPU
_INDEXED = {"aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_"}
_WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


class Far(torch.Tensor):
    """A tensor over there; `raw` is its memory."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Far:
        made: Far = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func.name()}: call it within `far()`")

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert a tensor of another device to numpy: copy it to the host first")


class _World(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = {"uploads": 0, "downloads": 0, "waits": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.name()
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        is_far = any(isinstance(each, Far) for each in tensors)
        goes_far = is_far
        if kwargs.get("device") is not None:
            goes_far = torch.device(kwargs["device"]).type == DEVICE.type
            kwargs["device"] = torch.device("cpu")
        if name in _MOVES:
            source = args[1] if name == "aten::copy_" else args[0]
            target_is_far = isinstance(args[0], Far) if name == "aten::copy_" else goes_far
            self.counts["uploads"] += target_is_far and not isinstance(source, Far)
            self.counts["downloads"] += isinstance(source, Far) and not target_is_far
        elif is_far:
            self._check(name, args, tensors)
            self.counts["waits"] += name in _WAITS
        near_args, near_kwargs = tree_map_only(Far, lambda each: each.raw, (args, kwargs))
        out = func(*near_args, **near_kwargs)
        if name.partition(".")[0].endswith("_"):  # in place: the same object
            return args[0]
        return tree_map_only(torch.Tensor, Far, out) if goes_far else out

    def _check(self, name: str, args: Any, tensors: list[torch.Tensor]) -> None:
        near = [each for each in tensors if not isinstance(each, Far) and each.dim()]
        if name in _INDEXED:
            indices = [each for each in args[1] if each is not None]
            self.counts["uploads"] += sum(not isinstance(each, Far) for each in indices)
            near = [each for each in near if not any(each is index for index in indices)]
        if near:
            raise RuntimeError(f"{name}: expected all tensors to be on one device, found {DEVICE} and cpu")


class _Launch:
    """A kernel whose tensors must all be far."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            for each in (*args, *kwargs.values()):
                if isinstance(each, torch.Tensor) and not isinstance(each, Far):
                    raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
            raw = [each.raw if isinstance(each, Far) else each for each in args]
            with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
                self._kernel[grid](*raw, **kwargs)

        return call


def reached(kernels: SimpleNamespace) -> SimpleNamespace:
    """The kernels, for far tensors alone."""
    return SimpleNamespace(**{name: _Launch(kernel) for name, kernel in vars(kernels).items()})


@contextmanager
def far() -> Iterator[dict[str, int]]:
    """Where far tensors can be made and used; yields the counts."""
    with _World() as world:
        yield world.counts
