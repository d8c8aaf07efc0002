"""Every wrong argument: the right exception, naming the argument, what was expected, what came."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import msrnn_ops as ms

x = torch.randn(2, 5, 3)
packed = torch.randn(1, 5, 3)
long = torch.ones(2, 5, 3, dtype=torch.long)
meta = torch.ones(2, 5, 3, device="meta")
other = torch.randn(2, 5, 4)
h0 = torch.randn(2, 3)

CASES: dict[str, tuple[Callable[[], object], type[Exception], list[str]]] = {
    "not a tensor": (lambda: ms.min_gru([1.0], x), TypeError, ["gate", "tensor", "list"]),
    "second not a tensor": (lambda: ms.min_lstm(x, x, None), TypeError, ["candidate", "NoneType"]),
    "shape": (lambda: ms.min_gru(x, other), ValueError, ["candidate", "(2, 5, 3)", "(2, 5, 4)"]),
    "dimensions": (lambda: ms.linear_scan(h0, h0), ValueError, ["a of shape (B, T, D)", "(2, 3)"]),
    "dtype": (lambda: ms.log_scan(x, x.double()), TypeError, ["log_b", "float32", "float64"]),
    "integer": (lambda: ms.decay_scan(long, long), TypeError, ["log_a", "bfloat16", "int64"]),
    "complex": (lambda: ms.linear_scan(x + 0j, x + 0j), TypeError, ["a in", "complex64"]),
    "device": (lambda: ms.min_gru(x, meta), ValueError, ["candidate", "device", "cpu", "meta"]),
    "activation": (lambda: ms.min_gru(x, x, activation="tanh"), ValueError, ["'g'", "'tanh'"]),
    "joint size": (lambda: ms.min_gru_joint(x), ValueError, ["divisible by 2", "3"]),
    "joint size 3": (lambda: ms.min_lstm_joint(other), ValueError, ["divisible by 3", "4"]),
    "h0 not a tensor": (lambda: ms.min_gru(x, x, 0.0), TypeError, ["h0", "float"]),
    "h0 shape": (lambda: ms.min_gru(x, x, h0[:1]), ValueError, ["h0", "(2, 3)", "(1, 3)"]),
    "h0 dimensions": (lambda: ms.min_gru(x, x, h0[0]), ValueError, ["h0", "(2, 3)", "(3,)"]),
    "h0 dtype": (lambda: ms.min_gru(x, x, h0.half()), TypeError, ["h0", "float32", "float16"]),
    "h0 wide": (
        lambda: ms.min_gru(x.half(), x.half(), h0.double()),
        TypeError,
        ["float16 or torch.float32", "float64"],
    ),
    "h0 device": (lambda: ms.min_gru(x, x, h0.to("meta")), ValueError, ["h0", "device", "meta"]),
    "log_h0 name": (lambda: ms.log_scan(x, x, h0[:1]), ValueError, ["log_h0"]),
    "cu_seqlens not a tensor": (
        lambda: ms.linear_scan(packed, packed, cu_seqlens=[0, 5]),
        TypeError,
        ["cu_seqlens", "list"],
    ),
    "cu_seqlens dtype": (
        lambda: ms.linear_scan(packed, packed, cu_seqlens=torch.tensor([0.0, 5.0])),
        TypeError,
        ["cu_seqlens", "int32 or int64", "float32"],
    ),
    "cu_seqlens dimensions": (
        lambda: ms.linear_scan(packed, packed, cu_seqlens=torch.tensor([[0, 5]])),
        ValueError,
        ["(N + 1,)", "(1, 2)"],
    ),
    "cu_seqlens empty": (
        lambda: ms.linear_scan(packed, packed, cu_seqlens=torch.tensor([], dtype=torch.long)),
        ValueError,
        ["(N + 1,)", "(0,)"],
    ),
    "cu_seqlens device": (
        lambda: ms.linear_scan(packed, packed, cu_seqlens=torch.tensor([0, 5], device="meta")),
        ValueError,
        ["cu_seqlens", "device", "meta"],
    ),
    "cu_seqlens with a batch": (
        lambda: ms.linear_scan(x, x, cu_seqlens=torch.tensor([0, 5])),
        ValueError,
        ["B = 1", "B = 2"],
    ),
    "cu_seqlens start": (
        lambda: ms.linear_scan(packed, packed, cu_seqlens=torch.tensor([1, 5])),
        ValueError,
        ["start at 0", "got 1"],
    ),
    "cu_seqlens decreasing": (
        lambda: ms.linear_scan(packed, packed, cu_seqlens=torch.tensor([0, 4, 2, 5])),
        ValueError,
        ["not to decrease", "4", "2", "index 2"],
    ),
    "cu_seqlens end": (
        lambda: ms.linear_scan(packed, packed, cu_seqlens=torch.tensor([0, 4])),
        ValueError,
        ["end at T = 5", "got 4"],
    ),
    "h0 of packed sequences": (
        lambda: ms.linear_scan(packed, packed, h0[:1], cu_seqlens=torch.tensor([0, 2, 5])),
        ValueError,
        ["h0", "(2, 3)", "(1, 3)"],
    ),
    "step dimensions": (lambda: ms.min_gru_step(x, x, h0), ValueError, ["gate", "(B, D)"]),
    "step not a tensor": (lambda: ms.min_gru_step(h0, h0, None), TypeError, ["h to be a tensor"]),
    "step state": (lambda: ms.min_lstm_step(h0, h0, h0, h0[:1]), ValueError, ["(2, 3)", "(1, 3)"]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_wrong_arguments(case: tuple[Callable[[], object], type[Exception], list[str]]) -> None:
    call, expected, words = case
    with pytest.raises(expected) as error:
        call()
    assert type(error.value) is expected
    for word in words:
        assert word in str(error.value)


def test_backends() -> None:
    assert ms.backends()["cpu"] == "ok" and ms.backends()["reference"] == "ok"
    assert set(ms.backends()) == {"cuda", "triton", "cpu", "reference"}
    with pytest.raises(ValueError, match="expected a backend among"), ms.use_backend("tpu"):
        pass
    with pytest.raises(ValueError, match="not built"), ms.use_backend("triton"):
        pass
    leaf = x.clone().requires_grad_()
    with ms.use_backend("reference"):
        h = ms.min_gru(leaf, x)
    assert "min_gru" not in type(h.grad_fn).__name__  # PyTorch's own operations, backward too
    h.sum().backward()
    assert leaf.grad is not None
    assert "min_gru" in type(ms.min_gru(leaf, x).grad_fn).__name__
