"""What type checkers make of the public functions: ``mypy`` checks it, nothing runs it."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import assert_type

import msrnn_ops as ms
from msrnn_ops import distributed

Pair = tuple[Tensor, Tensor]


def scans(x: Tensor, h: Tensor, either: bool) -> None:
    assert_type(ms.linear_scan(x, x), Tensor)
    assert_type(ms.linear_scan(x, x, h, reverse=True, return_state=True), Pair)
    assert_type(ms.decay_scan(log_a=x, b=x, return_state=False), Tensor)
    assert_type(ms.log_scan(x, x, log_h0=h, return_state=either), Tensor | Pair)
    assert_type(ms.min_gru(x, x, activation="identity", cu_seqlens=h, resets=x), Tensor)
    assert_type(ms.min_gru_joint(x, return_state=True), Pair)
    assert_type(ms.min_lstm(x, x, x, return_state=True), Pair)
    assert_type(ms.min_lstm_joint(x), Tensor)
    assert_type(partial(ms.min_gru, reverse=True)(x, x), Tensor)
    assert_type(ms.min_gru_step(x, x, h), Tensor)
    assert_type(distributed.min_gru(x, x, group=None, return_state=True), Pair)
    assert_type(distributed.log_scan(x, x, group="context"), Tensor)


def attention(x: Tensor, state: ms.MultiState) -> None:
    assert_type(ms.attend_evict(x, x, x, state), Tensor)
    assert_type(ms.attend_scores(x, x, x, state), Pair)
    assert_type(ms.attend_prompt(x, x, x, state), Tensor)
    assert_type(ms.attend_sequence(x, x, x, state.policy), Pair)
    assert_type(distributed.attend_evict(x, x, x, state), Tensor)


def layers(x: Tensor, packed: PackedSequence) -> None:
    gru, lstm, block = ms.nn.MinGRU(4, 4), ms.nn.MinLSTM(4, 4), ms.nn.MinRNNBlock(4)
    assert_type(gru.forward(x), Pair)
    assert_type(gru.forward(packed), tuple[PackedSequence, Tensor])
    assert_type(lstm.forward(x), tuple[Tensor, Pair])
    assert_type(lstm.step(x), tuple[Tensor, Pair])
    assert_type(block.forward(x), Tensor)
    assert_type(block.forward(x, return_state=True), tuple[Tensor, ms.nn.BlockState])
    assert_type(block.forward(x, None, True), tuple[Tensor, ms.nn.BlockState])
    assert_type(gru.forward(x, valid=x, resets=x), Pair)
    assert_type(block.forward(x, cu_seqlens=x), Tensor)
    assert_type(block.forward(packed), PackedSequence)
