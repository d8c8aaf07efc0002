#!/usr/bin/env bash
# torch.distributed: destroy_process_group ends gloo's threads, unless a functional collective has
# been given the group, or torch.compile has traced one: then they run until the process ends.
#
# all_reduce of torch.distributed, and the operator _c10d_functional::all_reduce, which takes the
# group's name, leave no thread behind. The same operator inside a compiled function, and
# _functional_collectives.all_reduce with the group, leave all three: something keeps the group.
#
# Such a thread may still free the tensors of the last collective when Python ends. Python ends a
# thread that asks for its lock then, and a process that had finished its work was once seen to
# abort on a busy machine ("terminate called without an active exception").
#
# Seen with torch 2.13.0 (CPU), Python 3.11, Linux: threads of gloo after destroy_process_group
#   all_reduce: 0
#   operator: 0
#   compiled operator: 3
#   functional collective: 3
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install -q torch==2.13.0 numpy==2.4.6 2>/dev/null
cat >"$folder/threads.py" <<'PYTHON'
import glob
import sys

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

kind, store = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
name = dist.group.WORLD.group_name
ops = torch.ops._c10d_functional


def operator(x):
    return ops.wait_tensor(ops.all_reduce(x, "sum", name))


x = torch.ones(3)
if kind == "all_reduce":
    dist.all_reduce(x)
elif kind == "operator":
    operator(x)
elif kind == "compiled operator":
    torch.compile(operator, fullgraph=True, backend="aot_eager")(x)
else:
    functional.all_reduce(x, "sum", dist.group.WORLD) + 1
dist.destroy_process_group()
names = [open(file).read() for file in glob.glob("/proc/self/task/*/comm")]
print(f"{kind}: {sum('gloo' in name for name in names)}")
PYTHON
for kind in "all_reduce" "operator" "compiled operator" "functional collective"; do
  "$folder/venv/bin/python" "$folder/threads.py" "$kind" "$folder/store of $kind" 2>/dev/null
done >"$folder/found"
diff "$folder/found" - <<'EXPECTED'
all_reduce: 0
operator: 0
compiled operator: 3
functional collective: 3
EXPECTED
cat "$folder/found"
