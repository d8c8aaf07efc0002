#!/usr/bin/env bash
# PyTorch: a product of a CPU tensor and a weight on the meta device is a CPU tensor that nobody wrote.
#
# A model is often made on meta, where weights have shapes and no memory, and loaded later. Where one
# weight was forgotten, an addition says that the devices differ. A matrix product does not: linear, mm
# and matmul return a tensor on the CPU, of the right shape, as if it had been computed, and the model
# goes on. The other way round (a meta input, a weight on the CPU) the result is on meta, as for bmm.
# A bias on meta is what saves nn.Linear: it is looked at. So layers without one, as in most decoders,
# are those that say nothing.
#
# Only devices are printed: the numbers are whatever the memory held.
#
# Seen with torch 2.13.0 (CPU), Python 3.11:
#   x + w: RuntimeError
#   nn.Linear with bias: RuntimeError
#   nn.Linear without bias: cpu (3, 5)
#   x @ w.T: cpu (3, 5)
#   bmm: meta (1, 3, 5)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy 2>/dev/null
cat >"$folder/case.py" <<'PYTHON'
import torch
from torch import nn

x = torch.rand(3, 4)
with torch.device("meta"):
    w = torch.empty(5, 4)
    with_bias, without = nn.Linear(4, 5), nn.Linear(4, 5, bias=False)
calls = {
    "x + w": lambda: x + w[:3],
    "nn.Linear with bias": lambda: with_bias(x),
    "nn.Linear without bias": lambda: without(x),
    "x @ w.T": lambda: x @ w.T,
    "bmm": lambda: torch.bmm(x[None], w.T[None]),
}
for name, call in calls.items():
    try:
        y = call()
        print(f"{name}: {y.device} {tuple(y.shape)}")
    except RuntimeError as error:
        print(f"{name}: {type(error).__name__}")
PYTHON
found=$("$folder/venv/bin/python" -W ignore "$folder/case.py")
echo "$found"
[ "$found" = "x + w: RuntimeError
nn.Linear with bias: RuntimeError
nn.Linear without bias: cpu (3, 5)
x @ w.T: cpu (3, 5)
bmm: meta (1, 3, 5)" ]
