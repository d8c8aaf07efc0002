"""Every wrong argument: the right exception, naming the argument, what was expected, what came."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from processes import fresh_python
from torch import Tensor

import msrnn_ops as ms
from msrnn_ops import errors
from msrnn_ops.operators.multi_state import IN_PLACE, SEQUENCES
from msrnn_ops.operators.scan import OPERATORS

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
        ["log_scan: expected reverse and return_state to be bools", "str"],
    ),
    "return_state not a bool": (
        lambda: ms.min_gru_joint(torch.cat([x, x], -1), return_state="no"),
        TypeError,
        ["min_gru_joint: expected reverse and return_state to be bools", "str"],
    ),
    "sparse": (
        lambda: ms.min_gru(x.to_sparse(), x.to_sparse()),
        TypeError,
        ["expected strided tensors, got sparse ones", "msrnn_ops::min_gru"],
    ),
    "cu_seqlens for each element of vmap": (
        lambda: torch.func.vmap(lambda ends: ms.min_gru(packed, packed, cu_seqlens=ends))(
            torch.tensor([[0, 5], [0, 4]])
        ),
        ValueError,
        ["min_gru: expected the same cu_seqlens for the whole batch of torch.vmap"],
    ),
    "resets for each element of vmap, and cu_seqlens": (
        lambda: torch.func.vmap(
            lambda resets: ms.min_gru(
                packed, packed, cu_seqlens=torch.tensor([0, 5]), resets=resets
            )
        )(torch.ones(2, 1, 5, dtype=torch.bool)),
        ValueError,
        ["min_gru: expected the same resets for the whole batch of torch.vmap"],
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
    "protect_last": (
        lambda: ms.Policy.tova(3, protect_last="no"),
        TypeError,
        ["protect_last to be a bool", "str"],
    ),
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
    "scale nan": (
        lambda: ms.attend_evict(q, k, k, kept, scale=float("nan")),
        ValueError,
        ["scale to be a finite", "nan"],
    ),
    "scale inf": (
        lambda: ms.attend_scores(q, k, k, kept, scale=float("inf")),
        ValueError,
        ["scale to be a finite", "inf"],
    ),
    "scale large": (
        lambda: ms.attend_prompt(qs, ks, ks, kept, scale=-1e39),
        ValueError,
        ["scale to be a finite float32", "-1e+39"],
    ),
    "scale of a sequence": (
        lambda: ms.attend_sequence(qs, ks, ks, tova, scale=10**400),
        ValueError,
        ["scale to be a finite", "1000"],
    ),
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


def test_unknown_instruction_sets_are_an_error_of_the_import() -> None:
    """Also those of another machine: silently they would be the slowest."""
    known = ms.build_info()["cpu"]
    code = "import msrnn_ops"
    assert fresh_python(code, MSRNN_CPU_CAPABILITY="") == ""
    assert fresh_python(code, MSRNN_CPU_CAPABILITY=known[-1]) == ""
    for wrong in ("sse", "AVX2", "sve"):
        code = "try:\n    import msrnn_ops\nexcept ValueError as error:\n    print(error)"
        text = fresh_python(code, MSRNN_CPU_CAPABILITY=wrong)
        assert text.startswith("expected MSRNN_CPU_CAPABILITY to be ")
        assert ", ".join(known) in text and text.endswith(f"got '{wrong}'")


def without_end(*shape: int) -> Tensor:
    """A tensor of that shape which has one number in memory."""
    return torch.zeros(1).expand(shape)


large, wide = without_end(1 << 20, 1 << 20, 1 << 8), without_end(1 << 20, 2, 1 << 18, 8)
long_expiry = torch.zeros(1, dtype=torch.long).expand(1 << 20, 1, 1 << 18)
one_row = ms.MultiState(tova, batch=1, kv_heads=1, head_dim=8)
one_token, one_prompt = torch.zeros(1, 1, 8), torch.zeros(1, 1, 1, 8)
ALLOCATIONS: dict[str, Callable[[], object]] = {
    "min_gru": lambda: ms.min_gru(large, large),
    "min_lstm_joint": lambda: ms.min_lstm_joint(without_end(1 << 20, 1 << 20, 3 << 8)),
    "min_gru_backward": lambda: torch.ops.msrnn_ops.min_gru_backward(
        large, None, large, large, large, None, None, None, False, False
    ),
    "attend_evict": lambda: ms.attend_evict(
        without_end(1, 1 << 45, 8), one_token, one_token, one_row
    ),
    "attend_scores": lambda: ms.attend_scores(
        without_end(1, 1 << 45, 8), one_token, one_token, one_row
    ),
    "attend_prompt": lambda: ms.attend_prompt(
        without_end(1, 1 << 45, 1, 8), one_prompt, one_prompt, one_row
    ),
    "attend_sequence": lambda: ms.attend_sequence(wide, wide, wide, tova),
    "attend_sequence_backward": lambda: torch.ops.msrnn_ops.attend_sequence_backward(
        wide, wide, wide, wide, long_expiry, None, 0.5
    ),
}


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_memory_that_is_not_there_is_said_in_the_words_of_torch(name: str) -> None:
    with pytest.raises(RuntimeError) as error:
        ALLOCATIONS[name]()
    text = str(error.value)
    assert "API call failed" not in text and ".h" not in text
    words = "can't allocate memory: you tried to allocate"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13) and words not in text:
        words = 'failed in torch_call_dispatcher( "aten::'
    assert words in text


def test_a_gpu_without_memory_is_an_error_of_the_type_that_trainers_catch() -> None:
    """The words of torch 2.13, in which only the text crosses the stable ABI."""
    words = (
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 15.89 GiB "
        "of which 11.62 GiB is free."
    )
    typed = errors.of_torch(RuntimeError(words))
    assert type(typed) is torch.OutOfMemoryError and str(typed) == words
    for other in (RuntimeError("expected a policy"), torch.OutOfMemoryError(words)):
        assert errors.of_torch(other) is other

    class Kernel:
        """Called by PyTorch's dispatcher or, as ``redispatch_boxed``, straight."""

        def __call__(self, *_: object) -> None:
            raise RuntimeError(words)

        @property
        def _handle(self) -> SimpleNamespace:
            return SimpleNamespace(redispatch_boxed=self)

    kernel = Kernel()
    operator = copy.copy(SEQUENCES["msrnn_ops"])
    step = copy.copy(IN_PLACE["msrnn_ops", "attend_evict"])
    operator.kernel = operator.backward = step.kernel = kernel
    sequence = (qs, ks, ks, None, 4, False, 1, 0, 0, 0.5)
    token = (q, k, k, None, *kept.tensors(), *tova.numbers, 0.5)
    scan = copy.copy(OPERATORS["msrnn_ops", "min_gru"])
    leaf = x.clone().requires_grad_()
    h, _ = scan(leaf, x, None, None, None, False, False)
    scan.forward = scan.backward = kernel  # of the graph above, too
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 20"):
        h.sum().backward()
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 20"):
        scan(leaf, x, None, None, None, False, False)
    with torch.no_grad():
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 20"):
            scan(x, x, None, None, None, False, False)
        for call, arguments in ((operator, sequence), (operator.differentiate, ()), (step, token)):
            with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 20"):
                call(*arguments)
