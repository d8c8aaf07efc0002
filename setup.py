"""Builds msrnn_ops: one host-only pybind11 module and the CPU operators.

The operators use LibTorch's stable ABI at target 2.11, so one build runs on torch 2.11 and later.
"""

import os
import re
import shutil
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "msrnn_ops/version.py").read_text(), re.M)[1]
TORCH_TARGET = "2.11"
FLAGS = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden"]
CPU_SOURCES = [
    *("scan", "scan_baseline", "scan_avx2", "scan_avx512"),
    *("multi_state", "multi_state_baseline", "multi_state_avx2", "multi_state_avx512"),
    *("multi_state_avx512_bf16", "multi_state_prompt", "multi_state_backward"),
]
SANITIZE = os.environ.get("MSRNN_SANITIZE")  # e.g. address,undefined


class Build(BuildExtension):
    def build_extensions(self) -> None:
        compiler = self.compiler.compiler_cxx[0]
        if shutil.which(compiler) is None:
            sys.exit(f"msrnn_ops: no C++ compiler ({compiler!r} not found); install g++ or set CXX")
        super().build_extensions()


# Checks by call and none of the stack: with both inline the kernels take minutes to compile.
sanitize = [
    f"-fsanitize={SANITIZE}",
    "-fno-sanitize=null,alignment,vptr,object-size",
    "-fno-sanitize-recover=undefined",
    *("--param", "asan-stack=0", "--param", "asan-instrumentation-with-call-threshold=0"),
    "-O1",
]
sanitize = sanitize if SANITIZE else []
setup(
    version=VERSION,
    ext_modules=[
        Pybind11Extension(
            "msrnn_ops._C",
            ["csrc/module.cpp"],
            define_macros=[
                ("MSRNN_VERSION", f'"{VERSION}"'),
                ("MSRNN_TORCH_TARGET", f'"{TORCH_TARGET}"'),
            ],
            extra_compile_args=FLAGS,
        ),
        CppExtension(
            "msrnn_ops._cpu",
            [
                "csrc/ops.cpp",
                *(f"csrc/cpu/{name}.cpp" for name in CPU_SOURCES),
            ],
            define_macros=[
                ("TORCH_TARGET_VERSION", "0x020b000000000000"),
                ("Py_LIMITED_API", "0x030A0000"),
            ],
            extra_compile_args=FLAGS + sanitize,
            extra_link_args=sanitize,
            py_limited_api=True,
        ),
    ],
    cmdclass={"build_ext": Build.with_options(use_ninja=True, no_python_abi_suffix=True)},
)
