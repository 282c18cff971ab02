"""The C ABI on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.kit.c_api import CApi
from tests.kit.cuda_driver import DeviceCopy, Graph, Stream, driver
from tests.kit.implementation import Array
from tests.kit.poison import GuardedMemory, own_memory, whole_memory


@dataclass(frozen=True)
class CCuda(CApi):
    """The C ABI on the first GPU.

    Attributes:
        uses_default_stream: Run on the default stream instead of one that does not wait for it.
        uses_graph: Capture the call in a graph and launch that twice.
        has_guards: Give the device everything around an array, too, so that stray writes are found here; otherwise
            memory as large as the array, where a sanitizer finds stray reads as well.
    """

    uses_default_stream: bool = False
    uses_graph: bool = False
    has_guards: bool = True
    name = "c_cuda"
    device = "gpu"

    def on_threads(self, num_threads: int) -> CCuda:
        return self

    def run(self, op: str, memory: GuardedMemory, fields: dict[str, Any]) -> int:
        return self.run_in_order([(op, fields)], memory)[0]

    def run_in_order(self, calls: Sequence[tuple[str, dict[str, Any]]], memory: GuardedMemory) -> list[int]:
        """Enqueue calls one behind the other, so that each may find the device busy with the one before.

        Args:
            calls: Op and fields of its params struct; an array that is in two calls is the same memory.
            memory: Of workspaces.

        Returns:
            The status of each.
        """
        driver().make_current()
        stream = Stream(is_default=self.uses_default_stream)
        copies = DeviceCopies(whole_memory if self.has_guards else own_memory)
        try:
            ready = [(op, self._params_on_device(op, fields, copies, memory)) for op, fields in calls]
            copies.upload(stream)
            statuses = self._enqueue(ready, stream, restore=lambda: copies.upload(stream))
            copies.download(stream)
            stream.wait()
        finally:
            copies.close()
            stream.close()
        self._require_unchanged_inputs(calls, copies)
        return statuses

    def _params_on_device(
        self, op: str, fields: dict[str, Any], copies: DeviceCopies, memory: GuardedMemory
    ) -> ctypes.Structure:
        params = self.params(op, fields, copies.address)
        if "workspace_bytes" in dict(params._fields_):
            params.workspace_bytes = self.workspace_bytes(op, params)
            params.workspace = copies.address(memory.workspace(params.workspace_bytes))
        return params

    def workspace_bytes(self, op: str, params: ctypes.Structure) -> int:
        return self.library.cuda_workspace_bytes(op, params)

    def status_of_call(self, op: str, params: ctypes.Structure) -> int:
        """Of a call whose params hold addresses of the host: only for calls that are refused."""
        return self._enqueue([(op, params)], Stream(is_default=True), restore=lambda: None)[0]

    def _enqueue(
        self, calls: Sequence[tuple[str, ctypes.Structure]], stream: Stream, restore: Callable[[], None]
    ) -> list[int]:
        """`restore` enqueues what brings the inputs back: ops that work in place are called more than once here."""

        def enqueue() -> list[int]:
            return [
                int(str(self.library.call(f"dsa_{op}_cuda", ctypes.byref(params), stream.handle)))
                for op, params in calls
            ]

        statuses = enqueue()
        if not self.uses_graph or any(statuses):
            return statuses
        graph = Graph(stream)  # only now, because CUDA loads a kernel when it is first launched
        graph.begin()
        statuses = enqueue()
        graph.end()
        for _ in range(2):
            restore()
            graph.launch()
        stream.wait()
        graph.close()
        return statuses

    def _require_unchanged_inputs(self, calls: Sequence[tuple[str, dict[str, Any]]], copies: DeviceCopies) -> None:
        written, read = set(), {}
        for op, fields in calls:
            read_only = self.library.headers.read_only(f"dsa_{op}_params")
            for name, value in fields.items():
                if isinstance(value, np.ndarray) and name in read_only:
                    read[copies.of(value)] = f"{op}: {name}"
                elif isinstance(value, np.ndarray):
                    written.add(copies.of(value))
        for copy, name in read.items():
            assert copy in written or not copy.changed, f"{name}: a kernel changed this input, or what is around it"


class DeviceCopies:
    """The memory of one call; arrays that share it on the host share it on the device."""

    def __init__(self, memory_of: Callable[[Array], Array]) -> None:
        self._memory_of = memory_of
        self._copies: dict[int, DeviceCopy] = {}

    def of(self, array: Array) -> DeviceCopy:
        """The memory of an array, made when it is first asked for."""
        host = self._memory_of(array)
        start = host.ctypes.data
        if start not in self._copies:
            self._copies[start] = DeviceCopy(host)
        return self._copies[start]

    def address(self, array: Array) -> int:
        """Of an array on the device."""
        return self.of(array).address(array)

    def upload(self, stream: Stream) -> None:
        """Enqueue the copies to the device."""
        for copy in self._copies.values():
            copy.upload(stream)

    def download(self, stream: Stream) -> None:
        """Enqueue the copies to the host."""
        for copy in self._copies.values():
            copy.download(stream)

    def close(self) -> None:
        """Free the device memory."""
        for copy in self._copies.values():
            copy.close()
