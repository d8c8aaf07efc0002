"""Which row of a larger state each row of a batch uses, as csrc/rows.h."""

import triton
import triton.language as tl


@triton.jit
def row_of(rows, index, count):
    """The row of a state of `count` rows, or -1 where row `index` of the batch does nothing.

    That is where it names none, or one that an earlier row of the batch has. rows (B) is int32 or
    int64; None: row `index` uses row `index`.
    """
    if rows is None:
        return index
    else:
        row = tl.load(rows + index).to(tl.int64)
        same = tl.zeros((), tl.int32)
        for start in range(0, index.to(tl.int32), 128):
            i = start + tl.arange(0, 128)
            same += tl.sum((tl.load(rows + i, i < index, -1) == row).to(tl.int32), 0)
        return tl.where((row >= 0) & (row < count) & (same == 0), row, -1)
