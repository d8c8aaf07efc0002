#!/usr/bin/env bash
# PyTorch: an operator that changes an argument, and whose Autograd kernel looks at a tangent, cannot
# be compiled.
#
# torch.autograd.forward_ad.unpack_dual tells whether a tensor has a tangent. In a kernel for the
# Autograd key it is recorded while torch.compile traces, as an alias that nobody uses. For an operator
# that changes one of its arguments Inductor makes the replacement of its functional form by tracing
# twice, the second time what the first one gave; each time adds an alias, and an assertion that both
# graphs are equally long fails. Without the look, or where nothing is changed, it compiles. So does it
# where the look is wrapped in torch.fx.experimental.proxy_tensor.disable_proxy_modes_tracing.
#
# Seen with torch 2.13.0 (CPU), Python 3.11, gcc 12:
#   no look: compiles, look: AssertionError:, untraced look: compiles
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy 2>/dev/null
cat >"$folder/case.py" <<'PYTHON'
import contextlib

import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

library = torch.library.Library("case", "DEF")


def operator(name, around):
    """Counts its calls in `state`; `around` is how it looks at the tangent of x, or None."""
    library.define(f"{name}(Tensor x, Tensor(a!) state) -> Tensor")
    call = getattr(torch.ops.case, name)

    def kernel(x, state):
        state.add_(1)
        return x * 2

    def autograd(x, state):
        if around is not None:
            with around(), forward_ad.dual_level():
                assert forward_ad.unpack_dual(x).tangent is None
        with torch._C._AutoDispatchBelowAutograd():
            return call(x, state)

    library.impl(name, kernel, "CPU")
    library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"case::{name}", lambda x, state: torch.empty_like(x))

    state = torch.zeros(1)
    try:
        torch.compile(lambda x, state: call(x, state))(torch.ones(3), state)
    except Exception as error:
        return str(error).split("\n")[0].strip()
    return "compiles" if state.item() == 1 else "wrong"


looks = {"no look": None, "look": contextlib.nullcontext, "untraced look": disable_proxy_modes_tracing}
for i, (name, around) in enumerate(looks.items()):
    print(name, operator(f"count{i}", around), sep=": ")
PYTHON
seen=$("$folder/venv/bin/python" "$folder/case.py" 2>"$folder/errors" | paste -sd ',' | sed 's/,/, /g') ||
  { cat "$folder/errors"; exit 1; }
echo "$seen"
[[ "$seen" == "no look: compiles, look: AssertionError:, untraced look: compiles" ]]
