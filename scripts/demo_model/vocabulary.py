"""Byte tokens: id of byte b is b; three specials follow; the rest pads the table to a multiple of eight."""

from __future__ import annotations

BOS_ID, EOS_ID, PAD_ID = 256, 257, 258
SPECIAL_TOKENS = {"<bos>": BOS_ID, "<eos>": EOS_ID, "<pad>": PAD_ID}
VOCAB_SIZE = 264


def encode_prompt(text: str) -> list[int]:
    """Ids of a prompt as tokenizer.json gives them: bos, then the bytes."""
    return [BOS_ID, *text.encode()]
