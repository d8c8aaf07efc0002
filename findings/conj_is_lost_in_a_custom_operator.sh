#!/usr/bin/env bash
# PyTorch: a custom operator that calls .conj() computes without the conjugation once its caller is
# compiled, without a word.
#
# Tensor.conj() is lazy: it sets a bit, and whatever reads the tensor next resolves it. In an operator
# made by torch.library.custom_op, whose Python code runs whole at run time, that works in eager mode
# and with the backend "eager". Where AOTAutograd has made the graph ("aot_eager", "inductor") the
# product in the operator ignores the bit. conj_physical() and resolve_conj() are right everywhere.
#
# The operator turns 1 back by a quarter of a circle: -i is right.
#
# Seen with torch 2.13.0 (CPU), Python 3.11:
#   eager: conj -1j, conj_physical -1j
#   aot_eager: conj 1j, conj_physical -1j
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy 2>/dev/null
cat >"$folder/case.py" <<'PYTHON'
import torch


def operator(name, conjugated):
    @torch.library.custom_op(f"finding::{name}", mutates_args=())
    def turn_back(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        return x * conjugated(torch.polar(torch.ones_like(angle), angle))

    turn_back.register_fake(lambda x, angle: torch.empty_like(x))
    return turn_back


operators = {
    "conj": operator("conj", torch.conj),
    "conj_physical": operator("conj_physical", torch.conj_physical),
}
x, angle = torch.ones(1, dtype=torch.complex64), torch.tensor([torch.pi / 2])
for backend in ("eager", "aot_eager"):
    found = []
    for name, turn_back in operators.items():
        torch._dynamo.reset()
        y = torch.compile(lambda x, angle: turn_back(x, angle), backend=backend)(x, angle)
        found.append(f"{name} {round(y.imag.item())}j")
    print(f"{backend}: {', '.join(found)}")
PYTHON
found=$("$folder/venv/bin/python" -W ignore "$folder/case.py")
echo "$found"
[ "$found" = "eager: conj -1j, conj_physical -1j
aot_eager: conj 1j, conj_physical -1j" ]
