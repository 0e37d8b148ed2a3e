"""A GPU that is not there: tensors that say "cuda", hold their numbers on the CPU, and keep count.

    mixing    an operation on tensors here and there is refused, as CUDA refuses it
    waiting   what makes the host wait for the device is noted by name in `waits`
    lateness  a copy to the host without waiting holds NaN until an event of after it was waited for

Unlike torch's FakeTensorMode, which knows shapes alone and whose backward pass needs a driver, it
computes: whole programs run, in any build, and their numbers can be compared with those of the CPU.
`pretend` also stands in for the functions of torch.cuda that need a driver: events, pinned memory,
seeds, names, counters of memory; and autocast has the CPU's rules. What none of this proves is that
CUDA's kernels are right, or fast, or that streams are in order: `docs/performance.md` has the
commands for a real one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
_CPU = torch.device("cpu")
# What asks the device for a number, or for a size.
_ASKS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount"),
    *("equal", "_linalg_eigh", "_linalg_svd", "_linalg_check_errors"),
}
_INDEXED = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}


class OnGpu(Tensor):
    """A tensor that says it is on the GPU; to torch's own C++ code it is on the CPU.

    Attributes:
        value: Its numbers.
    """

    value: Tensor
    device = property(lambda *_: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda *_: True)  # type: ignore[assignment]
    is_cpu = property(lambda *_: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[OnGpu], value: Tensor) -> OnGpu:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            value.size(),
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
        )
        made.value = value
        return made

    def __repr__(self) -> str:
        return f"OnGpu({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to:
            return _to(*args, **kwargs)
        if func in {Tensor.cpu, Tensor.cuda}:
            return _to(args[0], "cpu" if func is Tensor.cpu else GPU)
        if func in {Tensor.numpy, Tensor.__array__}:
            raise AssertionError("can't convert cuda:0 device type tensor to numpy")
        if func is Tensor.tolist:
            Gpu.current.waits.append("tolist")
            return args[0].value.tolist()
        if func is Tensor.new_tensor:
            return torch.tensor(args[1], device=GPU, dtype=kwargs.get("dtype", args[0].dtype))
        if func is Tensor.get_device:
            return 0
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class Gpu(TorchDispatchMode):
    """Makes what is asked for on "cuda" an `OnGpu`.

    Attributes:
        waits: Names of the operations so far for which the host waited.
        operations: How many operations there were.
    """

    current: Gpu

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.operations = 0
        self.late: list[tuple[Tensor, Tensor]] = []  # what is on its way to the host, in order
        self.sent = 0  # of these, so far
        self.pinned: dict[int, Tensor] = {}
        Gpu.current = self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def arrive(self, sent: int | None = None) -> None:
        """Lets the first `sent` copies end, or all."""
        while self.late and (sent is None or self.sent - len(self.late) < sent):
            here, numbers = self.late.pop(0)
            here.copy_(numbers)

    def pin(self, tensor: Tensor) -> Tensor:
        """Stands for `Tensor.pin_memory`."""
        copy = tensor.clone()
        self.pinned[copy.untyped_storage()._cdata] = copy
        return copy


class _Event:
    """Stands for torch.cuda.Event: whoever waits for one finds all copies of before it done."""

    sent: int

    def record(self) -> None:
        self.sent = Gpu.current.sent

    def synchronize(self) -> None:
        Gpu.current.arrive(self.sent)


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tensor.to, for a tensor that is on the GPU or goes where one is."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    flags = [arg for arg in args if isinstance(arg, bool)]
    free = kwargs.get("non_blocking", bool(flags[:1] == [True]))
    copy = kwargs.get("copy", bool(flags[1:] == [True]))
    for arg in args:
        if isinstance(arg, Tensor):
            device, dtype = arg.device, arg.dtype
        elif isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, torch.device | str):
            device = arg
    device = tensor.device if device is None else torch.device(device)
    dtype = tensor.dtype if dtype is None else dtype
    if not copy and (device.type, dtype) == (tensor.device.type, tensor.dtype):
        return tensor
    layout = kwargs.get("memory_format")
    if on_gpu(tensor) and device.type == "cpu":
        return _Leave.apply(tensor, dtype, free)
    with torch._C.DisableTorchFunctionSubclass():
        return torch.ops.aten._to_copy.default(
            tensor,
            dtype=dtype,
            device=device,
            non_blocking=free,
            memory_format=layout,
        )


class _Leave(torch.autograd.Function):
    """The way from the GPU to the host."""

    @staticmethod
    def forward(_: Any, tensor: OnGpu, dtype: torch.dtype, free: bool) -> Tensor:
        numbers = tensor.value.to(dtype, copy=True)
        if not free:
            Gpu.current.waits.append("to the CPU")
            return numbers
        late = numbers.clone().fill_(math.nan if numbers.is_floating_point() else 0)
        Gpu.current.late.append((late, numbers))
        Gpu.current.sent += 1
        return late


def on_gpu(value: Any) -> bool:
    return isinstance(value, OnGpu)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, gpu = func.overloadpacket.__name__, Gpu.current
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    device = kwargs.get("device")
    there = any(map(on_gpu, leaves))
    if not there and (device is None or device.type != "cuda"):
        return func(*args, **kwargs)
    gpu.operations += 1
    if name == "copy_" or (name == "_to_copy" and not there):
        _note_copy(name, args, kwargs)
    elif there:
        _refuse_mixture(name, func, args, leaves)
    if (
        name in _ASKS
        or (name in _INDEXED and any(t.dtype == torch.bool for t in leaves[1:]))
        or (name == "repeat_interleave" and kwargs.get("output_size") is None)
    ):
        gpu.waits.append(name)
    outer = {id(leaf.value): leaf for leaf in leaves if on_gpu(leaf)}
    if device is not None:
        kwargs = {**kwargs, "device": _CPU}
    made = func(*_inside(args), **_inside(kwargs))
    if name == "copy_":
        return args[0]

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return outer[id(leaf)] if id(leaf) in outer else OnGpu(leaf)

    return tree_map(wrapped, made)


def _inside(values: Any) -> Any:
    return tree_map(lambda leaf: leaf.value if on_gpu(leaf) else leaf, values)


def _refuse_mixture(name: str, func: Any, args: Any, leaves: list[Tensor]) -> None:
    """A number of the CPU may enter an elementwise operation; an index may come from there."""
    here = [leaf for leaf in leaves if not on_gpu(leaf)]
    if not here:
        return
    if name in _INDEXED and on_gpu(args[0]):
        Gpu.current.waits.append(f"{name} by an index of the CPU")
        return
    if torch.Tag.pointwise not in func.tags or any(leaf.ndim for leaf in here):
        shapes = [(str(leaf.device), tuple(leaf.shape)) for leaf in leaves]
        raise AssertionError(f"{func} mixes devices: {shapes}")


def _note_copy(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    """Notes a copy that the host waits for: any of memory that is not pinned, too."""
    source, free = args[0], kwargs.get("non_blocking", False)
    if name == "copy_":
        source, free = args[1], free or args[2:3] == (True,)
        if on_gpu(args[0]) == on_gpu(source):
            return
    if source.numel() and (not free or source.untyped_storage()._cdata not in Gpu.current.pinned):
        Gpu.current.waits.append("to the CPU" if on_gpu(source) else "to the GPU")


@contextmanager
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Opens a world with one GPU."""
    gpu, grouped = Gpu(), torch._C._group_tensors_by_device_and_dtype

    def grouped_there(tensors: Any, *args: Any) -> Any:
        """Names the GPU in the groups that optimizers and clipping work on."""
        device = GPU if on_gpu(tensors[0][0]) else _CPU
        return {(device, k[1]): v for k, v in grouped(tensors, *args).items()}

    for name, stand_in in {
        "_lazy_init": lambda *_, **__: None,
        "_exchange_device": lambda *_, **__: -1,
        "_maybe_exchange_device": lambda *_, **__: -1,
        "is_available": lambda *_, **__: True,
        "is_current_stream_capturing": lambda *_, **__: False,
        "device_count": lambda *_, **__: 1,
        "set_device": lambda *_, **__: None,
        "manual_seed": lambda *_, **__: None,
        "get_rng_state": lambda *_, **__: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_, **__: None,
        "get_device_name": lambda *_, **__: "NVIDIA H200",
        "get_device_capability": lambda *_, **__: (9, 0),
        "synchronize": lambda *_, **__: gpu.arrive(),
        "max_memory_allocated": lambda *_, **__: 1 << 30,
        "reset_peak_memory_stats": lambda *_, **__: None,
        "Event": _Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    real = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda _, *a, **kw: real("cpu", *a, **kw))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: gpu.pin(t))  # noqa: PLW0108
    monkeypatch.setattr(torch._C, "_group_tensors_by_device_and_dtype", grouped_there)
    known = [*_foreach_utils._foreach_supported_types, OnGpu]
    monkeypatch.setattr(_foreach_utils, "_foreach_supported_types", known)
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with gpu:
            yield gpu
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
        torch.__future__.set_swap_module_params_on_conversion(False)
