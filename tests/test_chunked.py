"""Layers that take time in chunks: the same values and gradients as at once, in less memory."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence

import msrnn_ops as ms
from msrnn_ops.nn import WholeTime
from msrnn_ops.operators import layer as layer_operators

cells = pytest.mark.parametrize("cell", [ms.nn.MinGRU, ms.nn.MinLSTM], ids=lambda x: x.__name__)
TIME, FEATURES, CHANNELS = 23, 5, 6


def pair(cell: type[Any], chunk: int = 4, **options: Any) -> tuple[Any, Any]:
    """A layer at once and one in chunks, with the same weights."""
    options = {"batch_first": True, "dtype": torch.float64, **options}
    whole = cell(FEATURES, CHANNELS, **options)
    chunked = cell(FEATURES, CHANNELS, chunk=chunk, **options)
    chunked.load_state_dict(whole.state_dict())
    return whole, chunked


def flat(results: Any) -> list[Tensor]:
    output, last = results
    return [*(output if isinstance(output, tuple) else [output]), *(
        last if isinstance(last, tuple) else [last]
    )]  # fmt: skip


def outcome(layer: Any, x: Tensor, *args: Any, **options: Any) -> list[Tensor]:
    """Results, and the gradients of input, states and parameters."""
    x = x.detach().requires_grad_()
    leaves = [x, *(arg.detach().requires_grad_() for arg in args), *layer.parameters()]
    results = flat(layer(x, *leaves[1 : 1 + len(args)], **options))
    torch.manual_seed(0)
    total = sum((y * torch.randn_like(y)).sum() for y in results)
    grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [*results, *grads]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def marks(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.4


def given_plain(batch: int, time: int) -> dict[str, Any]:
    return {}


def given_resets(batch: int, time: int) -> dict[str, Any]:
    return {"resets": marks(batch, time)}


def given_valid(batch: int, time: int) -> dict[str, Any]:
    return {"valid": ~marks(batch, time)}


def given_both(batch: int, time: int) -> dict[str, Any]:
    return given_resets(batch, time) | given_valid(batch, time)


@cells
@pytest.mark.parametrize("given", [given_plain, given_resets, given_valid, given_both])
@pytest.mark.parametrize("time", [0, 1, 4, 5, TIME])
@pytest.mark.parametrize("chunk", [1, 4, 9])
def test_the_same_as_at_once(
    cell: type[Any], given: Callable[..., dict[str, Any]], time: int, chunk: int
) -> None:
    for options in (
        {"bidirectional": True},
        {"num_layers": 2, "learnable_h0": True},
        {"bias": False, "activation": "identity"},
    ):
        whole, chunked = pair(cell, chunk, **options)
        x = torch.randn(3, time, FEATURES, dtype=torch.float64)
        steps = given(3, time)
        if "valid" in steps:  # what lies in padding does not count
            x[~steps["valid"]] = torch.nan
        states = torch.randn(len(whole.all_weights), 3, CHANNELS, dtype=torch.float64)
        for args in ((), (states,)):
            expected = outcome(whole, x, *args, **steps)
            assert_same(outcome(chunked, x, *args, **steps), expected)


@cells
@pytest.mark.parametrize("ends", [[0, 23], [0, 4, 8, 23], [0, 3, 3, 9, 16, 23, 23], [2, 2, 11, 20]])
@pytest.mark.parametrize("resetting", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_packed_sequences(
    cell: type[Any], ends: list[int], resetting: bool, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:  # as on a GPU: a chunk is given all sequences
        monkeypatch.setattr(layer_operators._Chunks, "rows", lambda self, part: slice(None))
    whole, chunked = pair(cell, bidirectional=True)
    x = torch.randn(1, TIME, FEATURES, dtype=torch.float64)
    x[:, : ends[0]] = x[:, ends[-1] :] = torch.inf
    steps: dict[str, Any] = {"cu_seqlens": torch.tensor(ends)}
    if resetting:
        steps["resets"] = marks(1, TIME)
    states = torch.randn(2, len(ends) - 1, CHANNELS, dtype=torch.float64)
    for args in ((), (states,)):
        assert_same(outcome(chunked, x, *args, **steps), outcome(whole, x, *args, **steps))
    if not resetting:
        poisoned = x.clone()
        poisoned[:, ends[1] - 1 : ends[1]] = torch.nan  # the first sequence, if it has a step
        results = [flat(layer(poisoned, **steps)) for layer in (chunked, whole)]
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, equal_nan=True)


@cells
def test_borders_that_are_not(cell: type[Any]) -> None:
    whole, chunked = pair(cell)
    x = torch.randn(1, TIME, FEATURES, dtype=torch.float64)
    for ends in ([0, 9, 5, 23], [0, 24], [-1, 23]):
        said = []
        for layer in (whole, chunked):
            with pytest.raises(ValueError, match="expected cu_seqlens") as raised:
                layer(x, cu_seqlens=torch.tensor(ends))
            said.append(str(raised.value))
        assert (
            said[1].startswith(cell.__name__) and said[0].split(":")[1:] == said[1].split(":")[1:]
        )


@cells
def test_other_forms_of_the_input(cell: type[Any]) -> None:
    whole, chunked = pair(cell, bidirectional=True, batch_first=False)
    x = torch.randn(TIME, 3, FEATURES, dtype=torch.float64)
    assert_same(outcome(chunked, x), outcome(whole, x))
    assert_same(outcome(chunked, x[:, 0]), outcome(whole, x[:, 0]))
    packed = pack_padded_sequence(x, torch.tensor([23, 11, 2]))
    (found, last), (expected, other) = chunked(packed), whole(packed)
    assert_same([found.data, *flat((last, ()))], [expected.data, *flat((other, ()))])
    rows = [torch.randn(n, FEATURES, dtype=torch.float64) for n in (7, 13, 1)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    (found, _), (expected, _) = chunked(nested), whole(nested)
    assert_same([found.values()], [expected.values()])
    wide = torch.randn(2, TIME, 3 * FEATURES, dtype=torch.float64)[:, :, FEATURES : 2 * FEATURES]
    whole, chunked = pair(cell)
    assert_same(outcome(chunked, wide), outcome(whole, wide))


@cells
def test_a_block(cell: type[Any]) -> None:
    name = "gru" if cell is ms.nn.MinGRU else "lstm"
    blocks = [ms.nn.MinRNNBlock(8, cell=name, dtype=torch.float64, chunk=n) for n in (None, 5)]
    blocks[1].load_state_dict(blocks[0].state_dict())
    x = torch.randn(2, TIME, 8, dtype=torch.float64)
    found, expected = (block(x, return_state=True) for block in reversed(blocks))
    assert_same([found[0], *found[1]], [expected[0], *expected[1]])


@cells
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(cell: type[Any], dtype: torch.dtype) -> None:
    """In 16 bit a sum over chunks is rounded no more than one over time."""
    exact, _ = pair(cell)
    whole, chunked = pair(cell, dtype=dtype)
    for layer in (exact, whole, chunked):
        layer.load_state_dict(pair(cell, dtype=dtype)[0].state_dict() if layer is exact else
                              exact.state_dict())  # fmt: skip
    x = torch.randn(2, TIME, FEATURES).to(dtype)
    truth = outcome(exact, x.double())
    truth = [b.detach() for b in truth]
    errors = [
        [float((a.detach() - b).norm() / b.norm()) for a, b in zip(one, truth, strict=True)]
        for one in (outcome(whole, x), outcome(chunked, x))
    ]
    unit = torch.finfo(dtype).eps
    assert all(b <= 1.5 * a + unit for a, b in zip(*errors, strict=True)), errors


@cells
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_a_batch_are_not_rounded_twice(cell: type[Any], dtype: torch.dtype) -> None:
    """Each gradient is as exact as that of a layer at once; sums over 16 chunks are wider."""
    exact, _ = pair(cell)
    whole, chunked = pair(cell, 16, dtype=dtype)
    exact.load_state_dict(whole.state_dict())
    x = torch.randn(4, 256, FEATURES).to(dtype)
    truth = [b.detach() for b in outcome(exact, x.double())]
    for a, b, true in zip(outcome(whole, x), outcome(chunked, x), truth, strict=True):
        errors = [float((y.detach() - true).norm() / true.norm()) for y in (a, b)]
        assert errors[1] <= 1.3 * errors[0] + 1e-4, errors


@cells
def test_what_overflows_within_a_chunk(cell: type[Any]) -> None:
    """The gradient of the weights is a sum that float16 holds; those of its chunks are none."""
    whole, chunked = pair(cell, 4, dtype=torch.float16)
    for layer in (whole, chunked):
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)
    x = torch.full((1, 16, FEATURES), 200.0, dtype=torch.float16)
    grad = torch.tensor([200.0, -200.0]).half().repeat_interleave(8)[None, :, None]
    found, expected = (
        torch.autograd.grad(layer(x)[0], layer.weight_ih_l0, grad.expand(1, 16, CHANNELS))[0]
        for layer in (chunked, whole)
    )
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected)


@cells
def test_a_split_sequence_is_the_whole_one_in_16_bit(cell: type[Any]) -> None:
    """States cross the borders of chunks in float32."""
    whole, chunked = pair(cell, 7, dtype=torch.bfloat16, bias=False)
    x = torch.randn(2, 400, FEATURES).bfloat16()
    x[..., 0] = -6.0 if cell is ms.nn.MinGRU else 6.0  # slow gates
    rows = [0] * CHANNELS + [random.randrange(1, FEATURES) for _ in chunked.weight_ih_l0][CHANNELS:]
    with torch.no_grad():
        # Products that are exact, whatever their order.
        chunked.weight_ih_l0.copy_(torch.nn.functional.one_hot(torch.tensor(rows), FEATURES))
        whole.load_state_dict(chunked.state_dict())
        state = torch.zeros(1, 2, CHANNELS)
        (found, last), (expected, other) = chunked(x, state), whole(x, state)
        found, last, expected, other = (
            y[0] if isinstance(y, tuple) else y for y in (found, last, expected, other)
        )
        torch.testing.assert_close(last, other, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found, expected)


@cells
def test_what_is_kept_for_backward(cell: type[Any]) -> None:
    time = 4096
    whole, chunked = (x.float() for x in pair(cell, 64))
    x = torch.randn(1, time, FEATURES)

    def kept(layer: Any) -> int:
        sizes = {}

        def pack(y: Tensor) -> Tensor:
            sizes[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
            return y

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
            layer(x)
        parameters = {y.data_ptr() for y in layer.parameters()}
        return sum(n for place, n in sizes.items() if place not in {*parameters, x.data_ptr()})

    h, states = 4 * time * CHANNELS, 4 * 63 * CHANNELS
    assert kept(chunked) == h + states
    assert kept(whole) >= h * (1 + whole._parts)


@cells
def test_a_nan_stays_where_padding_begins(cell: type[Any]) -> None:
    """A gradient of NaN, too, is 0 in padding, and in what padding is multiplied with."""
    whole, chunked = pair(cell, bidirectional=True)
    x = torch.randn(2, TIME, FEATURES, dtype=torch.float64)
    valid = torch.arange(TIME) < torch.tensor([[TIME], [11]])
    x[1, 7] = torch.nan
    for found, expected in zip(
        outcome(chunked, x, valid=valid), outcome(whole, x, valid=valid), strict=True
    ):
        torch.testing.assert_close(found, expected, equal_nan=True)


@cells
def test_only_what_is_asked_for(cell: type[Any]) -> None:
    whole, chunked = pair(cell)
    x = torch.randn(2, TIME, FEATURES, dtype=torch.float64)
    for frozen in ("weight", "bias", "both", "neither"):
        for layer in (whole, chunked):
            layer.zero_grad()
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(frozen != "both" and not name.startswith(frozen))
        for needs_x in (True, False):
            if frozen == "both" and not needs_x:
                continue
            inputs = [x.clone().requires_grad_(needs_x) for _ in range(2)]
            for layer, given in zip((whole, chunked), inputs, strict=True):
                flat(layer(given))[-1].square().sum().backward()
            if needs_x:
                torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
        for a, b in zip(whole.parameters(), chunked.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None and b.grad is not None:
                torch.testing.assert_close(b.grad, a.grad)


@cells
def test_second_derivatives_and_transforms(cell: type[Any]) -> None:
    whole, chunked = pair(cell)
    x = torch.randn(2, 9, FEATURES, dtype=torch.float64, requires_grad=True)
    parameters = list(chunked.parameters())

    def run(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat(chunked(x))[:2])

    assert torch.autograd.gradgradcheck(run, (x, *parameters))

    def weighted(layer: Any, x: Tensor) -> Tensor:  # states that depend on the input, and hooks
        hx = x.mean((1, 2))[None, :, None].expand(1, -1, CHANNELS)
        y = 2 * x
        y.register_hook(lambda grad: -grad)
        y.retain_grad()
        first, *_ = torch.autograd.grad(
            flat(layer(y, hx))[0].square().sum(), (x, *layer.parameters()), create_graph=True
        )
        return torch.cat([first, *torch.autograd.grad(first.square().sum(), x)])

    expected, found = (weighted(layer, x) for layer in (whole, chunked))
    torch.testing.assert_close(found, expected)

    jacobian = partial(torch.autograd.functional.jacobian, inputs=x)
    one, other = (lambda x, layer=layer: flat(layer(x))[0] for layer in (whole, chunked))
    for vectorize in (False, True):
        expected = jacobian(one, vectorize=vectorize)
        torch.testing.assert_close(jacobian(other, vectorize=vectorize), expected)
    tangent = torch.randn_like(x)
    for transform in (
        lambda f: torch.func.vmap(f)(torch.stack([x.detach(), tangent])),
        lambda f: torch.func.jvp(f, (x.detach(),), (tangent,))[1],
        lambda f: torch.func.grad(lambda x: f(x).square().sum())(x.detach()),
        lambda f: torch.func.hessian(lambda y: f(y).sum())(x.detach()[:1, :5]),
    ):
        torch.testing.assert_close(transform(other), transform(one))
    with forward_ad.dual_level():
        found, expected = (
            forward_ad.unpack_dual(f(forward_ad.make_dual(x.detach(), tangent))).tangent
            for f in (other, one)
        )
        torch.testing.assert_close(found, expected)


@cells
def test_the_reference_and_autocast(cell: type[Any]) -> None:
    whole, chunked = pair(cell)
    x = torch.randn(2, TIME, FEATURES, dtype=torch.float64)
    with ms.use_backend("reference"):
        expected = outcome(chunked, x)
    assert_same(outcome(chunked, x), expected, 1e-10)
    whole, chunked, x = whole.float(), chunked.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        for given in (x, x.bfloat16()):
            found, expected = outcome(chunked, given), outcome(whole, given)
            for a, b in zip(found, expected, strict=True):
                assert a.dtype == b.dtype
                a, b = a.detach().double(), b.detach().double()
                assert float((a - b).norm() / b.norm()) < 0.01
    expected = outcome(whole, x)  # backward is not asked for another dtype than forward had
    output = flat(chunked(given := x.clone().requires_grad_()))
    torch.manual_seed(0)
    total = sum((y * torch.randn_like(y)).sum() for y in output)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(total, given)
    torch.testing.assert_close(found, expected[len(output)])


@cells
@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(cell: type[Any], dynamic: bool) -> None:
    whole, chunked = pair(cell, bidirectional=True, num_layers=2)
    for time in (TIME, 19, 3):
        if not dynamic or time == TIME:
            torch.compiler.reset()
            compiled = torch.compile(chunked, fullgraph=True, dynamic=dynamic)
        x = torch.randn(2, time, FEATURES, dtype=torch.float64)
        assert_same(outcome(compiled, x), outcome(whole, x))
        resets = marks(2, time)
        assert_same(outcome(compiled, x, resets=resets), outcome(whole, x, resets=resets))
    x = torch.randn(1, TIME, FEATURES, dtype=torch.float64)
    steps = {"cu_seqlens": torch.tensor([0, 3, 3, 21])}
    assert_same(outcome(compiled, x, **steps), outcome(whole, x, **steps))
    with torch.no_grad():
        assert_same(flat(compiled(x)), flat(whole(x)))
    for ends in ([0, 24], [-1, 23], [0, 9, 5, 23]):
        with pytest.raises((ValueError, RuntimeError), match="expected cu_seqlens"):
            compiled(x, cu_seqlens=torch.tensor(ends))


@cells
@pytest.mark.slow
def test_who_looks_into_a_layer_sees_a_whole_one(cell: type[Any]) -> None:
    whole, chunked = pair(cell)
    x = torch.randn(1, TIME, FEATURES, dtype=torch.float64)
    tangent = torch.randn_like(x)

    def jvp(layer: Any, x: Tensor, v: Tensor) -> Tensor:
        found: Tensor = torch.func.jvp(lambda x: flat(layer(x))[0], (x,), (v,))[1]
        return found

    expected = jvp(whole, x, tangent)
    for around in ("eager", "aot_eager"):
        torch.compiler.reset()
        compiled = torch.compile(lambda x, v: jvp(chunked, x, v), backend=around)
        torch.testing.assert_close(compiled(x, tangent), expected)
    for around in ("eager", "aot_eager"):
        torch.compiler.reset()
        compiled = torch.compile(lambda x: flat(chunked(x))[0], backend=around)
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(x, tangent)
            found = forward_ad.unpack_dual(compiled(dual)).tangent
        torch.testing.assert_close(found, expected.detach())
    dim = torch.export.Dim("T", min=2, max=4096)
    for time in (3, TIME):
        given = x[:, :time]
        program = torch.export.export(chunked, (given,), dynamic_shapes=({1: dim},))
        assert "layer" not in str(program.graph)
        assert_same(flat(program.module()(x)), flat(whole(x)))
    traced = torch.jit.trace(chunked, (x,), check_trace=False)
    assert "layer" not in str(traced.inlined_graph)


@cells
def test_weights_of_a_type_of_their_own(cell: type[Any]) -> None:
    class Mine(Tensor):
        calls = 0

        @classmethod
        def __torch_function__(
            cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if function is torch.nn.functional.linear:
                cls.calls += 1
            return super().__torch_function__(function, types, args, kwargs or {})

    whole, chunked = pair(cell)
    x = torch.randn(1, TIME, FEATURES, dtype=torch.float64)
    weight = chunked.weight_ih_l0.detach().as_subclass(Mine)  # type: ignore[arg-type]
    chunked.weight_ih_l0 = torch.nn.Parameter(weight, requires_grad=False)
    torch.testing.assert_close(flat(chunked(x))[0].as_subclass(Tensor), flat(whole(x))[0])
    assert Mine.calls == 1


@cells
def test_many_sequences_cost_no_more_than_few(cell: type[Any], monkeypatch: Any) -> None:
    """A chunk is given the sequences that meet it, and not all of them."""
    chunked = pair(cell, 8)[1]
    ends = torch.arange(0, 257, 4)
    operator = layer_operators.LAYERS["msrnn_ops", cell._op.name]
    seen: list[int] = []

    class Counted:
        def forward(self, *args: Any) -> Any:
            seen.append(len(args[2]) - 1)
            return operator_joint.forward(*args)

    operator_joint = operator.joint
    monkeypatch.setattr(operator, "joint", Counted())
    with torch.no_grad():
        chunked(torch.randn(1, 256, FEATURES, dtype=torch.float64), cu_seqlens=ends)
    assert seen == [2] * 32


@cells
def test_shards_of_time_are_scanned_at_once(cell: type[Any], monkeypatch: Any) -> None:
    chunked = pair(cell)[1]
    monkeypatch.setattr(chunked, "time_axis", type("Sharded", (WholeTime,), {"whole": False})())
    monkeypatch.setattr("msrnn_ops.nn.LAYERS", {})
    chunked(torch.randn(1, TIME, FEATURES, dtype=torch.float64))


@cells
def test_a_layer_that_is_copied_and_printed(cell: type[Any]) -> None:
    layer = pair(cell, 4)[1]
    assert "chunk=4" in repr(layer) and "chunk" not in repr(pair(cell)[0])
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.chunk == 4
    old = pickle.loads(pickle.dumps(pair(cell)[0]))
    del old.__dict__["_chunk"]  # of a layer that was pickled without
    old(torch.randn(1, 9, FEATURES, dtype=torch.float64))
    for wrong in (0, -1, 2.0, True, "8"):
        with pytest.raises((TypeError, ValueError), match=f"{cell.__name__}: expected chunk"):
            cell(3, 4, chunk=wrong)
        with pytest.raises((TypeError, ValueError), match=f"{cell.__name__}: expected chunk"):
            layer.chunk = wrong
    layer.chunk = None
    assert "chunk" not in repr(layer)
    for dtype in (torch.complex128, torch.int64):
        said = []
        for one in pair(cell):
            with pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
                one.to(dtype if dtype.is_complex else torch.float64)(torch.ones(1, 9, 5).to(dtype))
            said.append(str(raised.value))
        assert said[0] == said[1]


@pytest.mark.parametrize("name", ["min_gru_layer", "min_lstm_layer"])
def test_the_operators_are_what_they_say(name: str) -> None:
    parts = 2 if "gru" in name else 3
    x = torch.randn(1, 11, FEATURES, requires_grad=True)
    weight = torch.randn(parts * CHANNELS, FEATURES, requires_grad=True)
    bias = torch.randn(parts * CHANNELS, requires_grad=True)
    h0 = torch.randn(1, CHANNELS, requires_grad=True)
    operator = getattr(torch.ops.msrnn_ops, name).default
    for cu_seqlens in (None, torch.tensor([0, 11])):
        for dtype in (torch.float32, torch.bfloat16):
            tensors = [y.detach().to(dtype).requires_grad_() for y in (x, weight, bias)]
            args = (*tensors, h0, cu_seqlens, None, None, random.random() < 0.5, False, 4)
            torch.library.opcheck(operator, args)
