"""What PyTorch builds on multi-state attention: mutation, gradients, compile, export, copies."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import fresh_python
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from transforms import ALL, COMPILED, QUICK, Composition, clean_up, compositions

import msrnn_ops as ms
from msrnn_ops.operators import prompt

OPS = torch.ops.msrnn_ops


def in_place_calls() -> dict[str, tuple[object, ...]]:
    """Every op that changes a state, with the arguments of a direct call."""
    state = ms.MultiState(ms.Policy.h2o(6, scope="head"), batch=2, kv_heads=2, head_dim=16)
    for _ in range(9):
        ms.attend_evict(torch.randn(2, 4, 16), *torch.randn(2, 2, 2, 16), state)
    kept, numbers = tuple(state.tensors()), state.policy.numbers
    token = (torch.randn(2, 4, 16), *torch.randn(2, 2, 2, 16))
    tokens = (torch.randn(2, 4, 5, 16), *torch.randn(2, 2, 2, 5, 16), torch.rand(2, 5) > 0.3)
    keys, values, position, score, free, seen, last = kept
    marks = (position, score, free, seen, last)
    rows, ends = torch.tensor([1, -1]), torch.tensor([0, 3, 5], dtype=torch.int32)
    packed = [x[0].transpose(0, 1) for x in tokens[:3]]
    gates = torch.randn(3, 2, 7)
    return {
        "attend_evict": (*token, None, *kept, *numbers, 0.25),
        "attend_evict/rows": (*token, rows, *kept, *numbers, 0.25),
        "attend_scores": (*token, None, keys, values, position, free, seen, 0.25),
        "attend_scores/rows": (
            *(x[:1] for x in token),
            rows[:1],
            keys,
            values,
            position,
            free,
            seen,
            0.25,
        ),
        "evict": (torch.rand(position.shape), None, *marks, *numbers),
        "evict/rows": (torch.rand(position[:1].shape), rows[:1], *marks, *numbers),
        "attend_prompt": (*tokens, None, None, *kept, *numbers, 0.25),
        "attend_prompt/rows": (*tokens, None, rows, *kept, *numbers, 0.25),
        "attend_prompt/packed": (*packed, None, ends, rows, *kept, *numbers, 0.25),
        "store_prompt": (*tokens, None, *kept, *numbers, 0.25),
        "store_prompt/rows": (*tokens, rows, *kept, *numbers, 0.25),
        "min_gru_step": (*gates[:2], torch.randn(4, 7), rows, False),
        "min_lstm_step": (*gates, torch.randn(4, 7), rows, True),
    }


def operator(name: str) -> Any:
    return getattr(OPS, name.split("/")[0])


def sequence_call() -> tuple[object, ...]:
    q, k, v = torch.randn(2, 4, 7, 16), *torch.randn(2, 2, 2, 7, 16)
    return q, k, v, torch.rand(2, 7) > 0.3, 3, True, 1, 0, 0, 0.25


@pytest.mark.parametrize("name", in_place_calls())
def test_opcheck_of_in_place_ops(name: str) -> None:
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator(name).default, in_place_calls()[name], test_utils=tests)


@pytest.mark.parametrize("name", in_place_calls())
def test_in_place_ops_refuse_gradients(name: str) -> None:
    arguments = list(in_place_calls()[name])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(arguments[0], torch.ones_like(arguments[0]))
        with pytest.raises(RuntimeError, match="no forward-mode gradient"):
            operator(name)(dual, *arguments[1:])
    arguments[0].requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient"):
        operator(name)(*arguments)
    with torch.no_grad():
        operator(name)(*arguments)


def test_opcheck_of_attend_sequence() -> None:
    arguments = sequence_call()
    leaves = [x.requires_grad_() if isinstance(x, Tensor) and i < 3 else x
              for i, x in enumerate(arguments)]  # fmt: skip
    torch.library.opcheck(OPS.attend_sequence.default, tuple(leaves))
    leaves[3] = None
    torch.library.opcheck(OPS.attend_sequence.default, tuple(leaves))
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    out, expiry = OPS.attend_sequence(*detached)
    backward = (torch.randn_like(out), *detached[:3], expiry, detached[3], 0.25)
    torch.library.opcheck(OPS.attend_sequence_backward.default, backward)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, expiry: Tensor, valid: Tensor | None = None
) -> Tensor:
    """attend_sequence for its choices, in plain PyTorch."""
    time, sharing = q.shape[2], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(sharing, 1) for x in (k, v))
    step = torch.arange(time)
    visible = (step[:, None] >= step) & (step[:, None] < expiry[:, :, None])
    if visible.shape[1] > 1:
        visible = visible.repeat_interleave(sharing, 1)
    logits = q @ k.mT * q.shape[3] ** -0.5
    real = torch.ones(time, 1).bool() if valid is None else valid[:, None, :, None]
    # A query that is padding sees everything here, so that its softmax is one of numbers.
    weights = logits.masked_fill(~visible & real, -torch.inf).softmax(-1)
    return (weights @ v).where(real, 0)


def small_sequence(
    policy: ms.Policy, kv_heads: int, valid: Tensor | None = None
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]:
    """attend_sequence and masked_attention as functions of one small tensor, and that tensor."""
    into, back = torch.randn(3, 2, 8), torch.randn(8, 2) / 2
    x = torch.randn(1, 2, 4, 2)

    def qkv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x @ into[0], (x @ into[1])[:, :kv_heads], (x @ into[2])[:, -kv_heads:]

    _, expiry = ms.attend_sequence(*qkv(x), policy, valid=valid)

    def ours(x: Tensor) -> Tensor:
        return ms.attend_sequence(*qkv(x), policy, valid=valid)[0] @ back

    return ours, lambda x: masked_attention(*qkv(x), expiry, valid) @ back, x


def check_window(composition: Composition) -> None:
    """Its choices are the same for every input, so it is right in a batch too."""
    valid = torch.tensor([[True, False, True, True]])
    composition.check(*small_sequence(ms.Policy.window(1), kv_heads=1, valid=valid))


@compositions(QUICK)
def test_transforms_of_attend_sequence(composition: Composition) -> None:
    check_window(composition)


@pytest.mark.slow
@compositions(ALL)
def test_every_transform_of_attend_sequence(composition: Composition) -> None:
    check_window(composition)


@pytest.mark.slow
@compositions([x for x in ALL if not any(name.startswith("vmap") for name in x.names)])
def test_every_transform_of_other_policies(composition: Composition) -> None:
    composition.check(*small_sequence(ms.Policy.tova(2, scope="head"), kv_heads=2))
    composition.check(*small_sequence(ms.Policy.h2o(2), kv_heads=1))


@pytest.mark.slow
@compositions(COMPILED)
def test_compiled_transforms_of_attend_sequence(composition: Composition) -> None:
    check_window(composition)


@pytest.mark.parametrize("scope", ["layer", "head"])
def test_vmap_of_attend_sequence_chooses_for_each_row(scope: str) -> None:
    """Over tensors with a batch of their own, some of which are shared; forward and backward."""
    policy = ms.Policy.tova(3, scope=scope)
    q, k, v = torch.randn(2, 5, 4, 9, 8), torch.randn(5, 2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    valid = torch.rand(5, 2, 9) > 0.3

    def one(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        return ms.attend_sequence(q, k, v, policy, valid=valid)

    def loss(*args: Tensor) -> Tensor:
        return one(*args)[0].square().sum()

    rows = [(q[:, i], k[i], v, valid[i]) for i in range(5)]
    outs, expiries = zip(*(one(*row) for row in rows), strict=True)
    got = torch.vmap(one, in_dims=(1, 0, None, 0))(q, k, v, valid)
    assert torch.equal(got[0], torch.stack(outs)) and torch.equal(got[1], torch.stack(expiries))
    grads = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (1, 0, None, 0))(q, k, v, valid)
    for i, row in enumerate(rows):
        leaves = [x.clone().requires_grad_() for x in row[:3]]
        expected = torch.autograd.grad(loss(*leaves, row[3]), leaves)
        for x, y in zip(grads, expected, strict=True):
            torch.testing.assert_close(x[i], y)


@pytest.mark.parametrize("weights", [1 << 25, 2 * 4 * 19 * 7, 1], ids=["whole", "parts", "rows"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_operations_of_attend_sequence_equal_its_kernels(
    weights: int, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many queries meet the keys at once."""
    monkeypatch.setattr(prompt, "_WEIGHTS_AT_ONCE", weights)
    q, k, v = torch.randn(2, 4, 19, 16), *torch.randn(2, 2, 2, 19, 16)
    valid = torch.rand(2, 19) > 0.3 if padded else None
    for policy in (ms.Policy.tova(5), ms.Policy.h2o(5, scope="head")):
        out, expiry = ms.attend_sequence(q, k, v, policy, valid=valid)
        torch.testing.assert_close(prompt.attend_sequence(q, k, v, expiry, valid, 0.25), out)
        backward = (torch.randn_like(out), q, k, v, expiry, valid, 0.25)
        for x, y in zip(
            prompt.attend_sequence_backward(*backward),
            OPS.attend_sequence_backward(*backward),
            strict=True,
        ):
            torch.testing.assert_close(x, y)
            assert x.is_contiguous()


def test_first_derivatives_of_attend_sequence_are_a_kernel() -> None:
    """Also where they are compiled: the plain operations are for what no kernel computes."""
    torch._dynamo.reset()
    inputs = [torch.randn(1, h, 9, 8, requires_grad=True) for h in (4, 2, 2)]
    called: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            called.append(op.name())
            return op(*args, **(kwargs or {}))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ms.attend_sequence(q * 1.0, k, v, ms.Policy.tova(4))[0]

    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        called.clear()
        out = call(*inputs)
        with Watch():
            out.square().sum().backward()
        assert called.count("msrnn_ops::attend_sequence_backward") == 1
        assert not any("softmax" in name for name in called)


def test_attend_sequence_under_autocast_is_differentiated_in_its_dtype() -> None:
    """Not in torch.func, whose transforms bring autocast back for every operation."""
    q, k, v = torch.randn(1, 2, 6, 8), *torch.randn(2, 1, 1, 6, 8)
    policy, device = ms.Policy.window(2), torch.get_default_device().type

    def derivatives() -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level():
            out, _ = ms.attend_sequence(forward_ad.make_dual(q, q.cos()), k, v, policy)
            tangent = forward_ad.unpack_dual(out).tangent
        leaf = q.clone().requires_grad_()
        out, _ = ms.attend_sequence(leaf, k, v, policy)
        (once,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        return tangent, once.detach()

    exact = derivatives()
    with torch.autocast(device, dtype=torch.bfloat16):
        for got, expected in zip(derivatives(), exact, strict=True):
            assert torch.equal(got, expected)


def test_attend_sequence_under_autocast_promotes() -> None:
    """As scans do; a rotary embedding leaves float32 beside 16-bit values."""
    q, k, v = torch.randn(1, 2, 6, 8), *torch.randn(2, 1, 1, 6, 8).bfloat16()
    policy, leaf = ms.Policy.tova(2), k.clone().requires_grad_()
    exact, chosen = ms.attend_sequence(q, k.float(), v.float(), policy)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        out, expiry = ms.attend_sequence(q, leaf, v, policy)
        assert ms.attend_sequence(k, k, v, policy)[0].dtype == torch.bfloat16
    assert torch.equal(out, exact) and torch.equal(expiry, chosen)
    out.sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.functionalize])
def test_reorder_refuses_transforms(transform: Callable[..., Any]) -> None:
    state = ms.MultiState(ms.Policy.window(2), batch=2, kv_heads=1, head_dim=8)
    with pytest.raises(RuntimeError, match=r"reorder: .* a torch\.func transform"):
        transform(lambda index: state.reorder(index))(torch.tensor([[0, 1], [1, 0]]))


IN_PLACE_TRANSFORMS: dict[str, Callable[..., Any]] = {
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
    "grad": torch.func.grad,
    "vmap": lambda f: lambda x: torch.vmap(f)(x[None]),
    "jacfwd": torch.func.jacfwd,
    "jacrev": torch.func.jacrev,
    "hessian": torch.func.hessian,
    "functional.jacobian": lambda f: lambda x: torch.autograd.functional.jacobian(f, x),
}


@pytest.mark.parametrize("transform", IN_PLACE_TRANSFORMS)
@pytest.mark.parametrize("name", ["attend_evict", "attend_scores", "evict", "attend_prompt"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_transforms_of_what_changes_a_state_are_clear_errors(
    name: str, transform: str, compiled: bool
) -> None:
    torch._dynamo.reset()
    state = ms.MultiState(ms.Policy.tova(3), batch=1, kv_heads=1, head_dim=8)
    token, tokens = torch.randn(1, 1, 8), torch.randn(1, 1, 4, 8)
    calls = {
        "attend_evict": (token, lambda x: ms.attend_evict(x, token, token, state).sum()),
        "attend_scores": (token, lambda x: ms.attend_scores(x, token, token, state)[0].sum()),
        "evict": (torch.rand(1, 1, 4), lambda x: (x.sum(), ms.evict(state, x))[0]),
        "attend_prompt": (tokens, lambda x: ms.attend_prompt(x, tokens, tokens, state).sum()),
    }
    x, function = calls[name]
    run = IN_PLACE_TRANSFORMS[transform](function)
    if compiled:
        run = torch.compile(run, backend="aot_eager")
    before = [t.clone() for t in state.tensors()]
    expected = "torch.vmap cannot" if transform == "vmap" else "gradient"
    try:
        with pytest.raises(RuntimeError, match=f"{name} changes the state in place.*{expected}"):
            run(x)
    finally:
        clean_up()
    for t, old in zip(state.tensors(), before, strict=True):
        assert torch.equal(t.nan_to_num(), old.nan_to_num())


@pytest.mark.parametrize("policy", [ms.Policy.tova(6), ms.Policy.h2o(6, scope="head")], ids=repr)
def test_compiled_decoding(policy: ms.Policy) -> None:
    """A prompt and steps in whole graphs; the state's tensors stay where they are."""
    torch._dynamo.reset()
    one, other = (ms.MultiState(policy, batch=2, kv_heads=2, head_dim=16) for _ in range(2))
    weight = torch.randn(16, 16)

    def prefill(x: Tensor, state: ms.MultiState, valid: Tensor) -> Tensor:
        q = (x @ weight).repeat(1, 2, 1, 1)
        return ms.attend_prompt(q, x, x, state, valid=valid) * 2

    def step(x: Tensor, state: ms.MultiState) -> Tensor:
        return ms.attend_evict((x @ weight).repeat(1, 2, 1), x, x, state) * 2

    valid = torch.rand(2, 11) > 0.3
    x = torch.randn(2, 2, 11, 16)
    addresses = [t.data_ptr() for t in one.tensors()]
    compiled = torch.compile(prefill, fullgraph=True)(x, one, valid)
    torch.testing.assert_close(compiled, prefill(x, other, valid))
    fast = torch.compile(step, fullgraph=True)
    for _ in range(10):
        x = torch.randn(2, 2, 16)
        torch.testing.assert_close(fast(x, one), step(x, other))
        assert torch.equal(one.kept_positions(), other.kept_positions())
    assert addresses == [t.data_ptr() for t in one.tensors()]
    assert torch.equal(one.seen, other.seen) and torch.equal(one.last_evicted, other.last_evicted)


def test_compiled_steps_refuse_gradients() -> None:
    torch._dynamo.reset()
    state = ms.MultiState(ms.Policy.tova(3), batch=1, kv_heads=1, head_dim=8)
    q, k, v = torch.randn(3, 1, 1, 8)
    step = torch.compile(lambda q: ms.attend_evict(q * 1.0, k, v, state))
    with pytest.raises(RuntimeError, match="has no gradient"):
        step(q.requires_grad_())
    assert not state.seen.any()


def test_compiled_attend_sequence() -> None:
    torch._dynamo.reset()

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, expiry = ms.attend_sequence(q * 1.0, k, v, ms.Policy.tova(4))
        return out * 2, expiry

    inputs = [torch.randn(1, h, 9, 8, requires_grad=True) for h in (4, 2, 2)]
    results = []
    for call in (function, torch.compile(function, fullgraph=True)):
        out, expiry = call(*inputs)
        results.append([out, expiry, *torch.autograd.grad(out.square().sum(), inputs)])
    torch.testing.assert_close(*results)


def test_multi_state_is_a_tree_and_can_be_copied() -> None:
    state = ms.MultiState(ms.Policy.h2o(3), batch=2, kv_heads=1, head_dim=8)
    for _ in range(5):
        ms.attend_evict(*torch.randn(3, 2, 1, 8), state)
    leaves, tree = torch.utils._pytree.tree_flatten(state)
    assert len(leaves) == 7
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    copies = [
        torch.utils._pytree.tree_unflatten([x.clone() for x in leaves], tree),
        copy.deepcopy(state),
        pickle.loads(pickle.dumps(state)),
        torch.load(buffer),
        state.to(state.keys.device),
    ]
    token = torch.randn(3, 2, 1, 8)
    expected = ms.attend_evict(*token, state)
    for other in copies:
        assert other.policy == state.policy
        assert torch.equal(ms.attend_evict(*token, other), expected)
        assert torch.equal(other.kept_positions(), state.kept_positions())


def test_changes_in_place_are_seen_by_autograd() -> None:
    state = ms.MultiState(ms.Policy.tova(3), batch=1, kv_heads=1, head_dim=8)
    state.keys.zero_()
    weight = torch.ones(8, requires_grad=True)
    loss = (state.keys * weight).sum()
    ms.attend_evict(*torch.randn(3, 1, 1, 8), state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        inside = ms.MultiState(ms.Policy.tova(3), batch=1, kv_heads=1, head_dim=8)
        ms.attend_evict(*torch.randn(3, 1, 1, 8), inside)


def test_export_with_a_state() -> None:
    class Step(torch.nn.Module):
        def forward(self, x: Tensor, state: ms.MultiState) -> Tensor:
            return ms.attend_evict(x, x, x, state)

    one, other = (
        ms.MultiState(ms.Policy.tova(3), batch=1, kv_heads=2, head_dim=8) for _ in range(2)
    )
    x = torch.randn(1, 2, 8)
    program = torch.export.export(Step(), (x, one))
    for _ in range(5):
        x = torch.randn(1, 2, 8)
        torch.testing.assert_close(program.module()(x, one), ms.attend_evict(x, x, x, other))
    assert torch.equal(one.kept_positions(), other.kept_positions())


def test_an_exported_program_runs_in_a_process_that_imports_the_package(tmp_path: Path) -> None:
    class Attend(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ms.attend_sequence(x, x, x, ms.Policy.tova(2))[0]

    path, x = tmp_path / "program.pt2", torch.ones(1, 1, 5, 8)
    torch.export.save(torch.export.export(Attend(), (x,)), path)
    load = f"program = torch.export.load({str(path)!r})"
    run = "print(program.module()(torch.ones(1, 1, 5, 8)).shape)"
    code = f"import torch, msrnn_ops; {load}; {run}"  # torch does not find the operator alone
    assert fresh_python(code) == "torch.Size([1, 1, 5, 8])"


def test_multi_state_to_reset_repr_nbytes() -> None:
    state = ms.MultiState(ms.Policy.tova(3), batch=2, kv_heads=4, head_dim=16)
    for _ in range(5):
        ms.attend_evict(torch.randn(2, 4, 16), *torch.randn(2, 2, 4, 16), state)
    half = state.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.seen.dtype == torch.int64
    assert torch.equal(half.position, state.position) and half.position is not state.position
    marks = 2 * 4 * 8 + 2 * 8 + 2 * 8 + 2 * 8  # position, free, seen, last_evicted
    assert state.nbytes == 2 * (2 * 4 * 4 * 16 * 4) + marks
    assert half.nbytes == 2 * (2 * 4 * 4 * 16 * 2) + marks
    words = ["attention", "slots=3", "kept [3, 3] of 3", "seen [5, 5]", "bfloat16"]
    for word in (*words, half.keys.device.type):
        assert word in repr(half)
    on_meta = ms.MultiState(ms.Policy.tova(3), batch=2, kv_heads=4, head_dim=16, device="meta")
    assert "meta" in repr(on_meta) and state.to("meta").keys.device.type == "meta"
    with torch.device("meta"):
        assert ms.MultiState(ms.Policy.tova(3), batch=2, kv_heads=4, head_dim=16).seen.is_meta
    state.reset()
    assert state.kept_positions().eq(-1).all() and not state.seen.any()
    fresh = ms.MultiState(ms.Policy.tova(3), batch=2, kv_heads=4, head_dim=16)
    token = torch.randn(2, 4, 16), *torch.randn(2, 2, 4, 16)
    assert torch.equal(ms.attend_evict(*token, state), ms.attend_evict(*token, fresh))
    empty = ms.MultiState(ms.Policy.tova(3), batch=0, kv_heads=4, head_dim=16)
    assert ms.attend_evict(torch.ones(0, 4, 16), *torch.ones(2, 0, 4, 16), empty).shape[0] == 0
    assert "kept []" in repr(empty)


def test_direct_calls_of_multi_state_ops_stay_in_bounds() -> None:
    calls = in_place_calls()
    for name, position in (("attend_evict", 1), ("store_prompt", 2), ("evict", 1)):
        broken = list(calls[name])
        broken[position] = torch.ones(1, 1)
        with pytest.raises(RuntimeError, match="expected"):
            getattr(OPS, name)(*broken)
    arguments = list(calls["attend_evict"])
    for free, seen in ((10**6, 9), (-5, 9), (2, 10**9), (2, -7)):  # a state that somebody broke
        arguments[8] = torch.full((2, 2), free)
        arguments[9] = torch.full((2,), seen)
        assert OPS.attend_evict(*arguments).shape == (2, 4, 16)
    arguments[6] = torch.full((2, 2, 7), 3)
    assert OPS.attend_evict(*arguments).shape == (2, 4, 16)
    broken = ms.MultiState(ms.Policy.window_sinks(40, 39), batch=1, kv_heads=1, head_dim=8)
    broken.position[:] = torch.arange(41) % 39  # more protected states than slots
    ms.attend_prompt(*torch.randn(3, 1, 1, 39, 8), broken)
    headless = (torch.ones(2, 0, 5, 16), *calls["store_prompt"][1:])
    with pytest.raises(RuntimeError, match="multiple"):
        OPS.store_prompt(*headless)


@pytest.mark.parametrize("kind", ["pickle", "pt"])
def test_states_of_0_1_0_are_read(kind: str) -> None:
    """There Policy and MultiState were of msrnn_ops.multi_state; five tokens had been seen."""
    path = Path(__file__).parent / "pickles" / f"state-0.1.0.{kind}"
    policy = ms.Policy.h2o(3, scope="head")
    if kind == "pickle":
        state = pickle.loads(path.read_bytes())
    else:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        state = saved["state"]
        assert saved["policy"] == policy
    assert type(state) is ms.MultiState and state.policy == policy
    assert state.seen.tolist() == [5, 5]
    assert state.kept_positions().tolist() == [[[0, 1, 4]] * 2] * 2
    state = state.to(torch.get_default_device())
    ms.attend_evict(torch.randn(2, 4, 8), *torch.randn(2, 2, 2, 8), state)
    assert state.seen.tolist() == [6, 6]
