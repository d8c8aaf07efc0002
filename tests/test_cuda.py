"""The CUDA side as far as no GPU is needed: the plan, and the library where it was built.

The kernels themselves run on the CPU, by tests/emulation; on a GPU by MSRNN_TEST_DEVICE=cuda.
"""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import output_of

import msrnn_ops as ms
from msrnn_ops._C import scan_plan, step_plan

ROOT = Path(__file__).resolve().parents[1]
BUILT = ms.build_info()["cuda"] is not None
built = pytest.mark.skipif(not BUILT, reason="the CUDA operators were not built")
SHAPES = st.tuples(st.integers(1, 64), st.integers(0, 300_000), st.integers(1, 5000))


@given(shape=SHAPES, size=st.sampled_from([2, 4, 8]), backward=st.booleans())
def test_a_plan_covers_its_shape(shape: tuple[int, int, int], size: int, backward: bool) -> None:
    rows, time, channels = shape
    plan = scan_plan(backward, size, *shape)
    assert 32 <= plan["threads"] <= (128 if backward else 256) and plan["threads"] % 32 == 0
    assert plan["tiles"] * plan["tile_steps"] >= time
    assert (plan["tiles"] - 1) * plan["tile_steps"] < time
    blocks = -(-channels // plan["tile_channels"])
    assert plan["chains"] == rows * blocks
    if plan["path"] == "look_back":
        # One warp folds a tile, and tickets and flags have 32 bits.
        assert plan["tile_channels"] <= 32 and plan["chains"] * plan["tiles"] < 2**31
        words = plan["chains"] * plan["tiles"] * plan["tile_channels"] * 3
        assert plan["workspace"] >= words * (8 if size == 8 else 4)
    else:
        assert plan["workspace"] == 0
        assert plan["tiles"] <= 4 or plan["chains"] >= 528


def test_plans_of_known_shapes() -> None:
    assert scan_plan(False, 2, 16, 4096, 2048)["path"] == "walk"
    assert scan_plan(False, 2, 1, 262144, 512)["path"] == "look_back"
    # Small calls are one launch, without memory to clear; a step is a warp a row.
    assert scan_plan(False, 2, 1, 512, 256)["path"] == "walk"
    assert scan_plan(True, 2, 1, 512, 256)["path"] == "walk"
    step = scan_plan(False, 2, 8, 1, 1024)
    assert (step["threads"], step["tile_channels"], step["tiles"]) == (32, 256, 1)


@given(
    rows=st.integers(1, 300),
    kv_heads=st.integers(1, 16),
    sharing=st.integers(1, 16),
    slots=st.integers(2, 200_000),
    head_dim=st.integers(1, 32).map(lambda n: 8 * n),
    element_size=st.sampled_from([2, 4]),
)
def test_a_step_plan_covers_its_state(
    rows: int, kv_heads: int, sharing: int, slots: int, head_dim: int, element_size: int
) -> None:
    heads = kv_heads * sharing
    plan = step_plan(rows, heads, kv_heads, slots, head_dim, element_size)
    block, splits = plan["block_slots"], plan["splits"]
    assert (splits - 1) * block < slots <= splits * block
    assert plan["one_launch"] == (splits <= 264)
    assert 4 * heads * -(-block // 32) * 32 + 16 * 1024 <= 48 * 1024 or block <= 32  # shared memory


def test_step_plans_of_known_shapes() -> None:
    def plan(rows: int, slots: int) -> tuple[int, int, bool]:
        found = step_plan(rows, 32, 8, slots, 128, 2)
        return found["block_slots"], found["splits"], found["one_launch"]

    # Two blocks for each of 132 multiprocessors, or one where more would only exchange more; of
    # many rows, so many that the last multiprocessors finish with the first.
    assert plan(1, 513) == (31, 17, True)
    assert plan(1, 4097) == (32, 129, True)
    assert plan(1, 8193) == (63, 131, True)
    assert plan(1, 65537) == (249, 264, True)
    assert plan(1, 131073) == (249, 527, False)
    assert plan(4, 8193) == (125, 66, True)
    assert plan(16, 1025) == (65, 16, True)
    assert plan(128, 513) == (129, 4, True)


@pytest.mark.skipif(ms.backends()["cuda"] == "ok", reason="CUDA can be used here")
def test_an_unusable_backend_says_why() -> None:
    with pytest.raises(ValueError, match="'cuda' cannot be used"), ms.use_backend("cuda"):
        pass


@built
def test_operators_are_registered_for_cuda() -> None:
    names = ["linear_scan", "decay_scan", "log_scan", "min_gru", "min_lstm"]
    for name in [*names, "min_gru_joint", "min_lstm_joint"]:
        for op in (name, f"{name}_backward"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"msrnn_ops::{op}", "CUDA"), op
    for op in ("attend_evict", "attend_scores", "evict", "attend_sequence"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"msrnn_ops::{op}", "CUDA"), op
    assert ms.build_info()["cuda_archs"]


@built
@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm (binutils)")
def test_cuda_library_needs_no_symbol_that_torch_2_11_lacks() -> None:
    library = next(Path(ms.__file__).parent.glob("_cuda*.so"))
    listed = output_of("nm", "-D", "--undefined-only", str(library))
    known = set((Path(__file__).parent / "torch_2_11_symbols.txt").read_text().split())
    known.add("aoti_torch_get_current_cuda_stream")  # of torch's CUDA library
    shim = set(re.findall(r" U ((?:aoti_)?torch_\S+)", listed))
    # Weak ones may be missing: the words of an error, which torch has from 2.13 on.
    weak = set(re.findall(r" [wv] ((?:aoti_)?torch_\S+)", listed))
    assert weak <= known | {"torch_exception_get_what_without_backtrace"}
    assert shim and shim <= known, sorted(shim - known)
    # nvcc puts an exit where the host calls what is only for the device, and does not always say.
    assert " U exit" not in listed
    assert not re.findall(r" U (_ZN?K?(?:3c10|2at|5torch)\S*|Py\S+|cuda\S+)", listed)


def assembly_without_its_memory(source: str) -> list[str]:
    """The instructions that touch memory, or order what does, and do not tell the compiler."""
    statements = re.findall(r"\basm\b(.*?);\n", source.replace("\\\n", "\n"), re.S)
    touching = re.compile(r'"(ld|st|atom|red|cp|fence|membar)\.')
    return [
        text
        for text in statements
        if touching.search(text) and not ("volatile" in text[:10] and '"memory"' in text)
    ]


def test_assembly_tells_the_compiler_of_its_memory() -> None:
    """Without it nvcc may move other accesses across, though the version at hand does not."""
    source = (ROOT / "csrc/cuda/device.h").read_text()
    assert assembly_without_its_memory(source) == []
    asm = [text for text in re.findall(r"\basm\b.*?;\n", source, re.S) if '"memory"' in text]
    assert len(asm) >= 6
    for text in asm:
        for wrong in (re.sub(' ?: "memory"', "", text), text.replace("asm volatile", "asm")):
            assert wrong != text and assembly_without_its_memory(source.replace(text, wrong))


def test_what_is_verified_is_compiled_as_it_is_built() -> None:
    """The flags of nvcc that decide what a kernel computes: in setup.py and in every rung."""
    rungs = ("setup.py", "tests/emulation/ptx/nvcc.py", "tests/budgets/cuda.py")
    neutral = r"-(Xcompiler|fPIC.*|-threads|c|o|-no-compress|Werror|fatbin|Xptxas|v|gencode.*)"
    found = {}
    for name in rungs:
        tree = ast.parse((ROOT / name).read_text())
        functions = ("compile_kernel", "compile_kernels", "compile_file")
        (function,) = (x for x in tree.body if getattr(x, "name", "") in functions)
        words = {x.value for x in ast.walk(function) if isinstance(x, ast.Constant)}
        flags = (x for x in words if isinstance(x, str) and x.startswith("-"))
        found[name] = {x for x in flags if not re.fullmatch(neutral, x)}
    assert all(flags == {"-std=c++20", "-O3"} for flags in found.values()), found
