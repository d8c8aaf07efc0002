"""msrnn_ops.transformers: tokens, logits and kept positions of tiny random models."""

from __future__ import annotations

import copy
import doctest
import importlib
import math
import sys
from collections.abc import Iterator
from typing import Any

import masked_attention
import pytest
import torch
import torch.distributed as dist
from scans import reference
from torch import Tensor

import msrnn_ops as ms

transformers = pytest.importorskip("transformers", minversion="5.2")
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402

from msrnn_ops import transformers as ours  # noqa: E402
from msrnn_ops.transformers import MultiStateCache  # noqa: E402

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.3,  # tokens are then not ambiguous
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
MIXED = ["full_attention", "sliding_attention", "full_attention"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_sliding": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen2_sliding": (
        "Qwen2",
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 7}
        | {"layer_types": MIXED},
    ),
    "qwen3": ("Qwen3", {}),
    "gemma3": (
        "Gemma3",
        {"num_hidden_layers": 3, "layer_types": MIXED, "sliding_window": 7}
        | {"query_pre_attn_scalar": 24},
    ),
}
SLOTS = 6
POLICIES = {
    "tova": ms.Policy.tova(SLOTS),
    "tova_head": ms.Policy.tova(SLOTS, scope="head"),
    "tova_protect_last": ms.Policy.tova(SLOTS, protect_last=True),
    "window": ms.Policy.window(SLOTS),
    "window+i": ms.Policy.window_sinks(SLOTS, 2),
    "h2o": ms.Policy.h2o(SLOTS),
    "h2o_head": ms.Policy.h2o(SLOTS, scope="head"),
}
GREEDY = {"do_sample": False, "max_new_tokens": 9}
# What passes a cache: the argument was renamed.
RENAMED = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)


def given(cache: Any) -> dict[str, Any]:
    return {"cache" if RENAMED else "past_key_values": cache}


def make(family: str = "llama", dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    name, options = FAMILIES[family]
    config_class = getattr(
        transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    )
    config = config_class(**{**SIZES, **options, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()
    model.set_attn_implementation("msrnn")
    return model


@pytest.fixture(autouse=True)
def generation() -> Iterator[None]:
    """Without gradients, on one thread: the models are too small to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def left_padded(*lengths: int) -> tuple[Tensor, Tensor]:
    """Random prompts (B, T) of these lengths, and their mask."""
    longest = max(lengths)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return torch.randint(1, SIZES["vocab_size"], mask.shape) * mask, mask


def kept(cache: Any, layer: int, row: int) -> list[list[int]] | None:
    positions = cache.kept_positions()[layer]
    return (
        None if positions is None else [[p for p in g if p >= 0] for g in positions[row].tolist()]
    )


def policies_of(policy: Any, config: Any) -> list[Any]:
    """The policy of each layer; None: it has a sliding window."""
    return [getattr(layer, "policy", None) for layer in MultiStateCache(policy, config).layers]


class Oracle:
    """A stock model of one row with a cache of everything, under the masks that a policy closes."""

    current: Oracle

    def __init__(self, model: Any, policy: Any) -> None:
        self.model = copy.deepcopy(model).double()
        self.model.set_attn_implementation("oracle")
        self.cache = transformers.DynamicCache(config=self.model.config)
        self.rows: dict[int, masked_attention.Row] = {}
        self.policies = policies_of(policy, self.model.config)

    def forward(
        self,
        tokens: Tensor,
        follow: list[list[list[int]] | None],
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits (T, vocabulary) of the row's next tokens (T,)."""
        Oracle.current, self.follow = self, follow
        at = None if position_ids is None else position_ids[None]
        return self.model(tokens[None], position_ids=at, **given(self.cache)).logits[0]

    @staticmethod
    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **rest: Any
    ) -> tuple[Tensor, None]:
        if rest.get("sliding_window") is not None:
            return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **rest)
        self, layer, time = Oracle.current, module.layer_idx, q.shape[2]
        row = self.rows.setdefault(layer, masked_attention.Row(self.policies[layer], k.shape[1]))
        q = q * scaling * q.shape[-1] ** 0.5
        out = row.prompt(q[0], k[0, :, -time:], v[0, :, -time:], self.follow[layer])
        return out.transpose(0, 1)[None].to(q), None


transformers.AttentionInterface.register("oracle", Oracle.attend)
transformers.AttentionMaskInterface.register("oracle", sdpa_mask)


def check_calls(
    model: Any, policy: Any, calls: list[tuple[Tensor, Tensor]], tolerance: float
) -> tuple[Any, list[Tensor]]:
    """Calls of tokens (B, T) and their mask, against an oracle for each row alone.

    Returns the cache, and the oracle's logits of each row's real tokens.
    """
    cache = MultiStateCache(policy, model.config)
    oracles = [Oracle(model, policy) for _ in calls[0][0]]
    exact: list[list[Tensor]] = [[] for _ in oracles]
    mask = torch.zeros(len(oracles), 0, dtype=torch.bool)
    for tokens, new in calls:
        mask = torch.cat([mask, new], 1)
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        logits = model(
            tokens, attention_mask=mask.long(), position_ids=position_ids, **given(cache)
        ).logits
        assert cache.get_seq_length() == mask.shape[1]
        for b, oracle in enumerate(oracles):
            if not new[b].any():
                continue
            follow = [kept(cache, layer, b) for layer in range(len(cache))]
            exact[b].append(oracle.forward(tokens[b, new[b]], follow))
            for layer, row in oracle.rows.items():
                assert kept(cache, layer, b) == row.kept(), f"layer {layer}, row {b}"
            error = (logits[b, new[b]] - exact[b][-1]).abs().max() / exact[b][-1].abs().max()
            assert error < tolerance
    return cache, [torch.cat(x) for x in exact]


def check_generated(family: str, policy: Any) -> None:
    model = make(family)
    prompt, mask = left_padded(14, 9)
    cache = MultiStateCache(policy, model.config)
    both = model.generate(prompt, attention_mask=mask.long(), **given(cache), **GREEDY)
    new = both[:, prompt.shape[1] :]
    assert new.shape[1] == GREEDY["max_new_tokens"]
    steps = [(token[:, None], torch.ones_like(token[:, None], dtype=bool)) for token in new.T[:-1]]
    again, exact = check_calls(model, policy, [(prompt, mask), *steps], 1e-9)
    for b, logits in enumerate(exact):
        chosen = logits[-new.shape[1] :]
        gap = chosen.amax(1) - chosen.gather(1, new[b, :, None])[:, 0]
        assert (gap <= 1e-9 * chosen.abs().max()).all()
        for layer in range(len(cache)):
            assert kept(cache, layer, b) == kept(again, layer, b)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_against_masked_attention(family: str, name: str) -> None:
    """Left-padded rows longer than the state: tokens, logits and kept positions of every step."""
    with reference():
        check_generated(family, POLICIES[name])


# Prompts in chunks, one row not begun; steps; a row that pauses; a second turn, padded inside.
CALLS = [(5, 5, 0), (5, 5, 4), (4, 4, 4), (1, 1, 1), (1, 1, 0), (1, 1, 1), (7, 2, 7), (1, 1, 1)]


def calls() -> list[tuple[Tensor, Tensor]]:
    made = [left_padded(time, *lengths) for time, *lengths in CALLS]
    return [(tokens[1:], mask[1:]) for tokens, mask in made]


@pytest.mark.parametrize("name", POLICIES)
def test_any_calls_against_masked_attention(name: str) -> None:
    with reference():
        check_calls(make("qwen3"), POLICIES[name], calls(), 1e-9)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_kernels_against_masked_attention(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, where rounding in one layer may decide between near scores of the next."""
    monkeypatch.setattr(masked_attention, "NEAR", 1e-2)
    left_padding_only = [left_padded(9, 14), *(left_padded(1, 1) for _ in range(8))]
    chosen = calls() if family == "llama" else left_padding_only
    check_calls(make(family, torch.float32), POLICIES[name], chosen, 1e-3)


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "beams": {**GREEDY, "num_beams": 3, "num_return_sequences": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 9},
    "chunked prefill": {**GREEDY, "prefill_chunk_size": 5},
}


@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
@pytest.mark.parametrize("family", FAMILIES)
def test_enough_slots_equal_the_stock_model(family: str, options: dict[str, Any]) -> None:
    """Token for token, also in a second turn on the same cache."""
    model = make(family)
    prompt, mask = left_padded(14, 9)
    more = torch.randint(1, 97, (2 * options.get("num_return_sequences", 1), 4))
    results = []
    for attention in ("sdpa", "msrnn"):
        model.set_attn_implementation(attention)
        cache = transformers.DynamicCache(config=model.config)
        if attention == "msrnn":
            cache = MultiStateCache(ms.Policy.tova(100), model.config)
        torch.manual_seed(0)
        with reference():
            first = model.generate(prompt, attention_mask=mask.long(), **given(cache), **options)
            both = torch.cat([first, more], 1)
            seen = mask.repeat_interleave(len(first) // 2, 0).long()
            seen = torch.cat([seen, torch.ones_like(both[:, seen.shape[1] :])], 1)
            again = model.generate(both, attention_mask=seen, **given(cache), **GREEDY)
        results.append((first, again))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("name", ["tova", "window+i", "h2o_head"])
def test_beams_keep_their_own_states(name: str) -> None:
    """The score of a beam is that of its tokens alone, whatever rows it has come through."""
    model, beams = make("gemma3"), 4
    prompt, mask = left_padded(14, 9)
    cache = MultiStateCache(POLICIES[name], model.config)
    with reference():
        found = model.generate(
            prompt,
            attention_mask=mask.long(),
            **given(cache),
            **GREEDY,
            num_beams=beams,
            num_return_sequences=beams,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        for i, sequence in enumerate(found.sequences):
            row = mask[i // beams]
            oracle = Oracle(model, POLICIES[name])
            tokens, steps = sequence[: len(row)][row], sequence[len(row) :]
            follow = [None if layer.is_sliding else [[]] * 2 for layer in cache.layers]
            logits = [oracle.forward(tokens, follow)]
            logits += [oracle.forward(token[None], follow) for token in steps[:-1]]
            score = torch.stack([x[-1] for x in logits]).log_softmax(-1)
            score = score.gather(1, steps[:, None]).sum()
            torch.testing.assert_close(found.sequences_scores[i].double(), score, rtol=1e-5, atol=0)


def test_a_row_is_what_it_is_alone() -> None:
    """Padded rows, rows that end early, rows of several samples: tokens and kept positions."""
    model, policy = make("qwen2"), POLICIES["tova"]
    prompt, mask = left_padded(14, 9)
    with reference():
        alone = []
        for tokens, real in zip(prompt, mask, strict=True):
            cache = MultiStateCache(policy, model.config)
            out = model.generate(tokens[None, real], **given(cache), **GREEDY)
            alone.append((out[0, int(real.sum()) :], cache))
        end = next(t for t in alone[0][0].tolist() if t not in alone[1][0].tolist())
        cache = MultiStateCache(policy, model.config)
        both = model.generate(
            prompt, attention_mask=mask.long(), **given(cache), eos_token_id=end, **GREEDY
        )[:, prompt.shape[1] :]
    length = alone[0][0].tolist().index(end) + 1
    assert both[0].tolist() == alone[0][0][:length].tolist() + [0] * (len(both[0]) - length)
    assert torch.equal(both[1], alone[1][0])
    for layer in range(len(cache)):
        assert kept(cache, layer, 1) == kept(alone[1][1], layer, 0)


def test_rows_repeated_selected_and_reordered() -> None:
    model, policy = make("gemma3"), POLICIES["h2o"]
    prompt, mask = left_padded(14, 9)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    caches = [MultiStateCache(policy, model.config) for _ in range(2)]
    rows = torch.tensor([1, 0, 1])
    with reference():
        for cache, chosen in zip(caches, (torch.arange(2), rows), strict=True):
            model(
                prompt[chosen],
                attention_mask=mask[chosen].long(),
                position_ids=position_ids[chosen],
                **given(cache),
            )
        caches[0].batch_repeat_interleave(2)  # 0 0 1 1
        caches[0].reorder_cache(torch.tensor([2, 3, 1, 0]))  # 1 1 0 0
        caches[0].batch_select_indices(torch.tensor([0, 2, 1]))
        step = torch.randint(1, 97, (3, 1))
        mask = torch.cat([mask[rows], torch.ones(3, 1, dtype=torch.bool)], 1)
        logits = [
            model(
                step,
                attention_mask=mask.long(),
                position_ids=mask.sum(1, keepdim=True) - 1,
                **given(cache),
            ).logits
            for cache in caches
        ]
    torch.testing.assert_close(*logits)
    for a, b in zip(*(cache.kept_positions() for cache in caches), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_memory_does_not_grow() -> None:
    model = make("gemma3", torch.float32)
    cache = MultiStateCache(POLICIES["tova"], model.config)
    assert cache.nbytes == 0 and cache.kept_positions() == [None] * 3
    tokens = torch.randint(1, 97, (2, 9))
    model(tokens, **given(cache))
    bytes_of_prompt = cache.nbytes
    window = 2 * cache.layers[1].keys.numel() * 4
    assert bytes_of_prompt == cache.layers[0].state.nbytes * 2 + window
    for token in torch.randint(1, 97, (30, 2, 1)):
        model(token, **given(cache))
        assert cache.nbytes == bytes_of_prompt
    assert cache.get_seq_length() == 39 and cache.kept_positions()[1] is None


def test_steps_of_padded_rows_take_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding in front of the prompt does not make each step a prompt."""
    model = make(dtype=torch.float32)
    cache = MultiStateCache(POLICIES["tova"], model.config)
    prompt, mask = left_padded(14, 9)
    model(prompt, attention_mask=mask.long(), **given(cache))
    monkeypatch.delattr(cache.layers[0], "attend_prompt")
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.bool)], 1)
    model(prompt[:, -1:], attention_mask=mask.long(), **given(cache))


def test_reset_forgets() -> None:
    model = make("gemma3", torch.float32)
    cache = MultiStateCache(POLICIES["h2o"], model.config)
    for rows in (2, 3):
        tokens = torch.randint(1, 97, (rows, 9))
        fresh = MultiStateCache(POLICIES["h2o"], model.config)
        for chunk in tokens.split(4, 1):
            logits = [model(chunk, **given(c)).logits for c in (cache, fresh)]
            assert torch.equal(*logits)
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.nbytes == 0


def test_a_copy_is_independent() -> None:
    """A prompt's cache, copied for each continuation."""
    model = make(dtype=torch.float32)
    cache = MultiStateCache(POLICIES["tova"], model.config)
    model(torch.randint(1, 97, (1, 9)), **given(cache))
    branch, token = copy.deepcopy(cache), torch.tensor([[5]])
    first = model(token, **given(branch)).logits
    assert (branch.get_seq_length(), cache.get_seq_length()) == (10, 9)
    assert torch.equal(model(token, **given(cache)).logits, first)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_state_it_is_sdpa(family: str) -> None:
    """Training, no cache, and transformers' own cache."""
    model = make(family, torch.float32)
    prompt, mask = left_padded(14, 9)
    packed = torch.cat([torch.arange(9), torch.arange(5)])[None].expand(2, -1)
    results = []
    for attention in ("sdpa", "msrnn"):
        model.set_attn_implementation(attention)
        model.zero_grad()
        with torch.enable_grad():
            loss = model(prompt, attention_mask=mask.long(), labels=prompt).loss
            loss.backward()
        gradient = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
        out = [model.generate(prompt, attention_mask=mask.long(), **GREEDY)]
        out += [model.generate(prompt[:1], use_cache=False, **GREEDY)]
        out += [model(prompt, position_ids=packed, use_cache=False).logits]
        results.append([loss.detach(), gradient, *out])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_compile() -> None:
    """Whole forward calls as one graph: one of the prompt, one of every step."""
    model = make(dtype=torch.float32, num_hidden_layers=1)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    caches = [MultiStateCache(POLICIES["tova"], model.config) for _ in range(2)]
    tokens = torch.randint(1, 97, (2, 9))
    for _ in range(6):
        logits = [
            f(tokens, **given(c)).logits for f, c in zip((model, compiled), caches, strict=True)
        ]
        torch.testing.assert_close(*logits)
        tokens = logits[0][:, -1:].argmax(-1)
    assert torch.equal(caches[0].kept_positions()[0], caches[1].kept_positions()[0])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("T5Config", {}, "t5 with an encoder"),
        ("LlamaConfig", {"add_cross_attention": True}, "llama with cross attention"),
        ("Gemma2Config", {}, "gemma2 with attn_logit_softcapping"),
        ("LlamaConfig", {"num_kv_shared_layers": 1}, "layers that share keys"),
        ("BertConfig", {}, r"bert with attention to later tokens \(is_decoder=False\)"),
        ("BloomConfig", {}, "bloom with an attention that transformers cannot replace"),
        ("RwkvConfig", {}, "rwkv with .*cannot replace"),
        ("DogeConfig", {}, "doge with a mask that depends on the values"),
        ("JetMoeConfig", {}, "jetmoe with keys that are repeated behind the cache"),
        ("GptOssConfig", {}, "gpt_oss with learned sinks"),
        ("DeepseekV3Config", {}, "deepseek_v3 with a cache of latents"),
        ("Glm4MoeLiteConfig", {}, "glm4_moe_lite with a cache of latents"),
        ("xLSTMConfig", {}, "xlstm with no attention heads"),
        ("Llama4TextConfig", {}, "llama4_text with layers of chunked_attention"),
    ],
)
def test_models_that_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    config = getattr(transformers, name)(**options)
    with pytest.raises(NotImplementedError, match=message):
        MultiStateCache(POLICIES["tova"], config)


def test_layers_that_are_not_known_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherLayer(ours.DynamicLayer):  # type: ignore[misc]
        pass

    other = transformers.Cache(layers=[OtherLayer()])
    monkeypatch.setattr(ours, "DynamicCache", lambda config: other)
    with pytest.raises(NotImplementedError, match="got OtherLayer in llama"):
        MultiStateCache(POLICIES["tova"], transformers.LlamaConfig())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_policy_for_each_layer(family: str) -> None:
    """Of other sizes and kinds, against masks: tokens, logits and kept positions of every step."""
    model = make(family)
    some = [ms.Policy.tova(5), ms.Policy.h2o(7), ms.Policy.window_sinks(3, 1)]
    some = some[: model.config.num_hidden_layers]
    cache = MultiStateCache(some, model.config)
    with reference():
        check_generated(family, some)
        model.generate(left_padded(14)[0], **given(cache), **GREEDY)
    for policy, positions in zip(
        policies_of(some, model.config), cache.kept_positions(), strict=True
    ):
        assert policy is None if positions is None else positions.shape[-1] == policy.slots
    cache.reset()
    assert [getattr(layer, "policy", None) for layer in cache.layers] == policies_of(
        some, model.config
    )


def test_ways_to_say_the_policy_of_a_layer() -> None:
    llama, gemma = make("llama").config, make("gemma3").config
    a, b = ms.Policy.tova(4), ms.Policy.window(9)
    count = llama.num_hidden_layers
    assert policies_of({0: b, "full_attention": a}, llama) == [b, *[a] * (count - 1)]
    found = policies_of(lambda layer, kind: ms.Policy.tova(5 + layer), llama)
    assert [policy.slots for policy in found] == list(range(5, 5 + count))
    kinds: list[tuple[int, str]] = []
    assert set(policies_of(lambda *layer: kinds.append(layer) or a, gemma)) == {a, None}
    assert kinds and {kind for _, kind in kinds} == {"full_attention"}
    sliding = {i for i, x in enumerate(gemma.layer_types) if x == "sliding_attention"}
    only = [None if i in sliding else b for i in range(gemma.num_hidden_layers)]
    assert policies_of(only, gemma) == only
    wrong: list[tuple[Any, type[Exception], str]] = [
        ([a] * (count + 1), ValueError, f"policies for {count} layers, got {count + 1}"),
        ([a] * (count - 1), TypeError, f"policy of layer {count - 1} .* to be a Policy, got None"),
        ({0: a}, TypeError, r"policy of layer 1 \(full_attention\) to be a Policy, got None"),
        (lambda *_: 3, TypeError, r"policy of layer 0 \(full_attention\) to be a Policy, got int"),
        ("tova", TypeError, "policy of layer 0 .* got str"),
    ]
    for policy, kind, words in wrong:
        with pytest.raises(kind, match=f"MultiStateCache: expected {words}"):
            MultiStateCache(policy, llama)


def test_arguments_that_are_refused() -> None:
    config = make().config
    with pytest.raises(
        TypeError,
        match=r"MultiStateCache: expected policy to be a Policy, or a sequence, .* got int",
    ):
        MultiStateCache(512, config)
    with pytest.raises(TypeError, match="configuration of a model, got NoneType"):
        MultiStateCache(POLICIES["tova"], None)
    config.head_dim = 12
    with pytest.raises(
        ValueError, match=r"MultiStateCache: .* config with a head_dim .* 256, got 12"
    ):
        MultiStateCache(POLICIES["tova"], config)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_another_attention_is_refused(attention: str) -> None:
    model = make()
    model.set_attn_implementation(attention)
    cache = MultiStateCache(POLICIES["tova"], model.config)
    with pytest.raises(RuntimeError, match=f"'msrnn', got '{attention}'.*set_attn_implementation"):
        model.generate(left_padded(9)[0], **given(cache), **GREEDY)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_another_attention_than_that_of_the_config_is_refused(attention: str, family: str) -> None:
    """Also in a model of one layer, where no second one could notice."""
    changes = {"num_hidden_layers": 1} if family == "llama" else {}
    model, other = (make(family, torch.float32, **changes) for _ in range(2))
    model.set_attn_implementation(attention)
    cache = MultiStateCache(POLICIES["tova"], other.config)
    tokens, mask = left_padded(9, 5)
    with pytest.raises(RuntimeError, match=r"the mask of another attention.*model\.config itself"):
        model(tokens, attention_mask=mask, **given(cache))
    model.set_attn_implementation("msrnn")
    model(tokens, attention_mask=mask, **given(cache))


def test_keys_that_do_not_arrive_are_refused() -> None:
    """A model that changes its keys between cache and attention."""
    cache = MultiStateCache(POLICIES["tova"], make().config)
    keys = torch.randn(1, 2, 1, 16)
    cache.update(keys, keys, 0)
    with pytest.raises(RuntimeError, match="changes or bypasses"):
        cache.update(keys, keys, 0)


def test_sharded_heads_are_refused() -> None:
    cache = MultiStateCache(POLICIES["tova"], make().config)
    keys = torch.randn(1, 1, 5, 16)
    with pytest.raises(NotImplementedError, match=r"expected 2 key-value heads .* got 1"):
        cache.update(keys, keys, 0)


def test_learned_sinks_are_refused() -> None:
    """Also in a model that is not known to have them."""
    model = make(dtype=torch.float32)
    cache = MultiStateCache(POLICIES["tova"], model.config)
    keys = cache.update(*torch.randn(2, 1, 2, 3, 16), 0)
    module, query = model.model.layers[0].self_attn, torch.randn(1, 4, 3, 16)
    with pytest.raises(NotImplementedError, match="expected a model without s_aux"):
        ours._attend(module, query, *keys, None, s_aux=torch.zeros(4))


@pytest.mark.parametrize(
    "options",
    [{"prompt_lookup_num_tokens": 2, "eos_token_id": 96}, {"cache_implementation": "static"}],
    ids=["prompt lookup", "static cache"],
)
def test_generation_that_is_refused(options: dict[str, Any]) -> None:
    model = make(dtype=torch.float32)
    cache = MultiStateCache(POLICIES["tova"], model.config)
    prompt = torch.ones(1, 9, dtype=torch.long)
    with pytest.raises((NotImplementedError, ValueError), match=r"not supported|unsupported"):
        model.generate(prompt, **given(cache), **GREEDY, **options)


def test_calls_that_are_refused() -> None:
    model = make("qwen2_sliding", torch.float32, attention_dropout=0.5)
    tokens = left_padded(5)[0]

    def fresh(config: Any = model.config) -> MultiStateCache:
        return MultiStateCache(POLICIES["tova"], config)

    with pytest.raises(RuntimeError, match="no gradient"), torch.enable_grad():
        model(tokens, **given(fresh()))
    with pytest.raises(ValueError, match=r"expected model.eval\(\), got dropout 0.5"):
        model.train()(tokens, **given(fresh()))
    model.eval()
    with pytest.raises(NotImplementedError, match=r"got another mask, \(1, 1, 5, 5\)"):
        mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
        masks = dict.fromkeys(("full_attention", "sliding_attention"), mask)
        model(tokens, attention_mask=masks, **given(fresh()))
    other = make("qwen2_sliding", layer_types=MIXED[1:] + MIXED[1:2]).config
    with pytest.raises(ValueError, match="pass the config of this model"):
        model(tokens, **given(fresh(other)))


def test_a_refused_call_leaves_the_cache_as_it_was() -> None:
    model = make("mistral_sliding", torch.float32, sliding_window=None)
    prompt, mask = left_padded(9, 5)
    expected, cache = (MultiStateCache(POLICIES["tova"], model.config) for _ in range(2))
    with pytest.raises(RuntimeError, match="no gradient"), torch.enable_grad():
        model(prompt, attention_mask=mask, **given(cache))
    assert cache.get_seq_length() == 0
    for one in (expected, cache):
        model(prompt, attention_mask=mask, **given(one))
    with pytest.raises(ValueError, match="batch"):
        model(prompt[:1, :1], **given(cache))
    token, mask = left_padded(1, 1)[0], torch.nn.functional.pad(mask, (0, 1), value=1)
    found, truth = (
        model(token, attention_mask=mask, **given(one)).logits for one in (cache, expected)
    )
    assert torch.equal(found, truth)


def test_an_interrupted_call_is_noticed() -> None:
    model = make("qwen2_sliding", torch.float32)
    prompt = left_padded(9)[0]
    for layer in (1, 2):
        cache = MultiStateCache(POLICIES["tova"], model.config)
        model(prompt, **given(cache))

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = model.model.layers[layer].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(prompt[:, :1], **given(cache))
        hook.remove()
        with pytest.raises(RuntimeError, match="a call was interrupted"):
            model(prompt[:, :1], **given(cache))
        cache.reset()
        model(prompt, **given(cache))
        assert cache.get_seq_length() == 9


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen2_sliding"])
def test_a_call_that_fails_within_a_layer_is_noticed(
    family: str, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the last one, whose keys were the last that the cache was given."""
    model = make(family, torch.float32)
    if layer >= model.config.num_hidden_layers:
        pytest.skip("no such layer")
    cache = MultiStateCache(POLICIES["tova"], model.config)
    prompt = left_padded(9)[0]
    model(prompt, **given(cache))
    failing = cache.layers[layer]
    name = "update" if failing.is_sliding else "attend"

    def fail(*_: Any, **__: Any) -> None:
        if failing.is_sliding:
            failing.cumulative_length += 1  # as transformers does before it needs memory
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as broken:
        broken.setattr(failing, name, fail)
        with pytest.raises(torch.OutOfMemoryError):
            model(prompt[:, :1], **given(cache))
    if layer == 0 and not failing.is_sliding:  # nothing has been stored
        model(prompt[:, :1], **given(cache))
        assert cache.get_seq_length() == 10
        return
    with pytest.raises(RuntimeError, match="a call was interrupted"):
        model(prompt[:, :1], **given(cache))
    cache.reset()
    model(prompt, **given(cache))


def test_a_layer_with_another_backend_or_with_gradients() -> None:
    """What holds for one layer of a call need not hold for the next."""
    model = make(dtype=torch.float32)
    cache, expected = (MultiStateCache(POLICIES["tova"], model.config) for _ in range(2))
    prompt, layer = left_padded(9)[0], model.model.layers[1]
    for one in (cache, expected):
        model(prompt, **given(one))
    inner = layer.forward

    def by_the_reference(*args: Any, **kwargs: Any) -> Any:
        with ms.use_backend("reference"):
            return inner(*args, **kwargs)

    layer.forward = by_the_reference
    found = model(prompt[:, :1], **given(cache)).logits
    layer.forward = inner
    torch.testing.assert_close(found, model(prompt[:, :1], **given(expected)).logits)

    def with_gradients(*args: Any, **kwargs: Any) -> Any:
        with torch.enable_grad():
            return inner(*args, **kwargs)

    layer.forward = with_gradients
    with pytest.raises(RuntimeError, match=r"attend_evict .*has no gradient"):
        model(prompt[:, :1], **given(cache))


@pytest.mark.parametrize("scale", [math.nan, math.inf, 1e300, True])
def test_a_wrong_scale_of_a_layer_is_refused(scale: float) -> None:
    model = make(dtype=torch.float32)
    cache = MultiStateCache(POLICIES["tova"], model.config)
    model(left_padded(9)[0], **given(cache))
    model.model.layers[1].self_attn.scaling = scale
    with pytest.raises((TypeError, ValueError), match="expected scale to be a"):
        model(left_padded(1)[0], **given(cache))


def test_a_second_attention_to_the_same_keys_is_refused() -> None:
    model = make(dtype=torch.float32)
    cache = MultiStateCache(POLICIES["tova"], model.config)
    key, value = torch.randn(2, 1, 2, 3, 16)
    key, value = cache.update(key, value, 0)
    module, query = model.model.layers[0].self_attn, torch.randn(1, 4, 3, 16)
    ours._attend(module, query, key, value, None)
    with pytest.raises(NotImplementedError, match="one attention to each layer's new keys"):
        ours._attend(module, query, key, value, None)


def test_a_copy_notices_another_attention() -> None:
    model = make(dtype=torch.float32)
    cache = MultiStateCache(POLICIES["tova"], model.config)
    model(left_padded(9)[0], **given(cache))
    copied = copy.deepcopy(cache)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="got the mask of another attention"):
        model(left_padded(1)[0], **given(copied))


def test_autocast() -> None:
    model = make(dtype=torch.float32)
    cache = MultiStateCache(ms.Policy.tova(40), model.config)
    full = transformers.DynamicCache(config=model.config)
    prompt, mask = left_padded(9, 5)
    for width in (9, 1, 2):
        with torch.autocast("cpu", torch.bfloat16):
            found = model(prompt[:, :width], attention_mask=mask, **given(cache)).logits
        truth = model(prompt[:, :width], attention_mask=mask, **given(full)).logits
        seen = mask[:, -width:]
        error = (found - truth)[seen].norm() / truth[seen].norm()
        assert error < 0.05
        more = {9: 1, 1: 2, 2: 0}[width]
        mask = torch.nn.functional.pad(mask, (0, more), value=1)
    assert cache.layers[0].state.dtype == torch.bfloat16


def test_a_cache_outlives_inference_mode() -> None:
    model = make(dtype=torch.float32)
    prompt, mask = left_padded(9, 5)
    cache = MultiStateCache(POLICIES["h2o"], model.config)
    with torch.inference_mode():
        model(prompt, attention_mask=mask, **given(cache))
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    assert [kept(cache, 0, row) for row in (0, 3)] == [[[0, 1, 2, 3, 4]], kept(cache, 0, 2)]


def test_a_sliding_mask_that_no_layer_gets_is_no_error() -> None:
    model = make("gemma3", torch.float32, layer_types=["full_attention"] * 3)
    cache = MultiStateCache(ms.Policy.tova(40), model.config)
    prompt, mask = left_padded(9, 5)
    found = model(prompt, attention_mask=mask, **given(cache)).logits
    model.set_attn_implementation("sdpa")
    truth = model(prompt, attention_mask=mask).logits
    torch.testing.assert_close(found[mask], truth[mask], rtol=1e-4, atol=1e-4)


def test_attention_to_later_tokens_is_refused() -> None:
    """By the mask, as for images and in embedding models of Gemma 3; or by the layer."""
    for family, options, message in (
        (
            "gemma3",
            {"use_bidirectional_attention": True},
            r"causal attention with padding, .* got another mask",
        ),
        ("llama", {}, "causal attention, got bidirectional"),
    ):
        model = make(family, torch.float32, **options)
        model.model.layers[0].self_attn.is_causal = False
        cache = MultiStateCache(POLICIES["tova"], model.config)
        with pytest.raises(NotImplementedError, match=message):
            model(left_padded(5)[0], **given(cache))


@pytest.mark.parametrize("found", ["none", "4.57.1"])
def test_import_says_what_is_missing(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old = type(sys)("transformers")
    old.__version__ = found  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", None if found == "none" else old)
    monkeypatch.delitem(sys.modules, "msrnn_ops.transformers")
    with pytest.raises(ImportError, match=rf"{found}: pip install msrnn_ops\[transformers\]"):
        importlib.import_module("msrnn_ops.transformers")


@pytest.mark.skipif(not RENAMED, reason="it uses the newer name of the argument")
def test_documentation_example() -> None:
    with torch.enable_grad():
        result = doctest.testmod(ours, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0 and result.failed == 0


def _sharded_heads(rank: int) -> None:
    """Query and key-value heads on two ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    torch.manual_seed(0)
    whole = make()
    model = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (2,))
    columns = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, columns | {"self_attn.o_proj": RowwiseParallel()})
    cache = MultiStateCache(POLICIES["tova"], model.config)
    with pytest.raises(NotImplementedError, match="say so by group="):
        model(torch.ones(1, 3, dtype=torch.int64), **given(cache))
    prompts = torch.randint(1, 97, (3, 11))
    prompts[1, :4] = 0
    for name in ("tova", "h2o", "tova_head"):
        cache = MultiStateCache(POLICIES[name], model.config, group=mesh)
        copied = copy.deepcopy(cache)
        expected = MultiStateCache(POLICIES[name], whole.config)
        options = {"inputs": prompts, "attention_mask": prompts.ne(0), **GREEDY}
        with reference():
            tokens = model.generate(**options, **given(cache))
            assert torch.equal(tokens, whole.generate(**options, **given(expected)))
            assert torch.equal(tokens, model.generate(**options, **given(copied)))
        heads = slice(rank, rank + 1) if name == "tova_head" else slice(None)
        kept = zip(cache.kept_positions(), expected.kept_positions(), strict=True)
        assert all(torch.equal(ours, theirs[:, heads]) for ours, theirs in kept)
    with pytest.raises(ValueError, match="expected key-value heads that 2 ranks can share, got 1"):
        MultiStateCache(POLICIES["tova"], make(num_key_value_heads=1).config, group=mesh)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_heads_sharded_over_ranks(run: Any) -> None:
    run(_sharded_heads, ranks=2)
