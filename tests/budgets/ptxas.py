"""What ptxas, the last compiler, made of PTX: facts of the machine code that PTX cannot show.

Values are tested on emulators, which run the source and its PTX. These facts say that the machine
code still is that program, above all in what no emulator on a CPU sees. `facts_of` counts what PTX
and machine code both have, by the patterns of FACTS: a barrier or a fence that is lost, a load that
became narrow, arithmetic that was fused. `faults_of` reads the machine code alone:

  local memory   None. An array or a spilled register there costs bandwidth, and results stay right.
  control flow   Every branch leads to an instruction of its own kernel, and there is no call to a
                 function of ours. Nothing runs on beyond the end, all can be reached, and an end
                 can be reached from everywhere: a loop without a way out is a bug or was made one.
  memory order   A release is a store right behind its fence, and an acquire a load right before the
                 cache of its multiprocessor is dropped. Else blocks would take stale carries.
  tensor cores   Only the shape and the types that the source has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from bench.estimates.machine_code import Code, kernel_name

# Facts by name: instructions of PTX, and what they become in the machine code. A pattern matches
# the beginning of an instruction without its predicate.
_WIDE = r"(\.cg)?\.(v4\.[bfsu]32|v2\.[bfsu]64) "
FACTS = {
    # Where threads and blocks meet. A barrier of a warp that is together leaves a label and a NOP.
    "barriers": (r"bar\.sync|barrier", r"BAR\.(SYNC|RED)"),
    "warp_barriers": (r"bar\.warp\.sync", r"NOP"),
    "acquires": (r"ld\.acquire\.gpu", r"CCTL\.IVALL"),
    "releases": (r"st\.release\.gpu", r"MEMBAR\.\S*GPU"),
    "coherent_loads": (r"ld\.(acquire|relaxed|volatile|global\.cg)", r"LD\S*\.STRONG\.GPU"),
    "atomics": (r"(atom|red)\.", r"(ATOM|RED)\S*\.STRONG\.GPU"),
    # 16 bytes at a time: from memory to shared memory; from and to memory; from and to shared.
    "copies": (r"cp\.async\.cg\S* .*, 16;", r"LDGSTS\.E\.BYPASS\S*\.128"),
    "copies_done": (r"cp\.async\.wait_all", r"DEPBAR\.LE SB0, 0x0"),
    "loads": (r"ld\.global" + _WIDE, r"LDG\.\S*128"),
    "stores": (r"st(\.global)?" + _WIDE, r"STG?\.\S*128"),
    "shared_loads": (r"ld\.shared" + _WIDE, r"LDS\.\S*128"),
    "shared_stores": (r"st\.shared" + _WIDE, r"STS\.\S*128"),
    # Tensor cores and special functions. A division of integers begins with a reciprocal.
    "mma_bfloat16": (r"mma\.sync\.aligned\.m16n8k16\S*\.f32\.bf16", r"HMMA\.16816\.F32\.BF16 "),
    "mma_float16": (r"mma\.sync\.aligned\.m16n8k16\S*\.f32\.f16", r"HMMA\.16816\.F32 "),
    "exp2": (r"ex2\.approx", r"MUFU\.EX2"),
    "log2": (r"lg2\.approx", r"MUFU\.LG2"),
    "reciprocals": (r"rcp|div|rem", r"MUFU\.RCP"),
    # Arithmetic. If ptxas fused what PTX keeps apart, two of these would shrink and the third grow.
    # It negates by adding zero (RZ), and sometimes multiplies by a fused one that adds -0.
    "adds": (r"(add|sub)(\.rn)?(\.ftz)?\.f", r"[FD]ADD\S* (?!.*RZ)"),
    "multiplies": (r"mul(\.rn)?(\.ftz)?\.f", r"[FD]MUL|[FD]FMA.*, -RZ$"),
    "fused": (r"fma\.rn(\.ftz)?\.f", r"[FD]FMA(?!.*, -RZ$)"),
    # The end, and the branches that lead right there.
    "exits": (r"ret|exit", r"EXIT"),
}
_MMA = (FACTS["mma_bfloat16"][1], FACTS["mma_float16"][1])


def ptx_of(text: str) -> Code:
    """The instructions of PTX by kernel, labels with a colon."""
    code = {}
    for body in re.split(r"\.entry\s+", text)[1:]:
        if name := kernel_name(body[: body.index("(")]):
            lines = re.findall(r"^\s*(\$\w+:|(?:@!?%p\d+ )?[a-z][^;]*;)", body, re.M)
            code[name] = [re.sub(r"\s+", " ", line) for line in lines]
    return code


def _operation(line: str) -> str:
    """An instruction without its predicate."""
    return line.partition(" ")[2].strip() if line.startswith("@") else line


def _branches_to_the_end(ptx: Sequence[str]) -> int:
    """Conditional branches of PTX to a block that only returns: ptxas makes them exits."""
    ends = {label[:-1] for label, line in pairwise(ptx) if line == "ret;"}
    return sum(line.startswith("@") and line[:-1].split()[-1] in ends for line in ptx)


def _without_padding(code: Sequence[str]) -> list[str]:
    """Without NOPs that are no barrier: those of barriers follow a label and end no collection."""
    around = zip(["", *code], code, [*code[1:], "NOP"], strict=False)
    return [
        line
        for before, line, after in around
        if line != "NOP" or (before.endswith(":") and after not in ("NOP", "ENDCOLLECTIVE"))
    ]


def facts_of(ptx: Sequence[str], code: Sequence[str]) -> dict[str, str]:
    """How often PTX has each of FACTS, and how many more the machine code has, such as 64+13."""
    before = [_operation(line) for line in ptx]
    after = [_operation(line) for line in _without_padding(code)]
    found = {}
    for name, patterns in FACTS.items():
        (of_ptx, of_code) = map(re.compile, patterns)
        expected = sum(of_ptx.match(line) is not None for line in before)
        more = sum(of_code.match(line) is not None for line in after) - expected
        if name == "exits":
            expected, more = expected + (n := _branches_to_the_end(ptx)), more - n
        found[name] = f"{expected}{more:+d}" if more else f"{expected}"
    return found


class _Flow:
    """Instructions, and which follows which."""

    ENDS = re.compile(r"EXIT|RET|KILL|BPT")
    JUMPS = re.compile(r"BRA|BRX|JMP|JMX|CALL|WARPSYNC\.COLLECTIVE")

    def __init__(self, code: Sequence[str]) -> None:
        self.lines: list[str] = []
        self.labels: dict[str, int] = {}
        for line in code:
            if line.endswith(":"):
                self.labels[line[:-1]] = len(self.lines)
            else:
                self.lines.append(line)
        self.next = [list(self._next(at)) for at in range(len(self.lines))]

    def targets(self, at: int) -> list[str]:
        """The labels that an instruction names. A return names its kernel, and leads elsewhere."""
        operation = _operation(self.lines[at])
        return [] if operation.startswith("RET") else re.findall(r"`\(([^)]*)", operation)

    def _next(self, at: int) -> Iterator[int]:
        line = self.lines[at]
        if self.JUMPS.match(_operation(line)):
            yield from (self.labels[label] for label in self.targets(at) if label in self.labels)
        if not (self.ENDS.match(line) or line.startswith(("BRA `", "JMP `", "BRX", "JMX"))):
            yield at + 1

    def reached(self, starts: set[int], backwards: bool = False) -> set[int]:
        edges = [(at, other) for at, others in enumerate(self.next) for other in others]
        follows: dict[int, list[int]] = {}
        for one, other in edges:
            a, b = (other, one) if backwards else (one, other)
            follows.setdefault(a, []).append(b)
        seen, left = set(starts), list(starts)
        while left:
            new = {at for at in follows.get(left.pop(), ()) if at not in seen}
            seen |= new
            left += new
        return seen


def _faults_of_flow(code: Sequence[str]) -> Iterator[str]:
    flow = _Flow(_without_padding(code))
    count = len(flow.lines)
    routines = {at for label, at in flow.labels.items() if label.startswith("$")}
    for at, line in enumerate(flow.lines):
        targets = flow.targets(at)
        for label in targets:
            if flow.labels.get(label, count) == count:
                yield f"{line}: leads out of the kernel"
            if not label.startswith((".L_x_", "$__internal_")):
                yield f"{line}: calls what was not inlined"
        if not targets and flow.JUMPS.match(_operation(line)):
            yield f"{line}: leads nowhere that can be told"
        if at + 1 in flow.next[at] and (at + 1 == count or at + 1 in routines):
            yield f"{line}: runs on beyond the end"
    ends = {at for at, line in enumerate(flow.lines) if flow.ENDS.match(_operation(line))}
    idle = {at for at in range(count) if flow.next[at] == [at]}  # ptxas puts it behind the end
    reached, ending = flow.reached({0}), flow.reached(ends, backwards=True)
    for at in sorted(set(range(count)) - reached - idle)[:1]:
        yield f"{flow.lines[at]}: is never reached"
    for at in sorted(reached - ending - {count})[:1]:
        yield f"{flow.lines[at]}: leads to no end"


def _faults_of_memory(code: Sequence[str]) -> Iterator[str]:
    if local := sum(re.match(r"LDL|STL", _operation(line)) is not None for line in code):
        yield f"{local} accesses of local memory"
    last = ""  # what touched memory last
    for line in code:
        operation = _operation(line)
        if re.match(r"ST\S*\.STRONG", operation) and not last.startswith("MEMBAR"):
            yield f"{line}: a release without its fence"
        if re.match(r"CCTL\.IVALL", operation) and not re.match(r"LD\S*\.STRONG", last):
            yield f"{line}: an acquire without its load"
        if re.match(r"[A-Z]+MMA", operation) and not any(re.match(mma, operation) for mma in _MMA):
            yield f"{line}: another shape or type than the source has"
        if re.match(r"LD(?!C|S|GDEP)|ST(?!S)|ATOM|RED|MEMBAR|CCTL|BAR|BRA|EXIT|\.|\$", operation):
            last = operation


def faults_of(code: Sequence[str]) -> list[str]:
    """What no compiler may do, in words."""
    return list(dict.fromkeys([*_faults_of_memory(code), *_faults_of_flow(code)]))
