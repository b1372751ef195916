# SPDX-License-Identifier: BSD-3-Clause
"""Kernels that run one after another, enqueued by one call: a CUDA graph that is built node by node.

torch makes graphs too, by capturing a stream. While torch captures, it refuses random numbers to other threads, and the
driver refuses to wait for the whole device. A graph that is built from its kernels disturbs nobody. So this file calls
the driver itself.
"""

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import triton
from torch import Tensor

__all__ = ["CudaGraph"]

_INTEGERS = {"i1": ctypes.c_int8, "i32": ctypes.c_int32, "i64": ctypes.c_int64}
_DEVICE_POINTER = ctypes.c_int(3)  # CU_POINTER_ATTRIBUTE_DEVICE_POINTER


class KernelNode(ctypes.Structure):
    """The driver's CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_ = (
        ("func", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("params", ctypes.POINTER(ctypes.c_void_p)),
        ("extra", ctypes.c_void_p),
        ("kern", ctypes.c_void_p),
        ("ctx", ctypes.c_void_p),
    )


@functools.cache
def load_driver() -> Any:
    """The CUDA driver that torch and Triton use.

    Calls keep Python's lock: they take microseconds, and the thread that trains could take the lock for longer.
    """
    return ctypes.PyDLL("libcuda.so.1")


class CudaGraph:
    """Compiled Triton kernels in the order in which they were added, for the current device."""

    def __init__(self, driver: Any = None) -> None:
        self._graph = ctypes.c_void_p()  # first: there may be no driver, and :meth:`__del__` asks
        self._driver = driver or load_driver()
        self._last = ctypes.c_void_p()
        self._call("cuGraphCreate", ctypes.byref(self._graph), ctypes.c_uint(0))

    def add(self, kernel: Any, num_programs: int, args: Sequence[Tensor | int], options: Mapping[str, Any]) -> None:
        """Add the launch that ``kernel[(num_programs,)](*args, **options)`` would be.

        Addresses and integers become part of the graph, so that the memory must stay where it is.
        """
        compiled = kernel.warmup(*args, grid=(num_programs,), **options)  # compiles at most
        if compiled.metadata.num_ctas != 1 or compiled.metadata.global_scratch_size > 0:
            raise RuntimeError(f"{kernel.fn.__name__} needs clusters or scratch memory, which no recorded launch has")
        assert compiled.run is not None  # this loads it
        types = [compiled.src.signature[name] for name, _ in zip(kernel.arg_names, args, strict=False)]
        values = [self._pack(value, type_) for value, type_ in zip(args, types, strict=True) if type_ != "constexpr"]
        values += self._params_of_triton(compiled.function, [ctypes.sizeof(value) for value in values])
        node = KernelNode(
            func=compiled.function,
            grid=(num_programs, 1, 1),
            block=(32 * compiled.metadata.num_warps, 1, 1),
            shared_bytes=compiled.metadata.shared,
            params=(ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values)),
        )
        added = ctypes.c_void_p()
        # Each kernel comes after the one before; the first comes after nothing.
        dependencies = (ctypes.byref(self._last), ctypes.c_size_t(1 if self._last else 0))
        self._call("cuGraphAddKernelNode_v2", ctypes.byref(added), self._graph, *dependencies, ctypes.byref(node))
        self._last = added

    def finish(self) -> Callable[[], None]:
        """What enqueues all kernels on the then current stream, after what it has been given before."""
        graph = ctypes.c_void_p()
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(graph), self._graph, ctypes.c_ulonglong(0))
        return _Replay(self._driver, graph)

    def __del__(self) -> None:
        if self._graph:
            self._driver.cuGraphDestroy(self._graph)

    def _pack(self, value: Tensor | int, type_: str) -> Any:
        """A parameter as the driver reads it."""
        if isinstance(value, int):
            return _INTEGERS[type_](value)
        address = ctypes.c_uint64(value.data_ptr())
        if value.device.type == "cpu" and address:  # page-locked; the device may have another address for it
            self._call("cuPointerGetAttribute", ctypes.byref(address), _DEVICE_POINTER, address)
        return address

    def _params_of_triton(self, function: int, sizes: Sequence[int]) -> list[Any]:
        """The parameters that Triton adds to a kernel's own: pointers to memory that none of our kernels asks for."""
        found: list[int] = []
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        info, handle = self._driver.cuFuncGetParamInfo, ctypes.c_void_p(function)
        while info(handle, ctypes.c_size_t(len(found)), ctypes.byref(offset), ctypes.byref(size)) == 0:
            found.append(size.value)
        added = found[len(sizes) :]
        if found[: len(sizes)] != list(sizes) or any(size != ctypes.sizeof(ctypes.c_void_p) for size in added):
            raise RuntimeError(f"a kernel's parameters have {found} bytes, and {list(sizes)} are known")
        return [ctypes.c_void_p() for _ in added]

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self._driver, name)(*args)
        if status != 0:
            raise RuntimeError(f"{name} failed with CUDA error {status}")


class _Replay:
    """An executable graph; what it is launched after, and before, is the order of the stream."""

    def __init__(self, driver: Any, graph: ctypes.c_void_p) -> None:
        self._driver = driver
        self._graph = graph
        self._device = triton.runtime.driver.active.get_current_device()

    def __call__(self) -> None:
        stream = triton.runtime.driver.active.get_current_stream(self._device)
        status = self._driver.cuGraphLaunch(self._graph, ctypes.c_void_p(stream))
        if status != 0:
            raise RuntimeError(f"cuGraphLaunch failed with CUDA error {status}")

    def __del__(self) -> None:
        self._driver.cuGraphExecDestroy(self._graph)
