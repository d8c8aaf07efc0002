"""msrnn_ops.transformers: masks that hide what was stored, and calls that mean something else."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from scans import reference
from test_transformers import (
    GREEDY,
    POLICIES,
    RENAMED,
    Oracle,
    generation,
    given,
    kept,
    left_padded,
    make,
    transformers,
)
from torch import Tensor

import msrnn_ops as ms
from msrnn_ops import transformers as ours
from msrnn_ops.transformers import MultiStateCache

__all__ = ["generation"]  # a fixture for all tests


def positions(mask: Tensor, new: int) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]


# The number of new tokens of each call, of which the second row pauses in one.
CALLS = [9, 1, 3, 1, 1, 4, 1, 2, 1]


def hiding(calls: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Tokens and masks of calls that each hide some tokens before, other ones in each row."""
    tokens, mask = left_padded(calls[0], calls[0] - 4)
    made = [(tokens, mask)]
    for new in calls[1:]:
        hidden = torch.rand(mask.shape) < 0.2
        fresh = torch.ones(2, new, dtype=torch.bool)
        fresh[1, 0] = len(made) != 5
        mask = torch.cat([mask & ~hidden, fresh], 1)
        made.append((torch.randint(1, 97, (2, new)), mask))
    return made


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2_sliding"])
def test_what_a_mask_hides_is_not_attended(family: str, backend: str) -> None:
    """Logits of calls of one and of several tokens, against a stock model that keeps all."""
    model = make(family, torch.float64 if backend == "reference" else torch.float32)
    stock = copy.deepcopy(model).double()
    stock.set_attn_implementation("sdpa")
    for name in ("tova", "h2o_head"):
        policy = ms.Policy(50, POLICIES[name].score, scope=POLICIES[name].scope)
        full = transformers.DynamicCache(config=stock.config)
        caches = MultiStateCache(policy, model.config), full
        for tokens, mask in hiding(CALLS):
            new = tokens.shape[1]
            options = {"attention_mask": mask.long(), "position_ids": positions(mask, new)}
            with reference() if backend == "reference" else contextlib.nullcontext():
                found = model(tokens, **options, **given(caches[0])).logits.double()
            exact = stock(tokens, **options, **given(caches[1])).logits
            real = mask[:, -new:]
            limit = 1e-9 if backend == "reference" else 2e-4
            assert (found - exact)[real].abs().max() < limit * exact.abs().max()


@pytest.mark.parametrize("name", POLICIES)
def test_what_a_mask_hides_goes_first(name: str) -> None:
    """Kept positions and logits of a small state, against full attention under a closing mask."""
    model, policy = make("qwen3"), POLICIES[name]
    cache = MultiStateCache(policy, model.config)
    oracles = [Oracle(model, policy) for _ in range(2)]
    stored = torch.zeros(2, 0, dtype=torch.bool)
    for tokens, mask in hiding(CALLS):
        new, before = tokens.shape[1], stored.shape[1]
        for b, oracle in enumerate(oracles):
            hidden = ~mask[b, :before][stored[b]]
            for row in oracle.rows.values():
                row.visible[:, hidden] = False
                row.total[:, hidden] = 0
        at = positions(mask, new)
        with reference():
            logits = model(
                tokens, attention_mask=mask.long(), position_ids=at, **given(cache)
            ).logits
        stored = torch.cat([stored, mask[:, before:]], 1)
        for b, oracle in enumerate(oracles):
            real = mask[b, before:]
            if not real.any():
                continue
            follow = [kept(cache, layer, b) for layer in range(len(cache))]
            exact = oracle.forward(tokens[b, real], follow, at[b, real])
            assert (logits[b, real] - exact).abs().max() < 1e-9 * exact.abs().max()
            for layer, row in oracle.rows.items():
                assert kept(cache, layer, b) == row.kept()


def test_hidden_tokens_make_room() -> None:
    """Positions by hand: a window of 6 after 9 tokens, of which the mask then hides 5 and 7."""
    model = make(dtype=torch.float32)
    cache = MultiStateCache(ms.Policy.window(6), model.config)
    tokens = left_padded(9)[0]
    model(tokens, **given(cache))
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[0, [5, 7]] = 0
    for expected in ([3, 4, 6, 8, 9], [3, 4, 6, 8, 9, 10], [4, 6, 8, 9, 10, 11]):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        model(tokens[:, :1], attention_mask=mask, **given(cache))
        assert [kept(cache, layer, 0) for layer in range(2)] == [[expected]] * 2
    assert cache.layers[0].state.seen.tolist() == [12]


def test_a_mask_follows_the_rows() -> None:
    """Which column stands for which token, after rows were repeated, reordered and selected."""
    model = make(dtype=torch.float32)
    cache = MultiStateCache(ms.Policy.window(20), model.config)
    tokens, mask = left_padded(9, 5)
    model(tokens, attention_mask=mask, **given(cache))
    cache.batch_repeat_interleave(2)  # 0 0 1 1
    cache.reorder_cache(torch.tensor([2, 0, 3, 1]))  # 1 0 1 0
    cache.batch_select_indices(torch.tensor([0, 1]))  # 1 0
    cache = copy.deepcopy(cache)
    mask = torch.nn.functional.pad(mask.flip(0), (0, 1), value=1)
    mask[:, 5] = 0  # the second token of a row of 5, and the sixth of a row of 9
    model(tokens[:, :1], attention_mask=mask, **given(cache))
    assert kept(cache, 0, 0) == [[0, 2, 3, 4, 5]]
    assert kept(cache, 0, 1) == [[0, 1, 2, 3, 4, 6, 7, 8, 9]]
    cache.reset()
    model(tokens, attention_mask=torch.ones_like(tokens), **given(cache))
    assert kept(cache, 0, 0) == [list(range(9))]


def test_a_mask_that_is_changed_in_place() -> None:
    model = make(dtype=torch.float32)
    cache = MultiStateCache(ms.Policy.window(20), model.config)
    tokens, mask = left_padded(9)[0], torch.ones(1, 12, dtype=torch.bool)
    mask[0, 0] = False
    model(tokens, attention_mask=mask[:, :9], **given(cache))
    mask[0, 4] = False  # the fourth that was stored
    model(tokens[:, :1], attention_mask=mask, **given(cache))  # more columns than tokens so far
    assert kept(cache, 1, 0) == [[0, 1, 2, 4, 5, 6, 7, 8]]


@pytest.mark.parametrize("new", [1, 2])
def test_what_was_hidden_cannot_come_back(new: int) -> None:
    model = make("qwen2_sliding", torch.float32)
    tokens, mask = left_padded(9, 5)
    for shown_again in (mask, torch.ones_like(mask)):
        cache = MultiStateCache(POLICIES["tova"], model.config)
        model(tokens, attention_mask=mask, **given(cache))
        fresh = torch.ones(2, new, dtype=torch.bool)
        again = torch.cat([shown_again, fresh], 1)
        again[1, 3] = True
        before = copy.deepcopy(cache)
        with pytest.raises(ValueError, match="a 1 for a token that was hidden"):
            model(tokens[:, :new], attention_mask=again, **given(cache))
        right = torch.cat([mask, fresh], 1)
        results = [
            model(tokens[:, :new], attention_mask=right, **given(x)).logits for x in (cache, before)
        ]
        assert torch.equal(*results)  # the refused call has changed nothing


def test_a_step_without_a_mask_leaves_padding_hidden() -> None:
    model = make(dtype=torch.float32)
    tokens, mask = left_padded(9, 5)
    caches = [MultiStateCache(ms.Policy.tova(50), model.config) for _ in range(2)]
    for cache in caches:
        model(tokens, attention_mask=mask, **given(cache))
    more = torch.nn.functional.pad(mask, (0, 1), value=True)
    at = positions(more, 1)
    found, exact = (
        model(tokens[:, :1], attention_mask=m, position_ids=at, **given(cache)).logits
        for m, cache in zip((None, more), caches, strict=True)
    )
    assert torch.equal(found, exact)


def test_compiled_calls_take_masks() -> None:
    model = make(dtype=torch.float32, num_hidden_layers=1)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    caches = [MultiStateCache(POLICIES["h2o"], model.config) for _ in range(2)]
    for tokens, mask in hiding([9, 1, 1, 1]):
        options = {"attention_mask": mask, "position_ids": positions(mask, tokens.shape[1])}
        logits = [
            f(tokens, **options, **given(c)).logits
            for f, c in zip((model, compiled), caches, strict=True)
        ]
        torch.testing.assert_close(*logits)
    assert torch.equal(caches[0].kept_positions()[0], caches[1].kept_positions()[0])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generate_again_needs_more_tokens(family: str) -> None:
    """generate would feed all of them a second time, behind themselves."""
    model = make(family, torch.float32)
    tokens = left_padded(9)[0]
    cache = MultiStateCache(POLICIES["tova"], model.config)
    model(tokens, **given(cache))
    with pytest.raises((ValueError, IndexError)) as refused:
        model.generate(tokens, **given(cache), **GREEDY)
    if refused.type is IndexError and not RENAMED:
        pytest.skip("this release refuses it by itself")
    assert refused.match(r"9 tokens that follow 9 in the cache.*call cache.reset\(\)")
    one = MultiStateCache(POLICIES["tova"], model.config)
    model(tokens[:, :1], **given(one))
    with pytest.raises(ValueError, match="1 tokens that follow 1"):
        model.generate(tokens[:, :1], **given(one), **GREEDY)
    expected = model.generate(tokens, **given(one.reset() or one), **GREEDY)
    more = torch.cat([tokens, tokens[:, :2]], 1)
    model.generate(more, **given(cache), **GREEDY)  # goes on with the tokens that were not seen
    assert cache.get_seq_length() == 11 + GREEDY["max_new_tokens"] - 1
    cache.reset()
    assert torch.equal(model.generate(tokens, **given(cache), **GREEDY), expected)


@pytest.mark.parametrize("where", ["argument", "generation config", "config"])
def test_generate_without_use_cache_is_refused(where: str) -> None:
    model = make(dtype=torch.float32)
    cache = MultiStateCache(POLICIES["tova"], model.config)
    options = dict(GREEDY)
    if where == "argument":
        options["use_cache"] = False
    elif where == "generation config":
        model.generation_config.use_cache = False
    else:
        model = type(model)(
            transformers.LlamaConfig(**{**model.config.to_dict(), "use_cache": False})
        ).eval()
        model.set_attn_implementation("msrnn")
        cache = MultiStateCache(POLICIES["tova"], model.config)
        if model.generation_config.use_cache:
            pytest.skip("this release takes use_cache from the generation config alone")
    with pytest.raises(ValueError, match=r"use_cache=False.*\(pass use_cache=True\)"):
        model.generate(left_padded(9)[0], **given(cache), **options)


def test_a_forward_call_needs_no_use_cache() -> None:
    """Training checkpoints have use_cache=False; a cache that is passed is used all the same."""
    model = make(dtype=torch.float32)
    tokens = left_padded(9)[0]
    caches = [MultiStateCache(POLICIES["tova"], model.config) for _ in range(2)]
    results = []
    for use_cache, cache in zip((True, False), caches, strict=True):
        for part in tokens.split(3, 1):  # chunks, of which the second is as long as the first
            results.append(model(part, use_cache=use_cache, **given(cache)).logits)
    for first, second in zip(results[:3], results[3:], strict=True):
        assert torch.equal(first, second)


def test_a_chunk_of_padding_is_no_call_before() -> None:
    """The tokens behind it begin at position 0."""
    model = make(dtype=torch.float32)
    tokens, mask = left_padded(12)[0], torch.arange(12)[None] >= 4
    for first in (4, 5):
        cache = MultiStateCache(ms.Policy.tova(20), model.config)
        full = transformers.DynamicCache(config=model.config)
        for part in (slice(0, 4), slice(4, 4 + first), slice(4 + first, 12)):
            seen = mask[:, : part.stop]
            options = {"attention_mask": seen, "position_ids": positions(mask, 12)[:, part]}
            found = model(tokens[:, part], **options, **given(cache)).logits
        model.set_attn_implementation("sdpa")
        exact = model(tokens, attention_mask=mask, position_ids=positions(mask, 12), **given(full))
        model.set_attn_implementation("msrnn")
        last = exact.logits[:, 4 + first :]
        assert (found - last).abs().max() < 1e-4 * last.abs().max()


def test_a_refused_first_call_leaves_the_batch_open() -> None:
    model = make(dtype=torch.float32)
    cache = MultiStateCache(POLICIES["tova"], model.config)
    tokens, mask = left_padded(9, 5)
    with pytest.raises(RuntimeError, match="no gradient"), torch.enable_grad():
        model(tokens, attention_mask=mask, **given(cache))
    model(tokens[1:], attention_mask=mask[1:], **given(cache))
    assert kept(cache, 0, 0) == [list(range(5))]


def test_both_names_of_the_argument() -> None:
    model = make(dtype=torch.float32)
    tokens, results = left_padded(9)[0], []
    for name in ("cache", "past_key_values")[not RENAMED :]:
        cache = MultiStateCache(POLICIES["tova"], model.config)
        if name == "past_key_values" and RENAMED:
            with pytest.warns(FutureWarning, match="Use `cache` instead"):
                results.append(model.generate(tokens, past_key_values=cache, **GREEDY))
                model(tokens[:, :1], past_key_values=cache)
        else:
            results.append(model.generate(tokens, **{name: cache}, **GREEDY))
            model(tokens[:, :1], **{name: cache})
        assert cache.get_seq_length() == 9 + GREEDY["max_new_tokens"]
    assert torch.equal(results[0], results[-1])


def test_the_attention_takes_what_sdpa_takes_by_position() -> None:
    model = make(dtype=torch.float32)
    module = model.model.layers[0].self_attn
    query, (key, value) = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 2, 5, 16)
    for scale in (0.3, 2.0):
        key, value = key.clone(), value.clone()  # those of a cache are marked
        exact = ours.sdpa_attention_forward(module, query, key, value, None, 0.0, scale, True)[0]
        found = ours._attend(module, query, key, value, None, 0.0, scale, True)[0]
        assert torch.equal(found, exact)
        cache = MultiStateCache(ms.Policy.tova(9), model.config)
        held = cache.update(key, value, 0)
        found = ours._attend(module, query, *held, None, 0.0, scale, True)[0]
        torch.testing.assert_close(found, exact)
    cache = MultiStateCache(ms.Policy.tova(9), model.config)
    with pytest.raises(ValueError, match=r"got dropout 0\.5"):
        ours._attend(module, query, *cache.update(key, value, 0), None, 0.5, 0.3)
    with pytest.raises(NotImplementedError, match="got bidirectional"):
        ours._attend(module, query, *cache.update(key, value, 0), None, 0.0, 0.3, False)


@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "gemma3"])
def test_another_batch_is_refused(family: str) -> None:
    model = make(family, torch.float32)
    tokens = left_padded(9, 5)[0]
    cache = MultiStateCache(POLICIES["tova"], model.config)
    model(tokens, **given(cache))
    message = r"batch of 2 rows .* got 3: call cache.reset\(\)"
    with pytest.raises(ValueError, match=message):
        model(torch.ones(3, 1, dtype=torch.long), **given(cache))
    with pytest.raises(ValueError, match=message):
        model(torch.ones(3, 4, dtype=torch.long), **given(cache))
    cache.reset()
    model(torch.ones(3, 4, dtype=torch.long), **given(cache))
    padded = MultiStateCache(POLICIES["tova"], model.config)
    model(tokens, attention_mask=tokens.ne(0), **given(padded))
    with pytest.raises(ValueError, match=message):
        mask = torch.ones(3, 10, dtype=torch.bool)
        model(torch.ones(3, 1, dtype=torch.long), attention_mask=mask, **given(padded))


def test_another_dtype_is_refused() -> None:
    model = make(dtype=torch.float32)
    tokens = left_padded(9)[0]
    cache = MultiStateCache(POLICIES["tova"], model.config)
    model(tokens, **given(cache))
    message = (
        r"MultiStateCache: expected a model in torch\.float32 .* torch\.bfloat16 .*cache.reset\(\)"
    )
    for new in (1, 3):
        with pytest.raises(TypeError, match=message):
            model.bfloat16()(tokens[:, :new], **given(cache))
    cache.reset()
    model(tokens, **given(cache))


@pytest.mark.parametrize("shape", [(9,), (2, 1, 9), (1, 9), (3, 9)])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    model = make(dtype=torch.float32)
    tokens = left_padded(9, 9)[0]
    cache = MultiStateCache(POLICIES["tova"], model.config)
    for mask in (torch.ones(shape), (torch.arange(9) > 2).expand(shape)):
        with pytest.raises(
            ValueError, match=r"MultiStateCache: .* attention_mask .* B = 2, got"
        ) as e:
            model(tokens, attention_mask=mask, **given(cache))
        assert str(shape) in str(e.value)
    model(tokens, attention_mask=torch.ones_like(tokens), **given(cache))


def test_the_config_of_a_smaller_model_is_refused() -> None:
    model = make(dtype=torch.float32, num_hidden_layers=3)
    small = make(dtype=torch.float32).config
    cache = MultiStateCache(POLICIES["tova"], small)
    with pytest.raises(ValueError, match=r"config of this model, got one of 2 .* a layer 2"):
        model(left_padded(9)[0], **given(cache))


def test_offloading_is_refused() -> None:
    cache = MultiStateCache(POLICIES["tova"], make().config)
    for call in (cache.offload, cache.prefetch):
        with pytest.raises(NotImplementedError, match="offloading is not supported"):
            call(0)
