"""Types shared by the ops, and their numbers in the C ABI (custom_ops/include/dsa/common.h)."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

from fastdeploy_dsa.ops.checks import code_of, is_int, type_name

if TYPE_CHECKING:
    from paddle import Tensor

CacheFormat = Literal["fp8", "bfloat16", "float32"]
ScaleFormat = Literal["ue8m0", "plain"]
EntryKind = Literal["row", "index_key"]
Isa = Literal["auto", "scalar", "avx2", "avx512", "avx512_bf16"]

CACHE_FORMAT_CODES = MappingProxyType[CacheFormat, int]({"float32": 0, "bfloat16": 1, "fp8": 2})
SCALE_FORMAT_CODES = MappingProxyType[ScaleFormat, int]({"ue8m0": 0, "plain": 1})
ENTRY_KIND_CODES = MappingProxyType[EntryKind, int]({"row": 0, "index_key": 1})
ISA_CODES = MappingProxyType[Isa, int]({"auto": 0, "scalar": 1, "avx2": 2, "avx512": 3, "avx512_bf16": 4})

MAX_THREADS = 1024  # of a call; more would only enlarge its workspace


@dataclass(frozen=True)
class CpuOptions:
    """How an op runs on the CPU.

    Results depend on isa (the order of float sums), never on num_threads.

    Attributes:
        num_threads: 0 means every processor the process may run on.
        isa: "auto" is the best level this processor has; a level it lacks is refused when an op runs.

    Raises:
        ValueError: num_threads is no int from 0 to MAX_THREADS, or isa is unknown.
    """

    num_threads: int = 0
    isa: Isa = "auto"

    def __post_init__(self) -> None:
        if not is_int(self.num_threads) or not 0 <= self.num_threads <= MAX_THREADS:
            raise ValueError(f"num_threads: expected an int from 0 to {MAX_THREADS}, got {self.num_threads!r}")
        code_of("isa", self.isa, ISA_CODES)


DEFAULT_CPU_OPTIONS = CpuOptions()


def codes_of(cpu: CpuOptions) -> tuple[int, int]:
    """The last two attributes of every op: num_threads and the number of isa.

    Raises:
        ValueError: cpu is something else.
    """
    if not isinstance(cpu, CpuOptions):
        raise ValueError(f"cpu: expected CpuOptions, got {type_name(cpu)}")
    return cpu.num_threads, ISA_CODES[cpu.isa]


class IndexSelection(NamedTuple):
    """The context positions that each query row attends to, and where they lie in the cache.

    Attributes:
        positions: [T, topk] int32, ascending, -1 after the last; relative to the row's request.
        slot_ids: [T, topk] int32, block * block_size + offset, same order, -1 after the last.
        counts: [T] int32, how many of each row are valid.
    """

    positions: Tensor
    slot_ids: Tensor
    counts: Tensor
