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
    "dimensions": (lambda: ms.linear_scan(h0[0], h0), ValueError, ["a of shape (B, T, D)", "(3,)"]),
    "dtype": (lambda: ms.log_scan(x, x.double()), TypeError, ["log_b", "float32", "float64"]),
    "integer": (lambda: ms.decay_scan(long, long), TypeError, ["log_a", "bfloat16", "int64"]),
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
        lambda: ms.linear_scan(packed, packed, cu_seqlens=torch.tensor([-1, 5])),
        ValueError,
        ["within 0 to T = 5", "got -1 to 5"],
    ),
    "cu_seqlens decreasing": (
        lambda: ms.linear_scan(packed, packed, cu_seqlens=torch.tensor([0, 4, 2, 5])),
        ValueError,
        ["not to decrease", "4", "2", "index 2"],
    ),
    "cu_seqlens end": (
        lambda: ms.linear_scan(packed, packed, cu_seqlens=torch.tensor([0, 6])),
        ValueError,
        ["within 0 to T = 5", "got 0 to 6"],
    ),
    "resets not a tensor": (
        lambda: ms.decay_scan(x, x, resets=[True]),
        TypeError,
        ["resets", "list"],
    ),
    "resets dtype": (
        lambda: ms.min_gru(x, x, resets=torch.ones(2, 5)),
        TypeError,
        ["resets in torch.bool", "float32"],
    ),
    "resets shape": (
        lambda: ms.min_gru(x, x, resets=torch.ones(2, 3, dtype=torch.bool)),
        ValueError,
        ["resets of shape (B, T) = (2, 5)", "(2, 3)"],
    ),
    "resets device": (
        lambda: ms.min_gru(x, x, resets=torch.ones(2, 5, dtype=torch.bool, device="meta")),
        ValueError,
        ["resets", "device", "meta"],
    ),
    "resets of more dimensions": (
        lambda: ms.min_gru(x[None], x[None], resets=torch.ones(2, 5, dtype=torch.bool)),
        ValueError,
        ["resets of shape (1, 2, 5)", "(2, 5)"],
    ),
    "reverse not a bool": (
        lambda: ms.log_scan(x, x, reverse="yes"),
        TypeError,
        ["log_scan: expected reverse to be a bool", "str"],
    ),
    "activation None": (
        lambda: ms.min_lstm(x, x, x, activation=None),
        ValueError,
        ["min_lstm", "'g' or 'identity'", "None"],
    ),
    "one state for all rows": (
        lambda: ms.min_gru(x, x, h0[0]),
        ValueError,
        ["h0 of shape (2, 3)", "h0.expand(2, -1)"],
    ),
    "one state for all rows of more dimensions": (
        lambda: ms.log_scan(x[None], x[None], h0[0]),
        ValueError,
        ["log_h0 of shape (1, 2, 3)", "log_h0.expand(1, 2, -1)"],
    ),
    "complex decay_scan": (
        lambda: ms.decay_scan(x + 0j, x + 0j),
        TypeError,
        ["decay_scan", "log_a in float32", "complex64"],
    ),
    "a nested tensor": (
        lambda: ms.min_gru_joint(torch.nested.nested_tensor([x[0]], layout=torch.jagged)),
        ValueError,
        ["projection.values()[None]", "cu_seqlens=projection.offsets()"],
    ),
    "step names itself": (
        lambda: ms.min_gru_step(h0, h0.double(), h0),
        TypeError,
        ["min_gru_step: expected candidate in the dtype of gate"],
    ),
    "step dtype of the state": (
        lambda: ms.min_lstm_step(h0, h0, h0, h0.double()),
        TypeError,
        ["min_lstm_step: expected h in torch.float32"],
    ),
    "h0 of packed sequences": (
        lambda: ms.linear_scan(packed, packed, h0[:1], cu_seqlens=torch.tensor([0, 2, 5])),
        ValueError,
        ["h0", "(2, 3)", "(1, 3)"],
    ),
    "step dimensions": (lambda: ms.min_gru_step(x, x, h0), ValueError, ["h of shape (2, 5, 3)"]),
    "step not a tensor": (lambda: ms.min_gru_step(h0, h0, None), TypeError, ["h to be a tensor"]),
    "step state": (lambda: ms.min_lstm_step(h0, h0, h0, h0[:1]), ValueError, ["(2, 3)", "(1, 3)"]),
}

tova = ms.Policy.tova(4)


def state(**changes: object) -> ms.MultiState:
    options = {"batch": 2, "kv_heads": 2, "head_dim": 8}
    return ms.MultiState(tova, **(options | changes))


kept = state()
for _ in range(3):
    ms.attend_evict(torch.ones(2, 4, 8), *torch.ones(2, 2, 2, 8), kept)
q, k = torch.randn(2, 4, 8), torch.randn(2, 2, 8)
qs, ks = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)
loose = state()
loose.keys = loose.keys.transpose(2, 3).contiguous().transpose(2, 3)
elsewhere = state(device="meta")
torn = state()
torn.free = torn.free.to("meta")
double = state(dtype=torch.float64)
scores = torch.zeros(2, 1, 5)
mask = torch.ones(2, 3, dtype=torch.bool)

CASES |= {
    "slots": (lambda: ms.Policy.tova(0), ValueError, ["slots >= 1", "0"]),
    "slots not an int": (lambda: ms.Policy.window(2.5), TypeError, ["slots", "2.5"]),
    "slots bool": (lambda: ms.Policy.window(True), TypeError, ["slots", "True"]),
    "sinks": (lambda: ms.Policy.window_sinks(4, -1), ValueError, ["sinks >= 0", "-1"]),
    "all protected": (lambda: ms.Policy.window_sinks(4, 5), ValueError, ["evict", "5 + 0 > 4"]),
    "all protected 2": (lambda: ms.Policy.tova(2, sinks=2, protect_last=True), ValueError, ["> 2"]),
    "recent": (lambda: ms.Policy.h2o(4, recent=5), ValueError, ["0 + 5 > 4"]),
    "score": (lambda: ms.Policy(4, "age"), ValueError, ["'position'", "'age'"]),
    "scope": (lambda: ms.Policy.tova(4, scope="token"), ValueError, ["'layer'", "'token'"]),
    "policy": (
        lambda: ms.MultiState(512, batch=1, kv_heads=1, head_dim=8),
        TypeError,
        ["Policy", "int"],
    ),
    "batch size": (lambda: state(batch=-1), ValueError, ["batch >= 0", "-1"]),
    "kv_heads": (lambda: state(kv_heads=0), ValueError, ["kv_heads >= 1", "0"]),
    "head_dim 7": (lambda: state(head_dim=7), ValueError, ["multiple of 8", "256", "7"]),
    "head_dim 264": (lambda: state(head_dim=264), ValueError, ["multiple of 8", "256", "264"]),
    "state dtype": (lambda: state(dtype=torch.int8), TypeError, ["float32", "int8"]),
    "state to": (lambda: kept.to(torch.int32), TypeError, ["float32", "int32"]),
    "q not a tensor": (lambda: ms.attend_evict(1, k, k, kept), TypeError, ["q", "int"]),
    "q dimensions": (lambda: ms.attend_evict(qs, k, k, kept), ValueError, ["(B, H, Dh)", "3, 8"]),
    "prompt dimensions": (lambda: ms.attend_prompt(q, k, k, kept), ValueError, ["(B, H, T, Dh)"]),
    "q dtype": (lambda: ms.attend_evict(q.long(), k, k, kept), TypeError, ["q in", "int64"]),
    "half mix": (lambda: ms.attend_evict(q.half(), k, k, kept), TypeError, ["float16", "float32"]),
    "half mix v": (lambda: ms.attend_evict(q, k, k.half(), kept), TypeError, ["v in", "float16"]),
    "half on full": (
        lambda: ms.attend_evict(q.half(), k.half(), k.half(), kept),
        TypeError,
        ["dtype of the state", "float32", "float16"],
    ),
    "v shape": (lambda: ms.attend_evict(q, k, k[:, :1], kept), ValueError, ["v in", "(2, 1, 8)"]),
    "k length": (lambda: ms.attend_prompt(qs, ks[:, :, 1:], ks[:, :, 1:], kept), ValueError, ["k"]),
    "heads": (
        lambda: ms.attend_evict(q[:, :3], k, k, kept),
        ValueError,
        ["multiple", "3 and 2"],
    ),
    "kv heads of the state": (
        lambda: ms.attend_evict(q, k[:, :1], k[:, :1], kept),
        ValueError,
        ["key-value heads of 2", "got 1"],
    ),
    "head_dim of the state": (
        lambda: ms.attend_evict(*torch.randn(3, 2, 2, 16), kept),
        ValueError,
        ["head_dim of 8", "got 16"],
    ),
    "head_dim of a sequence": (
        lambda: ms.attend_sequence(*torch.randn(3, 2, 2, 5, 12), tova),
        ValueError,
        ["multiple of 8", "12"],
    ),
    "batch": (
        lambda: ms.attend_evict(q[:1], k[:1], k[:1], kept),
        ValueError,
        ["batch of 2", "got 1"],
    ),
    "state": (lambda: ms.attend_evict(q, k, k, tova), TypeError, ["MultiState", "Policy"]),
    "state on another device": (
        lambda: ms.attend_evict(q, k, k, elsewhere),
        ValueError,
        ["device of the state", "meta", "cpu"],
    ),
    "state not contiguous": (
        lambda: ms.attend_evict(q, k, k, loose),
        ValueError,
        ["state.keys", "contiguous"],
    ),
    "k on another device": (
        lambda: ms.attend_evict(q, k.to("meta"), k, kept),
        ValueError,
        ["k on the device", "meta"],
    ),
    "float64 on a kernel": (
        lambda: ms.attend_evict(q.double(), k.double(), k.double(), double),
        TypeError,
        ["float64", "reference"],
    ),
    "gradient": (
        lambda: ms.attend_evict(q.clone().requires_grad_(), k, k, kept),
        RuntimeError,
        ["no gradient", "attend_sequence"],
    ),
    "gradient of a prompt": (
        lambda: ms.attend_prompt(qs, ks.clone().requires_grad_(), ks, kept),
        RuntimeError,
        ["no gradient", "attend_sequence"],
    ),
    "scale": (lambda: ms.attend_evict(q, k, k, kept, scale="1"), TypeError, ["scale", "'1'"]),
    "batch not an int": (lambda: state(batch="2"), TypeError, ["batch", "'2'"]),
    "h2o slots": (lambda: ms.Policy.h2o("4"), TypeError, ["slots", "'4'"]),
    "a part on another device": (
        lambda: ms.attend_evict(q, k, k, torn),
        ValueError,
        ["state.free", "cpu", "meta"],
    ),
    "valid dtype": (
        lambda: ms.attend_prompt(qs, ks, ks, kept, valid=mask.int()),
        TypeError,
        ["bool", "int32"],
    ),
    "valid shape": (
        lambda: ms.attend_sequence(qs, ks, ks, tova, valid=mask[:, :2]),
        ValueError,
        ["(B, T) = (2, 3)", "(2, 2)"],
    ),
    "valid device": (
        lambda: ms.attend_prompt(qs, ks, ks, kept, valid=mask.to("meta")),
        ValueError,
        ["valid", "meta"],
    ),
    "sequence policy": (lambda: ms.attend_sequence(qs, ks, ks, 4), TypeError, ["Policy", "int"]),
    "scores dtype": (lambda: ms.evict(kept, scores.double()), TypeError, ["float32", "float64"]),
    "scores shape": (
        lambda: ms.evict(kept, scores[..., 1:]),
        ValueError,
        ["(2, 1, 5)", "(2, 1, 4)"],
    ),
    "scores device": (lambda: ms.evict(kept, scores.to("meta")), ValueError, ["scores", "meta"]),
    "reorder dtype": (lambda: kept.reorder(torch.ones(2)), TypeError, ["int64", "float32"]),
    "reorder not a tensor": (lambda: kept.reorder([0, 1]), TypeError, ["tensor", "list"]),
    "reorder shape": (lambda: kept.reorder(torch.arange(3)), ValueError, ["(2,)", "(3,)"]),
    "reorder range": (lambda: kept.reorder(torch.tensor([0, 2])), ValueError, ["[0, 2)", "2"]),
    "reorder device": (
        lambda: kept.reorder(torch.tensor([0, 1], device="meta")),
        ValueError,
        ["index on cpu", "meta"],
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_wrong_arguments(case: tuple[Callable[[], object], type[Exception], list[str]]) -> None:
    call, expected, words = case
    before = [x.clone() for x in kept.tensors()]
    with pytest.raises(expected) as error:
        call()
    for x, y in zip(kept.tensors(), before, strict=True):  # nothing was written
        assert torch.equal(x.nan_to_num(), y.nan_to_num())
    assert type(error.value) is expected
    for word in words:
        assert word in str(error.value)


def test_backends() -> None:
    assert ms.backends()["cpu"] == "ok" and ms.backends()["reference"] == "ok"
    assert set(ms.backends()) == {"cuda", "triton", "cpu", "reference"}
    with pytest.raises(ValueError, match="expected a backend among"), ms.use_backend("tpu"):
        pass
    leaf = x.clone().requires_grad_()
    with ms.use_backend("reference"):
        h = ms.min_gru(leaf, x)
    assert "min_gru" not in type(h.grad_fn).__name__  # PyTorch's own operations, backward too
    h.sum().backward()
    assert leaf.grad is not None
    assert "min_gru" in type(ms.min_gru(leaf, x).grad_fn).__name__
