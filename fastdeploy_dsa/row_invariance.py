"""What makes a token's numbers independent of the tokens computed beside it.

The ops of this package guarantee it. The matrix products are Paddle's, whose CPU build (oneMKL) gives a row the same
bits whatever the other rows are under four conditions, found by trying: the number of rows is a multiple of 8, the
inner dimension is a multiple of 4, there are 8 columns or more, and one thread computes.
tests/test_row_invariance.py holds it to that.
"""

from __future__ import annotations

from paddle.base import core

ROW_MULTIPLE = 8
INNER_MULTIPLE = 4
LEAST_COLUMNS = 8


def use_one_math_thread() -> None:
    """Let Paddle's own matrix products run on one thread, for the whole process, whatever OMP_NUM_THREADS says.

    The ops of this package have a thread count of their own and give the same bits with any.
    """
    core.set_num_threads(1)
