"""Caches of several shapes over NumPy, and parts that fail or wait on demand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from threading import Event, current_thread
from zlib import crc32

import numpy as np
import numpy.typing as npt

from cache_manager import (
    MAIN_POOL,
    BlockId,
    BlockIds,
    BlockTable,
    CacheConfig,
    CacheController,
    CacheManager,
    CachePool,
    CacheTensorSpec,
    CopyEvent,
    NumpyCopier,
    PrefixNode,
    TensorKey,
    Tier,
    ordered_keys,
)

BLOCK_SIZE = 4
ITEM_BYTES = {"bfloat16": 2, "float32": 4, "uint8": 1}
# role, storage name, shape of a block of BLOCK_SIZE tokens, element type, owners: every n-th layer
Role = tuple[str, str, tuple[int, ...], str, int]
GQA: list[Role] = [
    ("key", "key_caches", (2, BLOCK_SIZE, 16), "bfloat16", 1),
    ("value", "value_caches", (2, BLOCK_SIZE, 16), "bfloat16", 1),
]
SHAPES: dict[str, list[Role]] = {
    "gqa": GQA,
    "gqa with scales": [
        *[(role, name, shape, "uint8", every) for role, name, shape, _, every in GQA],
        ("key_scale", "key_cache_scales", (2, BLOCK_SIZE), "float32", 1),
        ("value_scale", "value_cache_scales", (2, BLOCK_SIZE), "float32", 1),
    ],
    "mla": [("key", "key_caches", (1, BLOCK_SIZE, 576), "bfloat16", 1)],
    "dsa fp8": [
        ("key", "key_caches", (1, BLOCK_SIZE, 656), "uint8", 1),
        ("indexer", "indexer_caches", (BLOCK_SIZE, 132), "uint8", 2),
    ],
    "dsa bfloat16": [
        ("key", "key_caches", (1, BLOCK_SIZE, 576), "bfloat16", 1),
        ("indexer", "indexer_caches", (BLOCK_SIZE, 128), "bfloat16", 2),
    ],
    "odd": [("key", "key_caches", (3, 7), "uint8", 1), ("extra", "extra_caches", (13,), "uint8", 3)],
}
# Roles that are named like a pool are in it: a window, states that overlap a boundary, states that begin anew at one.
POOLS = {
    pool.name: pool
    for pool in (
        CachePool("window", block_tokens=2, live_tokens=6, boundary_tokens=5),
        CachePool("state", block_tokens=1, live_tokens=4, boundary_tokens=2),
        CachePool("closed", block_tokens=4, live_tokens=4, boundary_tokens=0),
    )
}
WINDOWED: dict[str, list[Role]] = {
    "windows": [
        ("key", "key_caches", (BLOCK_SIZE, 24), "uint8", 1),
        ("window", "window_caches", (2, 20), "uint8", 1),
        ("state", "state_caches", (1, 6), "float32", 2),
        ("closed", "closed_caches", (4, 9), "uint8", 3),
    ],
    "one window": [
        ("key", "key_caches", (BLOCK_SIZE, 24), "uint8", 1),
        ("window", "window_caches", (2, 20), "bfloat16", 1),
    ],
}
WINDOW_BLOCKS = {"window": 14, "state": 14, "closed": 7}
NUM_LAYERS, NUM_DRAFT_LAYERS = 3, 1


class Backend:
    """Declares and creates one of the SHAPES, or of WINDOWED."""

    def __init__(self, shape: str) -> None:
        self.roles = (SHAPES | WINDOWED)[shape]

    def cache_pools(self) -> tuple[CachePool, ...]:
        return tuple(POOLS.values())

    def cache_spec(
        self, layer_ids: tuple[int, ...], cache_dtype: str | None = None, kv_cache_quant_type: str | None = None
    ) -> tuple[CacheTensorSpec, ...]:
        return tuple(
            CacheTensorSpec(
                role=role,
                storage_name=storage_name,
                layer_ids=tuple(layer for layer in layer_ids if layer % every == 0),
                block_shape=shape,
                dtype=dtype,
                item_bytes=ITEM_BYTES[dtype],
                layout_id=f"{role}/{dtype}",
                pool=role if role in POOLS else MAIN_POOL,
            )
            for role, storage_name, shape, dtype, every in self.roles
        )

    def create_kv_cache(
        self,
        num_layers: int,
        num_blocks: int,
        cache_dtype: str | None = None,
        kv_cache_quant_type: str | None = None,
        layer_offset: int = 0,
        window_blocks: Mapping[str, int] | None = None,
    ) -> Mapping[TensorKey, npt.NDArray[np.uint8]]:
        """Filled with 0xEE: a copy that does not happen leaves bytes that nobody wrote."""
        specs = self.cache_spec(tuple(range(layer_offset, layer_offset + num_layers)))
        by_role = {spec.role: spec for spec in specs}
        counts = {MAIN_POOL: num_blocks, **(window_blocks or {})}
        return {
            (role, layer): np.full((counts[by_role[role].pool], by_role[role].bytes_per_block), 0xEE, np.uint8)
            for role, layer in ordered_keys(specs)
        }


class FaultyCopier(NumpyCopier):
    """Fails at the n-th copy from now, or lets the transfer thread wait at a gate."""

    def __init__(self) -> None:
        self.gate = Event()
        self.gate.set()
        self.fails_in: int | None = None
        self.num_copies = 0
        self.num_orderings = 0

    def copy(
        self,
        *,
        src: npt.NDArray[np.uint8],
        dst: npt.NDArray[np.uint8],
        src_block_ids: BlockIds,
        dst_block_ids: BlockIds,
    ) -> CopyEvent | None:
        if current_thread().name == "cache-transfer" and not self.gate.wait(20):
            raise RuntimeError("the test left the gate closed")
        if self.fails_in is not None:
            self.fails_in -= 1
            if self.fails_in < 0:
                self.fails_in = None
                raise OSError("injected failure")
        self.num_copies += 1
        return super().copy(src=src, dst=dst, src_block_ids=src_block_ids, dst_block_ids=dst_block_ids)

    def order_after_compute(self) -> None:
        self.num_orderings += 1


class CountingAllocator:
    """Counts, and fails at the n-th allocation."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.num_allocated = 0
        self.live: list[npt.NDArray[np.uint8]] = []

    def allocate(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        if self.num_allocated == self.fails_at:
            self.fails_at = None
            raise MemoryError("injected failure")
        self.num_allocated += 1
        self.live.append(np.full(num_bytes, 0xDD, np.uint8))
        return self.live[-1]

    def free(self, memory: npt.NDArray[np.uint8]) -> None:
        self.live = [array for array in self.live if array is not memory]


class Cache:
    """A controller with two groups, a manager, and a stand-in for the model: bytes that follow from the tokens."""

    def __init__(
        self, shape: str = "dsa fp8", *, num_blocks: int = 10, block_size: int = BLOCK_SIZE, **options: object
    ):
        config = CacheConfig(
            num_layers=NUM_LAYERS,
            transfer_timeout=5.0,
            window_blocks=WINDOW_BLOCKS,
            host_window_blocks=WINDOW_BLOCKS,
        )
        is_prefix_cached = bool(options.pop("is_prefix_cached", True))
        num_lookahead_tokens = int(options.pop("num_lookahead_tokens", 0))  # type: ignore[call-overload]
        snapshot_interval = int(options.pop("snapshot_interval", 1))  # type: ignore[call-overload]
        self.allocator = options.pop("allocator", None) or CountingAllocator()
        self.copier = FaultyCopier()
        self.controller = CacheController(
            replace(config, **options),  # type: ignore[arg-type]
            copier=self.copier,
            host_allocator=self.allocator,  # type: ignore[arg-type]
        )
        self.controller.initialize_kv_cache(Backend(shape), num_blocks)
        self.controller.initialize_mtp_kv_cache(Backend(shape), num_blocks, NUM_DRAFT_LAYERS, NUM_LAYERS)
        self.controller.initialize_host_cache()
        self.manager = CacheManager(
            self.controller,
            num_blocks=num_blocks,
            block_size=block_size,
            is_prefix_cached=is_prefix_cached,
            num_lookahead_tokens=num_lookahead_tokens,
            snapshot_interval=snapshot_interval,
        )
        self.block_size = block_size
        self.keys = list(self.controller.caches)
        rng = np.random.default_rng(1)
        self._ramps = {
            key: rng.integers(0, 256, array.shape[1], np.uint8) for key, array in self.controller.caches.items()
        }
        self._expected: dict[tuple[TensorKey, tuple[int, ...]], npt.NDArray[np.uint8]] = {}

    def seeds(self, tokens: list[int], salt: bytes = b"") -> list[int]:
        """What decides a position's bytes: the tokens up to it, and the salt."""
        seed, seeds = crc32(salt), []
        for token in tokens:
            seed = crc32(token.to_bytes(8, "little"), seed)
            seeds.append(seed)
        return seeds

    def write(self, table: BlockTable, tokens: list[int], begin: int, end: int) -> None:
        """Compute positions begin .. end - 1: write their part of every block of every tensor."""
        seeds = self.seeds(tokens[:end], table.salt)
        for key, array in self.controller.caches.items():
            window, block_tokens = table.windows.get(key[0]), self.block_tokens(key)
            blocks, first = (table.blocks, 0) if window is None else (window.blocks, window.first)
            for position in range(begin, end):
                place, offset = divmod(position, block_tokens)
                part = self._part(key, offset)
                array[blocks[place - first], part] = self.block_bytes(key, [seeds[position]] * block_tokens)[part]

    def run(self, table: BlockTable, tokens: list[int]) -> None:
        """One step for all tokens that are not computed: grow, wait, compute, commit."""
        self.manager.extend(table, len(tokens))
        self.manager.wait_for_loads()
        self.write(table, tokens, table.num_computed, len(tokens))
        self.manager.commit(table, tokens)

    def start(self, tokens: list[int], salt: bytes = b"") -> BlockTable:
        """Open a request and compute all of its tokens."""
        table = self.manager.open(tokens, salt=salt)
        self.run(table, tokens)
        return table

    def block_bytes(self, key: TensorKey, seeds: list[int]) -> npt.NDArray[np.uint8]:
        """Bytes of a tensor's block whose positions have these seeds; as many parts as there are seeds."""
        known = self._expected.get((key, tuple(seeds)))
        if known is None:
            known = self._ramps[key].copy()
            shift = 8 * (self.keys.index(key) % 4)
            for offset, seed in enumerate(seeds):
                known[self._part(key, offset)] ^= seed >> shift & 0xFF
            if len(self._expected) > 20_000:
                self._expected.clear()
            self._expected[key, tuple(seeds)] = known
        return known

    def check_table(self, table: BlockTable, tokens: list[int]) -> None:
        """Every computed position of a request holds the bytes that its tokens decide."""
        seeds = self.seeds(tokens[: table.num_computed], table.salt)
        arrays = self.controller.caches if table.is_on_device else self.host_arrays()
        blocks = table.blocks if table.is_on_device else table.host_blocks
        main = {key: array for key, array in arrays.items() if key[0] not in POOLS}
        for place in range(-(-table.num_computed // self.block_size)):
            own = seeds[place * self.block_size : (place + 1) * self.block_size]
            for key, array in main.items():
                end = self._part(key, len(own) - 1).stop
                found, expected = array[blocks[place], :end], self.block_bytes(key, own)[:end]
                assert np.array_equal(found, expected), f"{key} block {blocks[place]} at place {place} of {table}"

        for key in arrays.keys() - main.keys():
            window = table.windows[key[0]]
            self.check_rows(
                key,
                arrays[key],
                window.blocks if table.is_on_device else window.host_blocks,
                range(max(window.begin, POOLS[key[0]].first_live(table.num_computed)), table.num_computed),
                seeds,
                first=window.first,
            )

    def check_rows(
        self,
        key: TensorKey,
        array: npt.NDArray[np.uint8],
        blocks: list[BlockId],
        positions: range,
        seeds: list[int],
        *,
        first: int,
    ) -> None:
        """Positions of a window hold the bytes that their tokens decide."""
        block_tokens = self.block_tokens(key)
        for position in positions:
            place, offset = divmod(position, block_tokens)
            part = self._part(key, offset)
            expected = self.block_bytes(key, [seeds[position]] * block_tokens)[part]
            found = array[blocks[place - first], part]
            assert np.array_equal(found, expected), f"{key} block {blocks[place - first]}, position {position}"

    def check_snapshots(self) -> None:
        """Every snapshot, on either tier, holds the rows before its boundary."""
        windows = self.manager._tiers.windows
        for tier, arrays in ((Tier.DEVICE, self.controller.caches), (Tier.HOST, self.host_arrays())):
            for node in windows.tier(tier).nodes():
                salt, tokens = self.node_tokens(node)
                snapshot, seeds = windows.tier(tier).find(node), self.seeds(tokens, salt)
                assert snapshot is not None
                for key, array in arrays.items():
                    if blocks := snapshot.blocks.get(key[0]):
                        pool = POOLS[key[0]]
                        begin = max(0, len(tokens) - pool.boundary_tokens)
                        rows = range(begin, len(tokens))
                        self.check_rows(key, array, list(blocks), rows, seeds, first=begin // pool.block_tokens)

    def check_cached(self) -> None:
        """Every cached block, on either tier, holds the bytes of its tokens."""
        pending = {id(node): (node, self.node_tokens(node)) for node in self.manager._tiers.tree.nodes()}
        for node, (salt, tokens) in pending.values():
            own = self.seeds(tokens, salt)[-self.block_size :]
            for tier, arrays in ((Tier.DEVICE, self.controller.caches), (Tier.HOST, self.host_arrays())):
                block = node.blocks[tier]
                if block is None:
                    continue
                for key, array in arrays.items():
                    is_equal = key[0] in POOLS or np.array_equal(array[block], self.block_bytes(key, own))
                    assert is_equal, f"{tier.name} {key} block {block}"

    def longest_start(self, tokens: list[int], salt: bytes) -> int:
        """Tokens up to the last boundary before the last token that has a snapshot on the device."""
        tiers = self.manager._tiers
        path = tiers.tree.match(tokens, salt) if self.manager.is_prefix_cached else []
        starts = [
            place * self.block_size
            for place, node in enumerate(path, start=1)
            if place * self.block_size < len(tokens) and tiers.windows.device.find(node) is not None
        ]
        return max(starts, default=0)

    @staticmethod
    def node_tokens(node: PrefixNode) -> tuple[bytes, list[int]]:
        """Salt and tokens of a node's whole prefix."""
        parts, at = list[bytes](), node
        while at.parent is not None:
            parts.append(at.tokens)
            at = at.parent
        return at.tokens, np.frombuffer(b"".join(reversed(parts)), np.int64).tolist()

    def host_arrays(self) -> Mapping[TensorKey, npt.NDArray[np.uint8]]:
        host = self.controller._mover.host
        return {} if host is None else host.arrays

    @contextmanager
    def closed_gate(self) -> Iterator[None]:
        """Copies between the tiers wait."""
        self.copier.gate.clear()
        try:
            yield
        finally:
            self.copier.gate.set()

    def block_tokens(self, key: TensorKey) -> int:
        return POOLS[key[0]].block_tokens if key[0] in POOLS else self.block_size

    def _part(self, key: TensorKey, offset: int) -> slice:
        num_bytes, block_tokens = len(self._ramps[key]), self.block_tokens(key)
        return slice(offset * num_bytes // block_tokens, (offset + 1) * num_bytes // block_tokens)
