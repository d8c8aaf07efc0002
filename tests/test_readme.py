"""Every Python example of the pages runs, and what the README claims holds."""

from __future__ import annotations

import copy
import json
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import msrnn_ops as ms
from msrnn_ops import distributed
from msrnn_ops.onnx import decompositions

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FOUND = ("README.md", "CONTRIBUTING.md", "*/README.md", "docs/*.md")
PAGES = [page for pattern in FOUND for page in sorted(ROOT.glob(pattern))]


def examples(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.S | re.M)


def programs() -> Iterator[Any]:
    """The examples of a page are one program; those of the README are one each."""
    for page in PAGES:
        name, found = str(page.relative_to(ROOT)), examples(page)
        if page == README:
            yield from (pytest.param(x, id=f"{name}-{i}") for i, x in enumerate(found))
        elif found:
            yield pytest.param("\n".join(found), id=name)


def save_small_llama(folder: Path) -> None:
    """A model and a tokenizer that reads bytes, as from_pretrained finds them in a folder."""
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    end = "<|endoftext|>"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end
    ).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config)
    model.lm_head.weight.data[0] = 0.0  # so that it never ends
    model.save_pretrained(folder)


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder; the process group that an example leaves behind is closed."""
    monkeypatch.chdir(tmp_path)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def run(program: str) -> None:
    """Runs it with warnings as errors, logged ones too."""
    records, logger = Records(), logging.getLogger("transformers")
    logger.addHandler(records)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec")  # torch's own
            exec(compile(program, "<example>", "exec"), {"__name__": "__main__"})
    finally:
        logger.removeHandler(records)
    assert not records.messages


@pytest.mark.parametrize("program", list(programs()))
def test_example(
    program: str, in_a_folder: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    if "transformers import" in program:
        pytest.importorskip("transformers", minversion="5.24")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        for name in re.findall(r'^name = "(.+)"', program, re.M):
            save_small_llama(Path(name))
    run(program)
    printed = capsys.readouterr().out
    losses = [float(x) for x in re.findall(r", loss ([\d.]+)", printed)]
    if losses:  # the README says how far it falls
        assert losses[0] > 2.5 and losses[-1] < 0.1
        assert "the state of a recurrent network is all that it remembers" in printed
    for prompt in re.findall(r'tokenizer\("(.+?)"', program):
        assert printed.startswith(prompt) and len(printed) > len(prompt) + 10


def test_pages_have_examples() -> None:
    assert len(examples(README)) == 3
    assert all(examples(ROOT / "docs" / f"{name}.md") for name in ("semantics", "distributed"))


def test_links() -> None:
    """What a page links to in this tree is there."""
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_every_public_name_is_documented() -> None:
    text = (ROOT / "docs/api.md").read_text("utf-8")
    listed: dict[str, set[str]] = {}
    for line in text.splitlines():
        if found := re.match(r"\.\. (currentmodule|autofunction|autoclass):: (\S+)", line):
            if found[1] == "currentmodule":
                names = listed.setdefault(found[2], set())
            else:
                names.add(found[2])
    for module in (ms, ms.nn, distributed):
        public = {name for name in module.__all__ if name not in ("__version__", "nn")}
        assert listed[module.__name__] == public


def test_readme_installs_what_the_build_requires() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for requirement in re.findall(r'pip install (".*)', README.read_text("utf-8"))[0].split():
        assert requirement.strip('"') in project


def test_written_out_step() -> None:
    """The step of docs/semantics.md is what the op computes."""
    scope: dict[str, Any] = {"torch": torch}
    exec(next(x for x in examples(ROOT / "docs/semantics.md") if "protected =" in x), scope)
    for policy in (ms.Policy.tova(6, sinks=1), ms.Policy.h2o(6), ms.Policy.window_sinks(6, 2)):
        state = ms.MultiState(policy, batch=1, kv_heads=2, head_dim=8)
        for _ in range(9):
            ms.attend_evict(torch.randn(1, 4, 8), *torch.randn(2, 1, 2, 8), state)
        q, k, v = torch.randn(4, 8), *torch.randn(2, 2, 8)
        keys, values, seen = (getattr(state, x)[0].clone() for x in ("keys", "values", "seen"))
        position, free = state.position[0, 0].clone(), state.free[0, 0].clone()
        total = state.score[0, 0].clone() if state.score.numel() else torch.zeros(7)
        row = (keys, values, position, total, free, seen)
        written_out, freed = scope["step"](q, k, v, *row, policy, 8**-0.5)
        out = ms.attend_evict(q[None], k[None], v[None], state)
        torch.testing.assert_close(written_out, out[0])
        assert freed == state.free[0, 0]


def test_written_out_scans() -> None:
    """So are the steps of its table."""
    scope: dict[str, Any] = {"torch": torch}
    exec("phi = lambda x: torch.where(x >= 0, x + 0.5, torch.sigmoid(x))", scope)
    page = (ROOT / "docs/semantics.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)\(([\w, ]+)\)` \| `(.+)` \|$", page, re.M)
    steps = [(name, inputs.split(", "), step) for name, inputs, step in rows if "[:, t]" in step]
    assert len(steps) == 5
    for name, (*inputs, _), step in steps:
        tensors = [torch.randn(2, 5, 3, dtype=torch.float64) for _ in inputs]
        state = torch.randn(2, 3, dtype=torch.float64)
        scope |= dict(zip(inputs, tensors, strict=True)) | {"h": state}
        h = getattr(ms, name)(*tensors, state)
        for t in range(5):
            exec(f"t = {t}; {step}", scope)
            torch.testing.assert_close(h[:, t], scope["h"])


def test_figures() -> None:
    """The README's figures are those of bench/results."""
    results = json.loads((ROOT / "bench/results/cpu.json").read_text())
    states, characters = (
        json.loads((ROOT / f"bench/results/papers-{name}.json").read_text())["result"]
        for name in ("states", "characters")
    )

    def of(part: str, **keys: object) -> dict[str, Any]:
        return next(x for x in results[part] if keys.items() <= x.items())

    large = {"dtype": "float32", "backward": True}
    scan = of("ops", op="min_gru", shape=[8, 512, 256], **large)["competitors"]
    step = of("steps", batch=1, slots=2048, dtype="bfloat16")["competitors"]
    heinsen, compiled, associative = (
        scan[name]["time"]["median"] / scan["msrnn_ops"]["time"]["median"]
        for name in ("Heinsen", "Heinsen compiled", "associative scan compiled")
    )
    in_place, official = (
        step[name]["median"] / step["TOVA"]["median"]
        for name in ("in-place PyTorch", "official TOVA steps")
    )
    tensors = [
        of("memory", op="min_gru", competitor=name)["tensors"] for name in ("msrnn_ops", "Heinsen")
    ]
    ours, theirs = (characters["models"][name] for name in ("minGRU", "GRU"))
    faster = theirs["step_seconds"] / ours["step_seconds"]
    loss = [x["curve"][-1]["value"] for x in (ours, theirs)]
    tova, h2o = (states["perplexity"]["policies"][x]["32"] for x in ("TOVA-layer", "H2O-layer"))
    text = README.read_text("utf-8")
    for claim in (
        f"| {heinsen:.0f} times; {compiled:.0f} times as fast |",
        f"| {associative:.1f} times as fast |",
        f"| {tensors[0]:.1f} instead of {tensors[1]:.1f} |",
        f"| {in_place:.1f} times; {official:.0f} times as fast |",
        f"| {faster:.1f} times as fast |",
        f"| **{loss[0]:.3f} instead of {loss[1]:.3f}** |",
        f"| **{tova:.2f} instead of {h2o:.2f}** |",
    ):
        assert claim in text, claim


def test_differences_from_torch() -> None:
    """Each row of the README's table about torch.nn.GRU and torch.nn.LSTM."""
    x = torch.randn(3, 5, 10)
    theirs, ours = nn.GRU(10, 20, batch_first=True), ms.nn.MinGRU(10, 20, batch_first=True)

    theirs(x)[0].relu_().sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ours(x)[0].relu_().sum().backward()
    ours(x)[0].relu().sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        nn.LSTM(10, 20, batch_first=True)(x)[0].relu_().sum().backward()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(theirs)
        with pytest.raises((RuntimeError, torch.jit.frontend.NotSupportedError)):
            torch.jit.script(ours)
        assert torch.equal(torch.jit.trace(ours, (x,))(x)[0], ours(x)[0])
    program = torch.export.export(ours, (x,)).run_decompositions(decompositions())
    torch.testing.assert_close(program.module()(x)[0], ours(x)[0])

    assert len(list(theirs.parameters())) == 4
    assert [name for name, _ in ours.named_parameters()] == ["weight_ih_l0", "bias_ih_l0"]
    assert not hasattr(ours, "weight_hh_l0") and not isinstance(ours, nn.RNNBase)

    with torch.autocast("cpu", torch.bfloat16):
        assert theirs(x)[0].dtype == torch.float32 and ours(x)[0].dtype == torch.bfloat16
        assert nn.LSTM(10, 20)(x)[0].dtype == torch.bfloat16
    theirs_16, ours_16 = (copy.deepcopy(module).bfloat16() for module in (theirs, ours))
    state = torch.zeros(1, 3, 20)
    with pytest.raises(RuntimeError):
        theirs_16(x.bfloat16(), state)
    assert ours_16(x.bfloat16(), state)[1].dtype == torch.float32

    lstm, min_lstm = nn.LSTM(10, 20, batch_first=True), ms.nn.MinLSTM(10, 20, batch_first=True)
    h, c = lstm(x)[1]
    assert not torch.equal(h, c)
    h, c = min_lstm(x, state)[1]
    assert torch.equal(h, c)
    assert theirs(1e5 * x)[0].abs().max() <= 1 < ours(1e5 * x)[0].abs().max()
