"""What the cache manager costs: block bookkeeping, prefix look-up, copies to and from the host.

    python scripts/bench_cache_manager.py [--operations 1000000] [--tokens 131072] [--mib 512] [--repeats 5]

Prints a table for docs/cache_manager.md. Every measurement checks its result first. Bookkeeping is measured in
processor time, so that other processes do not count; copies are compared with a memcpy of the same bytes in the same
run, alternating.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from statistics import median
from time import perf_counter, process_time

import numpy as np
import paddle

from cache_manager import (
    CacheConfig,
    CacheController,
    CacheManager,
    CacheSwapMetadata,
    CacheTensorSpec,
    TensorKey,
)
from cache_manager.block_pool import BlockId, BlockPool
from fastdeploy_dsa.block_copier import PaddleBlockCopier

BLOCK_SIZE = 64
LATENT_BYTES, INDEX_BYTES = 64 * 656, 64 * 132  # blocks of DeepSeek-V3.2's two caches
NUM_LAYERS = 8


class Backend:
    """Two roles with the sizes of a DSA cache."""

    def cache_spec(self, layer_ids: tuple[int, ...], **_: object) -> tuple[CacheTensorSpec, ...]:
        return (
            CacheTensorSpec("key", "key_caches", layer_ids, (LATENT_BYTES,), "uint8", 1, "key"),
            CacheTensorSpec("indexer", "indexer_caches", layer_ids, (INDEX_BYTES,), "uint8", 1, "indexer"),
        )

    def create_kv_cache(self, num_layers: int, num_blocks: int, **_: object) -> dict[TensorKey, paddle.Tensor]:
        rng = np.random.default_rng(0)
        return {
            (role, layer): paddle.to_tensor(rng.integers(0, 256, (num_blocks, width), np.uint8))
            for layer in range(num_layers)
            for role, width in (("key", LATENT_BYTES), ("indexer", INDEX_BYTES))
        }


def seconds_of_pool_operations(num_operations: int, size: int) -> float:
    """Processor seconds per block of allocate and free, mixed with share, in random order; `size` blocks a call."""
    pool, rng = BlockPool(4096), random.Random(0)
    shared = set(rng.sample(range(1000), 100))
    kinds = [rng.random() < 0.5 for _ in range(num_operations)]
    owned: list[list[BlockId]] = [pool.allocate(size) for _ in range(32)]
    num_blocks = 0
    begin = process_time()
    for number, is_allocation in enumerate(kinds):
        if (is_allocation and pool.num_free >= size) or not owned:
            owned.append(pool.allocate(size))
            num_blocks += size
        else:
            blocks = owned.pop()
            if number % 1000 in shared:
                pool.share(blocks)
                pool.free(blocks)
            pool.free(blocks)
    seconds = process_time() - begin
    pool.check_integrity({block: 1 for blocks in owned for block in blocks})
    return seconds / num_blocks


def seconds_of_prefix_match(num_tokens: int) -> float:
    """Processor seconds of a look-up of a prompt whose every block is cached; hashing included."""
    controller = CacheController(CacheConfig(num_layers=0))
    manager = CacheManager(controller, num_blocks=num_tokens // BLOCK_SIZE + 1, block_size=BLOCK_SIZE)
    tokens = np.random.default_rng(0).integers(0, 129280, num_tokens)
    table = manager.open(tokens)
    manager.commit(table, tokens)
    manager.close(table)
    begin = process_time()
    match = manager.match(tokens)
    seconds = process_time() - begin
    if match.num_tokens != num_tokens - 1:
        raise RuntimeError(f"expected a hit on {num_tokens - 1} tokens, got {match.num_tokens}")
    return seconds


class HostCopies:
    """A device cache and a host tier of about so many bytes, and copies of all blocks."""

    def __init__(self, num_bytes: int) -> None:
        self.num_blocks = max(2, num_bytes // (NUM_LAYERS * (LATENT_BYTES + INDEX_BYTES)))
        self.controller = CacheController(
            CacheConfig(num_layers=NUM_LAYERS, num_host_blocks=self.num_blocks), copier=PaddleBlockCopier()
        )
        self.controller.initialize_kv_cache(Backend(), self.num_blocks)
        self.controller.initialize_host_cache()
        self.num_bytes = self.controller.num_bytes
        order = np.random.default_rng(1).permutation(self.num_blocks).tolist()
        self.orders = {"in order": list(range(self.num_blocks)), "scattered": order}

    def check(self) -> None:
        """Swap out, destroy, swap in: the bytes are the same."""
        before = {key: tensor.numpy() for key, tensor in self.controller.caches.items()}
        self.swap_out("scattered")
        for tensor in self.controller.caches.values():
            tensor.zero_()
        self.swap_in("scattered")
        for key, tensor in self.controller.caches.items():
            if not np.array_equal(tensor.numpy(), before[key]):
                raise RuntimeError(f"{key} did not survive the host")

    def swap_out(self, order: str) -> None:
        metadata = CacheSwapMetadata(range(self.num_blocks), self.orders[order])
        self.controller.evict_device_to_host(metadata).synchronize()

    def swap_in(self, order: str) -> None:
        metadata = CacheSwapMetadata(self.orders[order], range(self.num_blocks))
        self.controller.load_host_to_device(metadata).synchronize()


def gigabytes_per_second(copy: Callable[[], None], num_bytes: int) -> float:
    begin = perf_counter()
    copy()
    return num_bytes / (perf_counter() - begin) / 1e9


def host_copy_rows(num_bytes: int, repeats: int) -> list[tuple[str, str, str]]:
    copies = HostCopies(num_bytes)
    copies.check()
    plain_src, plain_dst = np.ones(copies.num_bytes, np.uint8), np.zeros(copies.num_bytes, np.uint8)
    rows = []
    for order in copies.orders:
        for name, copy in (("to the host", copies.swap_out), ("from the host", copies.swap_in)):
            pairs = []
            for _ in range(repeats):
                plain = gigabytes_per_second(lambda: np.copyto(plain_dst, plain_src), copies.num_bytes)
                ours = gigabytes_per_second(lambda copy=copy, order=order: copy(order), copies.num_bytes)
                pairs.append((ours, plain))
            ours, plain = (median(column) for column in zip(*pairs, strict=True))
            share = median(ours / plain for ours, plain in pairs)
            label = f"copy {name}, blocks {order}"
            rows.append((label, f"{ours:.1f} GB/s, {share:.0%} of memcpy's {plain:.1f} GB/s", "80 % of memcpy"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for size in (1, 16):
        times = [seconds_of_pool_operations(args.operations, size) for _ in range(args.repeats)]
        unit = "block" if size == 1 else f"block, {size} a call"
        spread = f"{min(times) * 1e6:.2f} .. {max(times) * 1e6:.2f}"
        rows.append((f"allocate and free of a {unit}", f"{median(times) * 1e6:.2f} us ({spread})", "1 us"))
    times = [seconds_of_prefix_match(args.tokens) for _ in range(args.repeats)]
    spread = f"{min(times) * 1e3:.1f} .. {max(times) * 1e3:.1f}"
    rows.append((f"match of {args.tokens} cached tokens", f"{median(times) * 1e3:.1f} ms ({spread})", "5 ms"))
    rows += host_copy_rows(args.mib << 20, args.repeats)
    print("| operation | measured | bound |\n| --- | --- | --- |")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
