"""PrefixTree: a hit is the same salt and the same tokens from the start, whatever the hash function does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_manager import BlockId, PrefixNode, PrefixTree, Tier
from cache_manager.prefix_tree import hash_bytes, token_bytes

SEQUENCES = st.lists(st.tuples(st.sampled_from([b"", b"a"]), st.lists(st.integers(0, 2), max_size=12)), max_size=12)
HASHES: dict[str, Callable[[bytes], bytes]] = {
    "sha256": hash_bytes,
    "one bit": lambda content: bytes([sum(content) & 1]),
    "constant": lambda content: b"x",
}


def insert(tree: PrefixTree, tokens: list[int], salt: bytes = b"", block_size: int = 2) -> list[PrefixNode]:
    """Insert every full block, each in a device block of its own."""
    path = list[PrefixNode]()
    for begin in range(0, len(tokens) // block_size * block_size, block_size):
        node = tree.insert(path[-1] if path else None, token_bytes(tokens[begin : begin + block_size]), salt)
        if node is None:
            break
        if node.blocks[Tier.DEVICE] is None:
            tree.attach(node, Tier.DEVICE, BlockId(len(tree) - 1))
        path.append(node)
    return path


@pytest.mark.parametrize("hash_name", HASHES)
@given(sequences=SEQUENCES, asked=SEQUENCES)
def test_a_hit_is_the_longest_inserted_prefix_in_full_blocks(
    hash_name: str, sequences: list[tuple[bytes, list[int]]], asked: list[tuple[bytes, list[int]]]
) -> None:
    tree, known = PrefixTree(2, HASHES[hash_name]), set[tuple[bytes, tuple[int, ...]]]()
    for salt, tokens in sequences:
        path = insert(tree, tokens, salt)
        known |= {(salt, tuple(tokens[: 2 * length])) for length in range(1, len(path) + 1)}
        tree.check_integrity()
    assert len(tree) == len(known)
    for salt, tokens in sequences + asked:
        path = tree.match(tokens, salt)
        lengths = [2 * length for length in range(1, len(tokens) // 2 + 1)]
        found = [length for length in lengths if (salt, tuple(tokens[:length])) in known]
        assert 2 * len(path) == max(found, default=0)
        assert b"".join(node.tokens for node in path) == token_bytes(tokens[: 2 * len(path)])


def test_equal_tokens_behind_another_prefix_or_salt_are_no_hit() -> None:
    tree = PrefixTree(2)
    insert(tree, [1, 2, 3, 4])
    assert len(tree.match([1, 2, 3, 4, 5])) == 2
    assert len(tree.match([1, 2, 3])) == 1
    assert tree.match([9, 9, 3, 4]) == []
    assert tree.match([1, 2, 3, 4], b"adapter") == []


def test_digests_chain_over_the_whole_prefix() -> None:
    tree = PrefixTree(2)
    first, second = insert(tree, [1, 2, 1, 2])
    assert first.tokens == second.tokens
    assert first.digest == hash_bytes(hash_bytes(b"") + first.tokens)
    assert second.digest == hash_bytes(first.digest + second.tokens)


def test_a_colliding_block_is_not_cached_and_the_first_one_stays() -> None:
    tree = PrefixTree(2, HASHES["constant"])
    assert len(insert(tree, [1, 2])) == 1
    assert insert(tree, [3, 4]) == []
    assert len(tree.match([1, 2])) == 1
    assert tree.match([3, 4]) == []
    tree.check_integrity()


def test_a_node_with_children_or_blocks_cannot_be_removed() -> None:
    tree = PrefixTree(2)
    parent, child = insert(tree, [1, 2, 3, 4])
    for node in (parent, child):
        with pytest.raises(ValueError, match="without children and blocks"):
            tree.remove(node)
    tree.detach(child, Tier.DEVICE)
    tree.remove(child)
    assert child not in tree
    tree.detach(parent, Tier.DEVICE)
    tree.remove(parent)
    assert len(tree) == 0
    assert tree.match([1, 2]) == []
    tree.check_integrity()
    with pytest.raises(ValueError, match="got one that was removed"):
        tree.insert(parent, token_bytes([3, 4]))


def test_a_block_cannot_hold_two_nodes_nor_a_node_two_blocks_of_a_tier() -> None:
    tree = PrefixTree(2)
    first, second = insert(tree, [1, 2, 3, 4])
    with pytest.raises(ValueError, match="block 5"):
        tree.attach(first, Tier.DEVICE, BlockId(5))
    tree.detach(second, Tier.DEVICE)
    with pytest.raises(ValueError, match="block 0"):
        tree.attach(second, Tier.DEVICE, BlockId(0))
    with pytest.raises(ValueError, match="tier: expected one on which the node has a block, got DEVICE"):
        tree.detach(second, Tier.DEVICE)
    tree.attach(second, Tier.HOST, BlockId(0))
    assert tree.holder(Tier.HOST, BlockId(0)) is second
    assert tree.holder(Tier.DEVICE, BlockId(0)) is first


def test_token_ids_may_be_of_any_integer_type_but_not_of_another() -> None:
    assert token_bytes([1, 2]) == token_bytes(np.array([1, 2], np.int32)) == token_bytes(np.array([1, 2, 3])[:2])
    with pytest.raises(ValueError, match="tokens: expected one row of integers, got float64"):
        token_bytes([1.5])
    with pytest.raises(ValueError, match="tokens: expected one row of integers"):
        token_bytes(np.zeros((2, 2), np.int64))
    with pytest.raises(ValueError, match="tokens: expected 16 bytes, got 8"):
        PrefixTree(2).insert(None, token_bytes([1]))
    with pytest.raises(ValueError, match="block_size: expected 1 or more, got 0"):
        PrefixTree(0)


def test_a_long_prompt_is_walked_without_recursion() -> None:
    tree, tokens = PrefixTree(1), np.arange(5000)
    insert(tree, tokens.tolist(), block_size=1)
    assert len(tree.match(tokens)) == len(tree) == 5000
    tree.check_integrity()
