"""The built package: its facts, its symbols, its instruction sets, its documentation."""

from __future__ import annotations

import doctest
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from processes import output_of

import msrnn_ops as ms
from msrnn_ops import backend, multi_state, nn, scan, state, version

PACKAGE = Path(ms.__file__).parent
LIBRARY = next(PACKAGE.glob("_cpu*.so"))


def test_build_info() -> None:
    info = ms.build_info()
    assert info["version"] == ms.__version__ == version.__version__
    assert info["torch_target"] == "2.11" and (info["cuda"] is None) == (info["cuda_archs"] == [])
    assert info["compiler"] and "baseline" in info["cpu"]
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm (binutils)")
def test_library_needs_no_symbol_that_torch_2_11_lacks() -> None:
    """Symbols of torch 2.11's C shim are stored in torch_2_11_symbols.txt."""
    known = set((Path(__file__).parent / "torch_2_11_symbols.txt").read_text().split())
    undefined = re.findall(r" U (\S+)", output_of("nm", "-D", "--undefined-only", str(LIBRARY)))
    shim = {name for name in undefined if re.match(r"(aoti_)?torch_", name)}
    assert shim and shim <= known, sorted(shim - known)
    cxx = [name for name in undefined if re.match(r"_ZN?K?(3c10|2at|5torch)", name)]
    assert not cxx, "C++ symbols of torch are not stable"
    assert not [name for name in undefined if name.startswith("Py")]


@pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump (binutils)")
def test_baseline_code_holds_no_wide_instruction() -> None:
    """Every function but those of the avx2 and avx512 namespaces runs on any x86-64."""
    text = output_of("objdump", "-d", "--no-show-raw-insn", "-C", str(LIBRARY))
    wide: dict[str, str] = {}
    names = set()
    for block in text.split("\n\n"):
        head = re.match(r"[0-9a-f]+ <(.*)>:", block.strip())
        if not head:
            continue
        names.add(head[1])
        if re.search(r"msrnn::(avx2|avx512|avx512_bf16)::|_kernels_avx", head[1]):
            continue
        match = re.search(r"\t(v[a-z]\S*\s.*|.*%[yz]mm.*)", block)
        if match:
            wide[head[1]] = match[1]
    assert any("avx512" in name for name in names), "expected symbols in the library"
    assert not wide


CHECK = """
import torch, msrnn_ops as ms
torch.manual_seed(0)
for shape in ((2, 300, 130), (3, 40, 37), (1, 50, 1100)):
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        for name, n in (("linear_scan", 2), ("decay_scan", 2), ("log_scan", 2), ("min_gru", 2),
                        ("min_lstm", 3)):
            x = [torch.randn(shape).to(dtype) for _ in range(n)]
            if not name.startswith("min"):
                x[0] = -x[0].abs()
            x = [v.requires_grad_() for v in x]
            w = torch.randn(shape).to(dtype)
            h = getattr(ms, name)(*x)
            grads = torch.autograd.grad(h, x, w)
            wide = [v.detach().double().requires_grad_() for v in x]
            exact = getattr(ms, name)(*wide)
            exact_grads = torch.autograd.grad(exact, wide, w.double())
            for a, b in zip((h, *grads), (exact, *exact_grads)):
                error = ((a.double() - b).norm() / b.norm()).item()
                assert error <= limit * (8 if name == "log_scan" else 1), (name, dtype, error)

from test_multi_state import *
test_nan_with_a_payload()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for heads in HEADS.values():
        test_steps("tova", heads, dtype)
    for case in LARGE.values():
        test_large_states(case, dtype)
    test_prompts("h2o", 6, str(dtype)[6:])
print("same")
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set(capability: str) -> None:
    has = torch.backends.cpu.get_cpu_capability().lower()
    runs = {"baseline"} | ({"avx2"} if "avx" in has else set())
    runs |= {"avx512"} if "avx512" in has else set()
    runs |= {"avx512_bf16"} if torch.cpu._is_avx512_bf16_supported() else set()
    if capability not in runs:
        pytest.skip(f"this processor has no {capability}")
    tests = str(Path(__file__).parent)
    out = output_of(sys.executable, "-c", CHECK, MSRNN_CPU_CAPABILITY=capability, PYTHONPATH=tests)
    assert out.strip() == "same"


def test_control_register_is_left_as_found() -> None:
    tiny = torch.tensor(1e-40)
    ms.min_gru(torch.randn(1, 3000, 16), torch.randn(1, 3000, 16))
    assert (tiny * 1.0).item() != 0.0


def test_documentation_examples() -> None:
    for module in (scan, multi_state, state, backend, nn):
        result = doctest.testmod(
            module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
        )
        assert result.attempted > 0 and result.failed == 0


def test_importing_loads_neither_triton_nor_optional_packages() -> None:
    code = (
        "import torch, sys; before = set(sys.modules); import msrnn_ops;"
        "print(*(set(sys.modules) - before))"
    )
    loaded = output_of(sys.executable, "-c", code).split()
    assert "msrnn_ops.backend" in loaded
    slow = r"(triton|transformers|matplotlib|rich|pytest|sympy|torch\._dynamo|torch\._inductor)\b"
    assert not [name for name in loaded if re.match(slow, name)]


def with_package(folder: Path, code: str, leave_out: str, **files: str) -> list[str]:
    """What code prints where the package has other files: but for some, and these besides."""
    copy = folder / "msrnn_ops"
    copy.mkdir()
    for path in PACKAGE.iterdir():
        if not path.match(leave_out):
            (copy / path.name).symlink_to(path)
    for name, text in files.items():
        (copy / f"{name}.so").write_text(text)
    first = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    return output_of(sys.executable, "-c", first + code).splitlines()


def test_a_cuda_library_that_cannot_be_loaded_leaves_the_rest_alone(tmp_path: Path) -> None:
    code = """
import torch, msrnn_ops as ms
x = torch.ones(1, 2, 3)
print(ms.linear_scan(x, x).sum())
print(ms.backends()["cuda"])
"""
    total, reason = with_package(tmp_path, code, "_cuda*.so", _cuda="not a library")
    assert total == "tensor(9.)"
    assert reason.startswith(f"its library cannot be loaded with torch {torch.__version__} (")
    assert str(tmp_path) not in reason


def test_a_package_that_was_not_built_says_so(tmp_path: Path) -> None:
    code = """
try:
    import msrnn_ops
except ImportError as error:
    print(error)
"""
    (said,) = with_package(tmp_path, code, "*.so")
    assert said.startswith("msrnn_ops has not been built here: run `pip install -e .")
