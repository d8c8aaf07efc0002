#!/usr/bin/env bash
# PyTorch: a deep copy passes by the allocator that was set for CPU tensors.
#
# c10::SetCPUAllocator replaces the allocator of CPU tensors, for pinned, shared or watched memory.
# torch.empty, Tensor.clone() and torch.load use it from then on. copy.deepcopy of a tensor and
# torch.UntypedStorage do not: they ask the default CPU allocator. So a module that is deep-copied, as
# for an average of weights, lies in memory that the allocator never saw.
#
# Seen with torch 2.13.0 (CPU), Python 3.11, gcc 12; whether the allocator gave the memory of each:
#   empty 1, clone 1, deepcopy 0, storage 0, load 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy 2>/dev/null
cat >"$folder/allocator.cpp" <<'CPP'
#include <c10/core/CPUAllocator.h>
#include <cstdlib>
#include <set>

static std::set<const void*> given;

struct Counting final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* p = std::aligned_alloc(64, (bytes / 64 + 1) * 64);
    given.insert(p);
    return {p, p, std::free, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

extern "C" void watch() { c10::SetCPUAllocator(new Counting, 100); }
extern "C" int gave(const void* p) { return given.count(p); }
CPP
torch=$("$folder/venv/bin/python" -c "import torch, pathlib; print(pathlib.Path(torch.__file__).parent)")
g++ -std=c++20 -O1 -shared -fPIC -isystem "$torch/include" "$folder/allocator.cpp" \
  -L"$torch/lib" -lc10 -Wl,-rpath,"$torch/lib" -o "$folder/allocator.so"
cat >"$folder/case.py" <<'PYTHON'
import copy
import ctypes
import io
import sys

import torch

allocator = ctypes.CDLL(sys.argv[1])
x = torch.arange(1000.0)
file = io.BytesIO()
torch.save(x, file)
file.seek(0)
allocator.watch()


def gave(made):
    return allocator.gave(ctypes.c_void_p(made.data_ptr()))


kept = [torch.empty(1000), x.clone(), copy.deepcopy(x), torch.UntypedStorage(4000), torch.load(file)]
names = ["empty", "clone", "deepcopy", "storage", "load"]
print(", ".join(f"{name} {gave(made)}" for name, made in zip(names, kept)))
PYTHON
seen=$("$folder/venv/bin/python" "$folder/case.py" "$folder/allocator.so")
echo "$seen"
[[ "$seen" == "empty 1, clone 1, deepcopy 0, storage 0, load 1" ]]
