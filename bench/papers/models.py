"""The sequence models that the experiments compare, and how they are trained.

All are one stack of residual blocks; they differ in how a block mixes over time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention, silu, softplus

import msrnn_ops as ms

CELLS = {"minGRU": "gru", "minLSTM": "lstm"}
_HEAD_DIM = 32
_WARMUP = 0.05  # of the steps
_CLIP = 1.0


def _mlp(width: int, factor: float) -> nn.Module:
    inner = int(width * factor)
    return nn.Sequential(
        nn.RMSNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width)
    )


def _causal(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """A convolution over time of (B, T, D) that sees no later step."""
    return cast(Tensor, conv(pad(x.mT, (conv.kernel_size[0] - 1, 0)))).mT


def rotate(x: Tensor, start: int = 0) -> Tensor:
    """Rotary positions of (B, H, T, Dh), of which the first is number `start`."""
    half = x.shape[-1] // 2
    frequencies = 1e4 ** (-torch.arange(half, device=x.device) / half)
    steps = torch.arange(start, start + x.shape[-2], device=x.device)
    angles = steps[:, None] * frequencies
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)


class Recurrent(nn.Module):
    """A layer with the interface of torch.nn.GRU, as MinGRU and MinLSTM are."""

    def __init__(self, layer: Callable[..., nn.Module], width: int) -> None:
        super().__init__()
        self.layer = layer(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layer(x)[0])


class Attention(nn.Module):
    """Causal attention with rotary positions, in heads of 32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % _HEAD_DIM:
            raise ValueError(f"expected a width divisible by {_HEAD_DIM}, got {width}")
        self.projection = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.projection(x).unflatten(-1, (-1, 3, _HEAD_DIM)).transpose(1, 2)
        q, k, v = heads.unbind(3)
        mixed = scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return cast(Tensor, self.out(mixed.transpose(1, 2).flatten(2)))


class SelectiveScan(nn.Module):
    """The block of Mamba (Gu and Dao 2023), its scan by ``ms.decay_scan`` over expanded channels.

    Mamba's own kernel keeps the (B, T, 2 D, 16) states on chip; here, as in any PyTorch code of it,
    they are tensors in memory.
    """

    _STATES = 16
    _CONV = 4

    def __init__(self, width: int) -> None:
        super().__init__()
        inner, self.rank = 2 * width, math.ceil(width / 16)
        self.projection = nn.Linear(width, 2 * inner)
        self.conv = nn.Conv1d(inner, inner, self._CONV, groups=inner)
        self.selection = nn.Linear(inner, self.rank + 2 * self._STATES, bias=False)
        self.step_size = nn.Linear(self.rank, inner)
        step = torch.exp(torch.empty(inner).uniform_(math.log(1e-3), math.log(1e-1)))
        with torch.no_grad():
            self.step_size.bias.copy_(step.expm1().log())  # the inverse of softplus
        rates = torch.arange(1, self._STATES + 1, dtype=torch.float32)
        self.log_rate = nn.Parameter(rates.log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.projection(x).chunk(2, -1)
        x = silu(_causal(self.conv, x))
        selected = self.selection(x)
        step, write, read = selected.split([self.rank, self._STATES, self._STATES], -1)
        step = softplus(self.step_size(step))
        log_decay = (step.unsqueeze(-1) * -self.log_rate.exp()).flatten(2)
        written = ((step * x).unsqueeze(-1) * write.unsqueeze(-2)).flatten(2)
        states = ms.decay_scan(log_decay, written).unflatten(-1, (-1, self._STATES))
        y = (states @ read.unsqueeze(-1)).squeeze(-1) + self.skip * x
        return cast(Tensor, self.out(y * silu(gate)))


MIXERS: dict[str, Callable[[int], nn.Module]] = {
    "minGRU": partial(Recurrent, ms.nn.MinGRU),
    "minLSTM": partial(Recurrent, ms.nn.MinLSTM),
    "GRU": partial(Recurrent, nn.GRU),
    "LSTM": partial(Recurrent, nn.LSTM),
    "transformer": Attention,
    "selective scan": SelectiveScan,
}


class Block(nn.Module):
    """x + mixer(norm(x)), then the same with an MLP."""

    def __init__(self, mixer: nn.Module, width: int, mlp: float, dropout: float) -> None:
        super().__init__()
        self.norm, self.mixer = nn.RMSNorm(width), mixer
        self.mlp = _mlp(width, mlp) if mlp else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.mixer(self.norm(x)))
        return x if self.mlp is None else x + self.dropout(self.mlp(x))


class SequenceModel(nn.Module):
    """An embedding, residual blocks that mix over time, a norm and a linear map.

    Args:
        kind: a key of ``MIXERS``.
        embedding: maps what comes in, (B, T) tokens or (B, T, F) features, to (B, T, width).
        width: of the residual stream; of a transformer divisible by 32.
        layers: number of blocks.
        outputs: size of the output's last dimension.
        expansion: width of the recurrence over `width`; minGRU and minLSTM only.
        conv: taps of a causal convolution before the recurrence, 0 for none; likewise.
        mlp: width of the MLP over `width`, 0 for none.
        dropout: probability, after each mixer and MLP.
    """

    def __init__(
        self,
        kind: str,
        embedding: nn.Module,
        width: int,
        layers: int,
        outputs: int,
        *,
        expansion: float = 1.0,
        conv: int = 0,
        mlp: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if kind not in MIXERS:
            raise ValueError(f"expected a kind of {', '.join(MIXERS)}, got {kind!r}")
        self.embedding = embedding

        def block() -> nn.Module:
            if kind in CELLS:
                return ms.nn.MinRNNBlock(
                    width,
                    cell=CELLS[kind],
                    expansion=expansion,
                    conv=conv,
                    mlp=mlp,
                    dropout=dropout,
                )
            return Block(MIXERS[kind](width), width, mlp, dropout)

        self.blocks = nn.Sequential(*(block() for _ in range(layers)))
        self.head = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.blocks(self.embedding(x))))

    def step(self, x: Tensor, states: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """Of minGRU and minLSTM: the outputs of one step, and the states of all blocks after it."""
        x, after = self.embedding(x), []
        for block, state in zip(self.blocks, states, strict=True):
            x, state = cast(Any, block).step(x, state)
            after.append(state)
        return cast(Tensor, self.head(x)), after


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def schedule(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
    return min((step + 1) / max(warmup, 1), 1.0) * cosine


def fit(
    model: nn.Module,
    loss: Callable[[], Tensor],
    evaluate: Callable[[], float],
    *,
    steps: int,
    rate: float,
    every: int,
    label: str,
    solved: Callable[[float], bool] = lambda value: False,
) -> list[dict[str, Any]]:
    """AdamW on `loss`, which draws a batch at every call.

    Returns the curve, a point every so many steps and at the end, which comes early where `solved`
    says so of the evaluation: the step, the mean loss and time of a step since the last point, and
    `evaluate()`.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedule(step, steps, _WARMUP * steps)
    )
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn())
    curve: list[dict[str, Any]] = []
    recent = torch.zeros((), device=next(model.parameters()).device)
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[value]}")) as progress:
        task = progress.add_task(label, total=steps, value="")
        start = time.perf_counter()
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
            optimizer.step()
            rates.step()
            recent += value.detach()
            progress.advance(task)
            if step % every == 0 or step == steps:
                since = step - (curve[-1]["step"] if curve else 0)
                mean = float(recent) / since  # waits for the device
                seconds = (time.perf_counter() - start) / since
                model.eval()
                with torch.no_grad():
                    figure = evaluate()
                model.train()
                curve.append({"step": step, "loss": mean, "step_seconds": seconds, "value": figure})
                start = time.perf_counter()
                recent.zero_()
                progress.update(task, value=f"{figure:.3f}")
                if solved(figure):
                    progress.update(task, total=step)
                    break
    return curve
