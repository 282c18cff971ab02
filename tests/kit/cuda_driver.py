"""NumPy arrays as device memory, through the CUDA driver alone: no package is needed on a machine with a GPU."""

from __future__ import annotations

import ctypes
import time
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A kernel that has not finished by then hangs; the slowest case takes less than a second.
PATIENCE_SECONDS = 30.0
ALIGNMENT = 256  # of cuMemAlloc, and what a kernel may find out about an address

NOT_READY = 600
NON_BLOCKING = 1
CAPTURE_GLOBAL = 0  # any call that a capture forbids fails, on every stream


class NoDevice(Exception):
    """There is no driver or no GPU; the text says which."""


class DeviceFault(Exception):
    """A kernel hangs or touched memory that it may not: nothing runs any more in this process."""


class Driver:
    """The primary context of the first GPU."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise NoDevice(f"no CUDA driver: {error}") from error
        device, context = ctypes.c_int(), ctypes.c_void_p()
        try:
            self.call("cuInit", ctypes.c_uint(0))
            self.call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        except RuntimeError as error:
            raise NoDevice(f"no GPU: {error}") from error
        self._context = context
        self.make_current()

    def make_current(self) -> None:
        """Let the calling thread use the GPU."""
        self.call("cuCtxSetCurrent", self._context)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver.

        Raises:
            RuntimeError: It returned an error.
        """
        self.require(name, getattr(self._library, name)(*arguments))

    def require(self, what: str, error: int) -> None:
        """Raise for an error code.

        Raises:
            RuntimeError: The code is not 0.
        """
        if error == 0:
            return
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(ctypes.c_int(error), ctypes.byref(text))
        raise RuntimeError(f"{what}: {(text.value or b'unknown error').decode()} ({error})")

    def is_done(self, stream: Stream) -> bool:
        """Whether all work of a stream has finished.

        Raises:
            DeviceFault: A kernel failed.
        """
        error = self._library.cuStreamQuery(stream.handle)
        if error == NOT_READY:
            return False
        try:
            self.require("a kernel", error)
        except RuntimeError as fault:
            raise DeviceFault(str(fault)) from fault
        return True


@cache
def driver() -> Driver:
    """The driver of this process.

    Raises:
        NoDevice: There is none, or no GPU.
    """
    return Driver()


class Stream:
    """A stream of its own, which does not wait for the default stream; or the default stream."""

    def __init__(self, *, is_default: bool = False) -> None:
        self.handle = ctypes.c_void_p()
        self._is_default = is_default
        if not is_default:
            driver().call("cuStreamCreate", ctypes.byref(self.handle), ctypes.c_uint(NON_BLOCKING))

    def wait(self) -> None:
        """Until all its work has finished.

        Raises:
            DeviceFault: A kernel failed, or hangs.
        """
        deadline, pause = time.monotonic() + PATIENCE_SECONDS, 0.0
        while not driver().is_done(self):
            if time.monotonic() > deadline:
                raise DeviceFault(f"a kernel hangs for {PATIENCE_SECONDS:.0f} s")
            time.sleep(pause)
            pause = min(pause + 20e-6, 2e-3)

    def close(self) -> None:
        """Free it."""
        if not self._is_default:
            driver().call("cuStreamDestroy_v2", self.handle)


class Graph:
    """What was enqueued on a stream between begin and end, to be launched again."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._graph, self._executable = ctypes.c_void_p(), ctypes.c_void_p()

    def begin(self) -> None:
        """Record instead of running."""
        driver().call("cuStreamBeginCapture_v2", self._stream.handle, ctypes.c_int(CAPTURE_GLOBAL))

    def end(self) -> None:
        """Stop recording."""
        driver().call("cuStreamEndCapture", self._stream.handle, ctypes.byref(self._graph))
        driver().call("cuGraphInstantiateWithFlags", ctypes.byref(self._executable), self._graph, ctypes.c_uint64(0))

    def launch(self) -> None:
        """Enqueue all that was recorded."""
        driver().call("cuGraphLaunch", self._executable, self._stream.handle)

    def close(self) -> None:
        """Free it."""
        driver().call("cuGraphExecDestroy", self._executable)
        driver().call("cuGraphDestroy", self._graph)


class DeviceCopy:
    """Host memory on the device.

    An address on the device is aligned like its counterpart on the host, so that kernels meet the same alignments.
    """

    def __init__(self, host: NDArray[np.uint8]) -> None:
        self.host = host
        self._first = host.ctypes.data
        self._shift = self._first % ALIGNMENT
        self._memory = ctypes.c_uint64()
        self._before = host.copy()
        size = ctypes.c_size_t(self._shift + max(host.size, 1))
        driver().call("cuMemAlloc_v2", ctypes.byref(self._memory), size)

    def address(self, array: NDArray[Any]) -> int:
        """Of an array inside the memory, on the device."""
        return int(self._start.value + array.ctypes.data - self._first)

    def upload(self, stream: Stream) -> None:
        """Enqueue the copy to the device."""
        if self.host.size:
            driver().call("cuMemcpyHtoDAsync_v2", self._start, self._host, self._size, stream.handle)

    def download(self, stream: Stream) -> None:
        """Enqueue the copy back."""
        if self.host.size:
            driver().call("cuMemcpyDtoHAsync_v2", self._host, self._start, self._size, stream.handle)

    @property
    def changed(self) -> bool:
        """Whether the last download differs from what was there before."""
        return not np.array_equal(self._before, self.host)

    def close(self) -> None:
        """Free the device memory."""
        driver().call("cuMemFree_v2", self._memory)

    @property
    def _start(self) -> ctypes.c_uint64:
        return ctypes.c_uint64(self._memory.value + self._shift)

    @property
    def _host(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._first)

    @property
    def _size(self) -> ctypes.c_size_t:
        return ctypes.c_size_t(self.host.size)
