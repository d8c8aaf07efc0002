"""An estimate of the CUDA step from its machine code: ``python -m bench estimates steps``.

A step does as well as it can when it takes as long as reading keys and values once, at the
bandwidth of a copy. This counts what the two loops over them cost a multiprocessor, as
roofline.py does for the scans, and says which share of that bandwidth is left.

The head's shape is made constant in a copy of the source, and marks in the machine code (`pmevent`)
bracket one turn of each loop. `tensor` counts products of 16 x 16 x 8 numbers, of which a
multiprocessor is taken to do one in two clocks. The last columns, of batch and slots, count too
what blocks exchange (sums, partial outputs), as if no cache held it, and multiprocessors that have
nothing left to do.

Not in it: latency, barriers, the softmax, scores and victims; so of a small state it says nothing.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from bench.table import Table
from msrnn_ops._C import step_plan

from .machine_code import DTYPES, ROOT, disassemble, opcode, output_of, tool
from .roofline import MACHINES, PIPES, Machine, blocks_of, wavefronts

HEAD_DIM, KV_HEADS = 128, 8
_SHARING = {"bfloat16": (1, 4, 8), "float32": (1, 4)}  # query heads of a key-value head
_SHAPES = ((1, 8192), (16, 1024), (16, 8192), (128, 512))  # batch and slots
_MARK = 'asm volatile("pmevent %0;" ::"n"({}));'
_CLOCKS_OF_PRODUCT = 2

Cost = dict[str, float]


def _replaced(path: Path, *pairs: tuple[str, str]) -> None:
    text = path.read_text()
    for old, new in pairs:
        if text.count(old) != 1:
            sys.exit(f"{text.count(old)} times in {path.name}, expected once: {old}")
        text = text.replace(old, new)
    path.write_text(text)


def hot_source(source: Path, folder: Path, sharing: int, mma: bool) -> None:
    """A copy of the sources with a constant shape and marks around a turn of each loop."""
    shutil.copytree(source, folder / "csrc")
    cuda = folder / "csrc/cuda"
    _replaced(
        cuda / "step_block.h",
        ("return static_cast<int>(s.head_dim);", f"return {HEAD_DIM};"),
        ("return static_cast<int>(s.kv_heads);", f"return {KV_HEADS};"),
        ("return call.sharing;", f"return {sharing};"),
        ("return static_cast<int>(s.row_bytes());", f"return {HEAD_DIM * (2 if mma else 4)};"),
    )
    if mma:
        keys, values = "      const char* const keys =", "        Chunk value[kTiles][4];"
        after_values = "      // A lane has both parts of one"
    else:
        raw = "Chunk raw[kRows][chunks];\n"
        keys = f"      {raw}      const char* from = s.keys"
        values = f"        {raw}        const char* from = s.values"
        after_values = "      for (int apart = lanes; apart < 32"
    after_keys = "  // Weighted sums of the values"
    path = cuda / ("step_mma.h" if mma else "step_fma.h")
    text = path.read_text()

    def before(text: str, anchor: str, closing: int, mark: int) -> str:
        """Puts a mark before the last `closing` braces that precede the anchor."""
        end = text.index(anchor)
        for _ in range(closing):
            end = text.rindex("}", 0, end)
        return text[:end] + _MARK.format(mark) + "\n" + text[end:]

    for anchor in (keys, values, after_keys, after_values):
        if text.count(anchor) != 1:
            sys.exit(f"{text.count(anchor)} times in {path.name}, expected once: {anchor}")
    text = before(text, after_values, 1, 3)
    text = text.replace(values, _MARK.format(2) + "\n" + values)
    text = before(text, after_keys, 2, 1)
    text = text.replace(keys, _MARK.format(0) + "\n" + keys)
    path.write_text(text)


def marked(lines: list[str], first: int) -> dict[str, float]:
    """Instructions between two marks by name."""
    total: dict[str, float] = {}
    inside = False
    for block in blocks_of(lines):
        marks = [int(line.split()[-1], 0).bit_length() - 1 for line in block if "PMTRIG" in line]
        inside = inside or first in marks
        for line in block if inside else ():
            total[opcode(line)] = total.get(opcode(line), 0) + 1
        inside = inside and first + 1 not in marks
    total.pop("PMTRIG")
    return total


def cost_of(counts: dict[str, float], size: int) -> Cost:
    """Of a byte, in warps: instructions, what runs them, wavefronts of L1 and shared memory."""
    bases: dict[str, float] = {}
    for name, count in counts.items():
        base = name.split(".")[0]
        bases[base] = bases.get(base, 0) + count
    pipes = {pipe: sum(bases.get(n, 0) for n in names.split()) for pipe, names in PIPES.items()}
    total = {"issue": sum(bases.values()), "tensor": bases.get("HMMA", 0), **pipes}
    total["shared"] = sum(wavefronts(name) * count for name, count in counts.items())
    return {name: count / size for name, count in total.items()}


def compile_step(source: Path, folder: Path, dtype: str, arch: str, sharing: int) -> Cost:
    """What a byte of keys and values costs a multiprocessor."""
    size, mma = DTYPES[dtype].size, dtype != "float32"
    hot_source(source, folder, sharing, mma)
    cubin = folder / "step.cubin"
    options = ("-std=c++20", "-O3", f"-arch=sm_{arch}", "-cubin", "-o", str(cubin))
    output_of(tool("nvcc"), *options, str(folder / f"csrc/cuda/instantiations/step_{dtype}.cu"))
    lines = disassemble(cubin)[f"attend_evict/{dtype}/1"]
    tiles = (16 * HEAD_DIM, 32 * 64) if mma else (6 * HEAD_DIM, 6 * HEAD_DIM)
    if mma and sharing > 4:
        tiles = (tiles[0], tiles[1] // 2)
    turns = [marked(lines, first) for first in (0, 2)]
    loads = [sum(n for name, n in turn.items() if name.startswith("LDG.E.128")) for turn in turns]
    expected = [tile * size // 512 for tile in tiles]
    queries = HEAD_DIM * size // 64 if mma else 4  # loads of them, beside those of keys
    assert loads[1] == expected[1] and loads[0] - expected[0] <= queries, (loads, expected)
    costs = [cost_of(turn, tile * size) for turn, tile in zip(turns, tiles, strict=True)]
    return {name: (costs[0][name] + costs[1][name]) / 2 for name in costs[0]}


def filled(machine: Machine, rows: int, slots: int, sharing: int, size: int) -> float:
    """The share of a bandwidth that is left where blocks do not come out even, and exchange."""
    heads = KV_HEADS * sharing
    plan = step_plan(rows, heads, KV_HEADS, slots + 1, HEAD_DIM, size)
    blocks, of_row = rows * plan["splits"], 2 * KV_HEADS * HEAD_DIM * size
    pairs, rest = divmod(blocks, 2 * machine.multiprocessors)  # two blocks at once
    turns = 2 * pairs + (0 if rest == 0 else 1 if rest <= machine.multiprocessors else 2)
    exchanged = heads * (8 * plan["splits"] + 8 * HEAD_DIM)
    moved = turns * machine.multiprocessors * (plan["block_slots"] * of_row + exchanged)
    return rows * slots * of_row / moved


def estimate(machine: Machine, cost: Cost) -> dict[str, Any]:
    """The share of a copy's bandwidth that the loops leave, and what limits them."""
    byte = machine.multiprocessors * machine.clock / machine.bandwidth  # clocks of a multiprocessor
    rates = {"issue": 4, "fma": machine.fma / 32, "alu": 2, "special": 0.5, "shared": 1}
    taken = {name: cost[name] / rate / byte for name, rate in rates.items()}
    taken["tensor"] = cost["tensor"] * _CLOCKS_OF_PRODUCT / byte
    limit = max(taken, key=lambda name: taken[name])
    return {"taken": taken, "limit": limit, "share": min(1, 1 / taken[limit])}


def run(archs: Sequence[str]) -> tuple[list[dict[str, Any]], list[Table]]:
    rows: list[dict[str, Any]] = []
    cells = []
    cases = [
        (arch, dtype, sharing)
        for arch, dtype in product(archs, _SHARING)
        for sharing in _SHARING[dtype]
    ]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        costs = pool.map(
            lambda case: compile_step(
                ROOT / "csrc", Path(name, "_".join(map(str, case))), case[1], case[0], case[2]
            ),
            cases,
        )
        for (arch, dtype, sharing), cost in zip(cases, costs, strict=True):
            found = {m.name: estimate(m, cost) for m in MACHINES if m.arch == arch}
            size = DTYPES[dtype].size
            row = {"arch": arch, "dtype": dtype, "sharing": sharing, "cost": cost}
            rows.append(row | {"machines": found})
            for machine in (m for m in MACHINES if m.arch == arch):
                figures = found[machine.name]
                figures["states"] = {
                    f"{batch}x{slots}": figures["share"]
                    * filled(machine, batch, slots, sharing, size)
                    for batch, slots in _SHAPES
                }
                words = (machine.name, dtype, str(sharing), f"{1024 * cost['issue']:.1f}")
                issue = f"{figures['taken']['issue']:.0%}"
                shares = [f"{share:.0%}" for share in figures["states"].values()]
                cells.append([*words, issue, figures["limit"], *shares])
    note = "Of a copy's bandwidth, with 8 key-value heads of 128, by batch and slots."
    states = [f"{batch}x{slots}" for batch, slots in _SHAPES]
    columns = ("GPU", "dtype", "queries", "instructions / KB", "issue", "next", *states)
    return rows, [Table("Decode step", note, columns, cells, labels=2)]
