"""The stand-in for the CUDA runtime: what it refuses of host code, as CUDA would or does not.

Host code that nvcc compiled makes each mistake (`<wrong|right>`) in a process of its own. What
CUDA answers with an error must be answered so, and what would only go wrong on a GPU must end the
process with code 98 or, of the machine, 99. The same call without the mistake passes.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import ptx_kernels
import pytest
from emulation.ptx import machine, nvcc

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None or not ptx_kernels.AVAILABLE, reason="needs nvcc"
)

# By name: host code, and what is said of its mistake. It has a kernel with static shared memory and
# one of at most 128 threads, a stream, and 64 bytes of memory.
FAULTS = {
    "the null stream": ("kernel<<<1, 32, 0, <0|stream>>>>(memory);", "outside of the caller's"),
    "a cooperative launch in the null stream": (
        "cudaLaunchConfig_t c{}; c.gridDim = 1; c.blockDim = 32; c.stream = <0|stream>;"
        "cudaLaunchKernelEx(&c, kernel, memory);",
        "outside of the caller's stream",
    ),
    "a memset in the null stream": ("cudaMemsetAsync(memory, 0, 64, <0|stream>);", "outside of"),
    "a memset that is too long": ("cudaMemsetAsync(memory, 0, <65|64>, stream);", "out of bounds"),
    "a memset behind memory": ("cudaMemsetAsync(memory + 8, 0, <60|32>, stream);", "out of bounds"),
    "a memset of what is not there": (
        "char here[4]; cudaMemsetAsync(<here|memory>, 0, 4, stream);",
        "out of bounds",
    ),
    "an error that is not taken": (
        "kernel<<<1, 1025, 0, stream>>>(memory); <|cudaGetLastError();>"
        "kernel<<<1, 32, 0, stream>>>(memory);",
        "an earlier call's error",
    ),
    "too many threads": ("kernel<<<1, <1025|1024>, 0, stream>>>(memory); SAY", "error 9"),
    "more threads than a kernel's bounds": ("small<<<1, <160|128>, 0, stream>>>(); SAY", "error 9"),
    "no block": ("kernel<<<<0|1>, 32, 0, stream>>>(memory); SAY", "error 9"),
    "a tall grid": ("small<<<dim3(1, <65536|3>), 32, 0, stream>>>(); SAY", "error 9"),
    "a deep grid": ("small<<<dim3(1, 1, <65536|3>), 32, 0, stream>>>(); SAY", "error 9"),
    "a deep block": ("small<<<1, dim3(1, 1, <65|64>), 0, stream>>>(); SAY", "error 9"),
    "shared memory that nobody allowed": (
        "small<<<1, 32, <49153|49152>, stream>>>(); SAY",
        "error 1",
    ),
    "static shared memory counts": (
        "kernel<<<1, 32, <48641|48640>, stream>>>(memory); SAY",
        "error 1",
    ),
    "more shared memory than was allowed": (
        "allow(small, 50000); small<<<1, 32, <50001|50000>, stream>>>(); SAY",
        "error 1",
    ),
    "another kernel was allowed": (
        "allow(<kernel|small>, 50000); small<<<1, 32, 50000, stream>>>(); SAY",
        "error 1",
    ),
    "more shared memory than there is": ("allow(kernel, <100865|100864>); SAY", "error 1"),
    "a grid that is too large to cooperate": (
        "cudaLaunchAttribute a{}; a.id = cudaLaunchAttributeCooperative; a.val.cooperative = 1;"
        "cudaLaunchConfig_t c{}; c.gridDim = <5|4>; c.blockDim = 32; c.stream = stream;"
        "c.attrs = &a; c.numAttrs = 1; cudaLaunchKernelEx(&c, kernel, memory); SAY",
        "error 720",
    ),
    "blocks that wait are launched together": (
        'setenv("EMULATION_RESIDENT", "1", 1); setenv("EMULATION_SPINS", "1000", 1);'
        "cudaMemsetAsync(memory, 0, 4, stream);"
        "cudaLaunchAttribute a{}; a.id = cudaLaunchAttributeCooperative; a.val.cooperative = 1;"
        "cudaLaunchConfig_t c{}; c.gridDim = 4; c.blockDim = 1; c.stream = stream;"
        "c.attrs = &a; c.numAttrs = <0|1>; cudaLaunchKernelEx(&c, meet, memory); SAY",
        "dead-lock",
    ),
    "room for no block": (
        "int n; cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, small, 128, <49153|49152>);"
        'if (n == 0) std::puts("no block");',
        "no block",
    ),
}

PROGRAM = """
#include <cstdint>
#include <cstdio>
#include <cstdlib>
extern "C" void ptx_allocated(void*, uint64_t);
__global__ void kernel(char* memory) {
  __shared__ int fixed[128];
  fixed[threadIdx.x % 128] = 1;
  __syncthreads();
  memory[threadIdx.x % 64] = fixed[threadIdx.x / 8];
}
__global__ void __launch_bounds__(128) small() {}
__device__ unsigned arrived(char* memory) {
  unsigned x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(memory) : "memory");
  return x;
}
__global__ void meet(char* memory) {  // of all blocks
  atomicAdd(reinterpret_cast<unsigned*>(memory), 1);
  while (arrived(memory) != gridDim.x) __nanosleep(32);
}
template <class Kernel>
void allow(Kernel kernel, int bytes) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
#define SAY std::printf("error %d\\n", static_cast<int>(cudaGetLastError()));
int main(int, char** arguments) {
  setenv("EMULATION_CLAIMED", "4", 1);
  const auto stream = reinterpret_cast<cudaStream_t>(64);
  auto* const memory = static_cast<char*>(std::aligned_alloc(64, 128));
  ptx_allocated(memory, 64);
  switch (std::atoi(arguments[1])) {
CASES
  }
}
"""


@cache
def program() -> Path:
    """Every fault twice: with the mistake, and without it."""
    cases = [
        f"case {2 * n + right}: {{ {re.sub('<([^<>|]*)[|]([^<>|]*)>', chosen, code)} break; }}"
        for n, (code, _) in enumerate(FAULTS.values())
        for right, chosen in enumerate((r"\1", r"\2"))
    ]
    source = machine.BUILD / "faults.cu"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(PROGRAM.replace("CASES", "\n".join(cases)))
    generate = "-gencode=arch=compute_90,code=compute_90"
    command = ["nvcc", "-std=c++20", generate, "-O1", "--no-compress"]
    subprocess.run([*command, "-c", str(source), "-o", str(source.with_suffix(".o"))], check=True)
    parts = machine.objects(machine.RUNTIME, flags=[f"-I{nvcc.toolkit()}"])
    return machine.link(source.with_suffix(""), source.with_suffix(".o"), *parts)


@pytest.mark.parametrize("name", FAULTS)
def test_a_mistake_of_the_host_is_noticed(name: str) -> None:
    number, said = list(FAULTS).index(name), FAULTS[name][1]
    wrong, right = (
        subprocess.run([str(program()), str(2 * number + n)], capture_output=True, text=True)
        for n in range(2)
    )
    assert said in wrong.stdout + wrong.stderr
    assert (wrong.returncode in (98, 99)) == (said not in wrong.stdout)
    assert right.returncode == 0 and said not in right.stdout and not right.stderr
