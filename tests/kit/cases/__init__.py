"""Cases of every op: frozen descriptions from which arguments are built, the same for every implementation.

`arguments()` returns fresh arrays that depend on the fields only. Whatever an op must not read is poison: spare slots
and blocks, gaps between blocks, columns behind a row's length, ids behind a row's count. The unused ends of block
tables hold invalid ids. A case prints as its fields, seed included.
"""

from tests.kit.cases.attention import SparseMlaCase
from tests.kit.cases.block_copy import BlockCopyCase, rejected_block_ids
from tests.kit.cases.common import Format
from tests.kit.cases.selection import IndexerCase, Keys, Scores, TopkCase
from tests.kit.cases.writes import IndexKeyWriteCase, IndexQueryQuantCase, LayerWriteCase, MlaCacheWriteCase

__all__ = [
    "BlockCopyCase",
    "Format",
    "IndexKeyWriteCase",
    "IndexQueryQuantCase",
    "IndexerCase",
    "Keys",
    "LayerWriteCase",
    "MlaCacheWriteCase",
    "Scores",
    "SparseMlaCase",
    "TopkCase",
    "rejected_block_ids",
]
