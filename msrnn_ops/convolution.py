"""A causal convolution over steps of which some are padding and some start afresh.

Step t sees the K - 1 real steps before it: those that ``valid`` leaves out do not exist, and what
lies before a border (a reset, or the start of a packed sequence) counts as 0, or as what a state
brings. ``rows`` is (B, K - 1 + T, D): T steps behind the K - 1 that came before them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def last_real(rows: Tensor, real: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The last so many rows (B, ?, D) that are real (B, ?), and whether there are that many."""
    order = real.long().argsort(dim=1, stable=True)[:, real.shape[1] - count :]
    return _take(rows, order), real.gather(1, order)


def _take(rows: Tensor, places: Tensor) -> Tensor:
    return rows.gather(1, places.unsqueeze(-1).expand(-1, -1, rows.shape[2]))


def _counts(resets: Tensor | None, before: int) -> Tensor | None:
    """Resets up to each row, (B, K - 1 + T): rows of one number see each other."""
    return None if resets is None else F.pad(resets.long().cumsum(1), (before, 0))


def _plain(conv: nn.Conv1d, rows: Tensor) -> Tensor:
    steps = rows.shape[1] - conv.kernel_size[0] + 1
    # Without steps over one that is dropped: DDP and FSDP wait for gradients on all ranks.
    return conv(rows.mT if steps else F.pad(rows.mT, (0, 1))).mT[:, :steps]


def _by_taps(conv: nn.Conv1d, taps: list[Tensor]) -> Tensor:
    """Tap j is what each step sees j steps back, (B, T, D)."""
    y = taps[0] * conv.weight[:, 0, -1]
    for j, tap in enumerate(taps[1:], 1):
        y = y + tap * conv.weight[:, 0, -1 - j]
    return y if conv.bias is None else y + conv.bias


def causal(
    conv: nn.Conv1d, rows: Tensor, valid: Tensor | None = None, resets: Tensor | None = None
) -> Tensor:
    """The convolution at each of the T steps, of rows that may hold padding and resets."""
    if valid is None and resets is None:
        return _plain(conv, rows)
    before = conv.kernel_size[0] - 1
    number, back = _counts(resets, before), None
    if valid is not None:  # the real rows first, in their order, then the padding
        real = F.pad(valid, (before, 0), value=True)
        order = (~real).long().argsort(dim=1, stable=True)
        rows = _take(rows, order)
        number = None if number is None else number.gather(1, order)
        back = (real.long().cumsum(1) - 1 - before)[:, before:].clamp_min(0)
    if number is None:
        y = _plain(conv, rows)
    else:
        steps = rows.shape[1] - before
        taps = []
        for j in range(before + 1):
            seen = slice(before - j, before - j + steps)
            same = (number[:, seen] == number[:, before:]).unsqueeze(-1)
            taps.append(torch.where(same, rows[:, seen], 0.0) if j else rows[:, seen])
        y = _by_taps(conv, taps)
    return y if back is None else _take(y, back)


def last_rows(
    rows: Tensor, count: int, valid: Tensor | None = None, resets: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The last rows that a step behind all of them sees, (B, count, D).

    And which are real, where ``valid`` is given for all rows: a border is as good as a real row.
    """
    if resets is not None:
        number = resets.long().cumsum(1)
        number = F.pad(number, (rows.shape[1] - number.shape[1], 0))
        rows = torch.where((number == number[:, -1:]).unsqueeze(-1), rows, 0.0)
    if valid is None:
        return rows[:, rows.shape[1] - count :], None
    found, real = last_real(rows, valid, count)
    return found, real if resets is None else real | resets.any(1, keepdim=True)


def packed(
    conv: nn.Conv1d, rows: Tensor, states: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """Of sequences packed along time (B = 1), each behind the K - 1 inputs of its own state.

    ``cu_seqlens`` counts from the first of the T steps, and may point outside of them. Also
    returned are the last K - 1 inputs of each sequence that ends here, (N, K - 1, D).
    """
    before = conv.kernel_size[0] - 1
    n, last_row = states.shape[0], rows.shape[1] - 1
    start, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()

    def seen(at: Tensor, sequence: Tensor) -> Tensor:
        """The row of a time step, or that of the sequence's state if it lies before its start."""
        begin = start[sequence]
        own = states[sequence, (before + at - begin).clamp(0, before - 1)]
        row = rows[0, (before + at).clamp(0, last_row)]
        return torch.where((at >= begin).unsqueeze(-1), row, own)

    taps = [rows[:, before:]]
    if before == 0 or n == 0:
        return _by_taps(conv, taps), states
    step = torch.arange(rows.shape[1] - before, device=rows.device)
    sequence = torch.searchsorted(end.contiguous(), step, right=True).clamp_max(n - 1)
    taps += [seen(step - j, sequence).unsqueeze(0) for j in range(1, before + 1)]
    at = end[:, None] - before + torch.arange(before, device=rows.device)
    return _by_taps(conv, taps), seen(at, torch.arange(n, device=rows.device)[:, None])
