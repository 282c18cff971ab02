"""Which token sequences have cached blocks, and where.

A node stands for one full block after a given prefix. Its digest chains over the tokens of the whole prefix, starting
from a salt (an adapter, a tenant, anything that changes what the bytes would be):

    root      hash(salt)
    block 0   hash(digest of the root    | tokens 0 .. 63)
    block 1   hash(digest of block 0     | tokens 64 .. 127)

A block's bytes may depend on tokens behind it, as those of a draft model do, whose row of a position is made from the
next token. Then those tokens are part of what is hashed and compared, and a block is found only where they follow.
With one such token:

    block 0   hash(digest of the root    | tokens 0 .. 64)
    block 1   hash(digest of block 0     | tokens 64 .. 128)

A look-up is one hash and one dictionary access per block, whatever the size of the tree. Equal digests are
never trusted: tokens and parent are compared as well, which by induction compares the whole prefix and the salt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import IntEnum
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np

from cache_manager.block_pool import BlockId

if TYPE_CHECKING:
    import numpy.typing as npt

TOKEN_BYTES = 8


class Tier(IntEnum):
    """Where a block's bytes are."""

    DEVICE = 0
    HOST = 1


class PrefixNode:
    """One full block after its parent's.

    Attributes:
        tokens: What its bytes depend on besides the parent: token ids as bytes; of a root the salt.
        blocks: The block that holds the bytes, by tier; None where there is none.
        children: Blocks that follow this one, by digest.
        num_uses: How often it was inserted or hit.
    """

    __slots__ = ("blocks", "children", "digest", "num_uses", "parent", "tokens")

    def __init__(self, digest: bytes, tokens: bytes, parent: PrefixNode | None) -> None:
        """Make a node without blocks."""
        self.digest = digest
        self.tokens = tokens
        self.parent = parent
        self.blocks: list[BlockId | None] = [None] * len(Tier)
        self.children: dict[bytes, PrefixNode] = {}
        self.num_uses = 1


def hash_bytes(content: bytes) -> bytes:
    """SHA-256, which processors compute faster than the shorter alternatives."""
    return sha256(content).digest()


def token_bytes(tokens: npt.ArrayLike) -> bytes:
    """Token ids as bytes, TOKEN_BYTES each.

    Raises:
        ValueError: They are not one row of integers.
    """
    row = np.asarray(tokens)
    if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
        raise ValueError(f"tokens: expected one row of integers, got {row.dtype} {row.shape}")
    return row.astype(np.int64, copy=False).tobytes()


class PrefixTree:
    """Cached prefixes in units of full blocks. It owns no block and evicts nothing by itself: it is an index."""

    def __init__(
        self,
        block_size: int,
        hash_function: Callable[[bytes], bytes] = hash_bytes,
        *,
        num_lookahead_tokens: int = 0,
    ) -> None:
        """Make an empty tree.

        Args:
            block_size: Tokens of a block.
            hash_function: Of a node. A weak one costs hits, never correctness.
            num_lookahead_tokens: Tokens behind a block that its bytes depend on.

        Raises:
            ValueError: block_size is below 1, or num_lookahead_tokens below 0.
        """
        if block_size < 1:
            raise ValueError(f"block_size: expected 1 or more, got {block_size}")
        if num_lookahead_tokens < 0:
            raise ValueError(f"num_lookahead_tokens: expected 0 or more, got {num_lookahead_tokens}")
        self._block_bytes = block_size * TOKEN_BYTES
        self._node_bytes = (block_size + num_lookahead_tokens) * TOKEN_BYTES
        self._hash = hash_function
        self._roots: dict[bytes, PrefixNode] = {}
        self._nodes: dict[bytes, PrefixNode] = {}
        self._holders: tuple[dict[BlockId, PrefixNode], ...] = tuple({} for _ in Tier)

    def __len__(self) -> int:
        """Nodes, roots not counted."""
        return len(self._nodes)

    def __contains__(self, node: object) -> bool:
        """Whether the node has not been removed."""
        return isinstance(node, PrefixNode) and self._nodes.get(node.digest) is node

    def match(self, tokens: npt.ArrayLike, salt: bytes = b"") -> list[PrefixNode]:
        """The nodes of the longest cached prefix of full blocks, first block first.

        Args:
            tokens: [n] integers; an int64 array is the fastest.
            salt: See the module.
        """
        node, path = self._roots.get(salt), list[PrefixNode]()
        if node is None:
            return path
        row, width, nodes, hashed = token_bytes(tokens), self._node_bytes, self._nodes, self._hash
        for begin in range(0, len(row) - width + 1, self._block_bytes):
            block = row[begin : begin + width]
            found = nodes.get(hashed(node.digest + block))
            if found is None or found.tokens != block or found.parent is not node:
                break
            path.append(found)
            node = found
        return path

    def nodes_of(self, tokens: npt.ArrayLike, begin: int, end: int) -> Iterator[bytes]:
        """What `insert` takes for blocks begin .. end - 1 of a sequence, as far as the sequence goes."""
        stride, width = self._block_bytes, self._node_bytes
        row = token_bytes(
            np.asarray(tokens)[begin * stride // TOKEN_BYTES : (end * stride - stride + width) // TOKEN_BYTES]
        )
        for start in range(0, min((end - begin) * stride, len(row) - width + 1), stride):
            yield row[start : start + width]

    def find(self, parent: PrefixNode | None, tokens: bytes, salt: bytes = b"") -> PrefixNode | None:
        """The node of one more block after parent (None: at the start), if there is one."""
        start = self._roots.get(salt) if parent is None else parent
        if start is None:
            return None
        found = start.children.get(self._hash(start.digest + tokens))
        return found if found is not None and found.tokens == tokens else None

    def insert(self, parent: PrefixNode | None, tokens: bytes, salt: bytes = b"") -> PrefixNode | None:
        """Add one more block after parent (None: at the start). It has no bytes on any tier yet: see `attach`.

        Returns:
            The node, which may have existed; None if its digest belongs to other tokens, so that it cannot be cached.

        Raises:
            ValueError: tokens is not one full block with what follows, or parent has been removed.
        """
        if len(tokens) != self._node_bytes:
            raise ValueError(f"tokens: expected {self._node_bytes} bytes, got {len(tokens)}")
        if parent is not None and parent not in self:
            raise ValueError("parent: expected a node of this tree, got one that was removed")
        start = self._roots.get(salt) or PrefixNode(self._hash(salt), salt, None) if parent is None else parent
        digest = self._hash(start.digest + tokens)
        found = self._nodes.get(digest)
        if found is not None:
            return found if found.tokens == tokens and found.parent is start else None
        if parent is None:
            self._roots[salt] = start
        node = PrefixNode(digest, tokens, start)
        start.children[digest] = self._nodes[digest] = node
        return node

    def attach(self, node: PrefixNode, tier: Tier, block: BlockId) -> None:
        """Say that a block holds the node's bytes.

        Raises:
            ValueError: The node was removed or has a block on this tier, or the block holds another node's bytes.
        """
        if node not in self or node.blocks[tier] is not None or block in self._holders[tier]:
            raise ValueError(f"block {block}: the node has a {tier.name} block, or the block a node, already")
        node.blocks[tier] = block
        self._holders[tier][block] = node

    def detach(self, node: PrefixNode, tier: Tier) -> BlockId:
        """Say that no block of this tier holds the node's bytes any more; a node without any stays until `remove`.

        Raises:
            ValueError: None did.
        """
        block = node.blocks[tier]
        if block is None or node not in self:
            raise ValueError(f"tier: expected one on which the node has a block, got {tier.name}")
        node.blocks[tier] = None
        del self._holders[tier][block]
        return block

    def holder(self, tier: Tier, block: BlockId) -> PrefixNode | None:
        """The node whose bytes a block holds."""
        return self._holders[tier].get(block)

    def remove(self, node: PrefixNode) -> None:
        """Forget a node; children go before their parents.

        Raises:
            ValueError: It has children or a block, or was removed.
        """
        if node not in self or node.children or any(block is not None for block in node.blocks):
            raise ValueError("node: expected one of this tree without children and blocks")
        del self._nodes[node.digest]
        parent = node.parent
        assert parent is not None, "a root is no node"  # noqa: S101 - a bug of this file
        del parent.children[node.digest]
        if parent.parent is None and not parent.children:
            del self._roots[parent.tokens]

    @staticmethod
    def subtree(node: PrefixNode) -> Iterator[PrefixNode]:
        """The node and all that follow it, children before parents."""
        order, level = list[PrefixNode](), [node]
        while level:
            order += level
            level = [child for parent in level for child in parent.children.values()]
        return reversed(order)

    def nodes(self) -> list[PrefixNode]:
        """All nodes, parents before children."""
        return [node for root in self._roots.values() for node in reversed(list(self.subtree(root))) if node.parent]

    def check_integrity(self) -> None:
        """Check that links, index and blocks agree.

        Raises:
            AssertionError: They do not; no caller of this class can cause that.
        """
        nodes = self.nodes()
        laws = {
            "the index and the tree differ": len(nodes) == len(self._nodes) and all(node in self for node in nodes),
            "a child has another parent": all(
                child.parent is node and digest == child.digest
                for node in (*nodes, *self._roots.values())
                for digest, child in node.children.items()
            ),
            "a digest is wrong": all(
                node.parent is not None and node.digest == self._hash(node.parent.digest + node.tokens)
                for node in nodes
            ),
            "a root without children": all(root.children for root in self._roots.values()),
            "a node on no tier": all(node.blocks != [None] * len(Tier) for node in nodes),
        }
        for tier in Tier:
            held = {node.blocks[tier]: node for node in nodes if node.blocks[tier] is not None}
            laws[f"a {tier.name} block is attached twice, or to a removed node"] = held == self._holders[tier] and len(
                held
            ) == sum(node.blocks[tier] is not None for node in nodes)
        for broken, holds in laws.items():
            if not holds:
                raise AssertionError(broken)
