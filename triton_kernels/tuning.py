"""How the kernels cut up their work: `python -m bench tune` rewrites this.

Never run on one yet: these come from instruction and register counts (tests/budgets/triton.json).
"""

# (pass, form, bytes of an element, inputs of the op): segments, rows of a segment, channels of a
# block, warps. Forms: "walk", rows and channels fill a GPU; "segments", they nearly do; "chunks".
SCANS: dict[tuple[str, str, int, int], tuple[int, ...]] = {
    ("forward", "walk", 2, 2): (1, 16, 64, 1),
    ("forward", "walk", 2, 3): (1, 16, 64, 1),
    ("forward", "walk", 4, 2): (1, 16, 32, 1),
    ("forward", "walk", 4, 3): (1, 16, 32, 1),
    ("backward", "walk", 2, 2): (1, 16, 64, 1),
    ("backward", "walk", 2, 3): (1, 8, 64, 1),
    ("backward", "walk", 4, 2): (1, 16, 32, 1),
    ("backward", "walk", 4, 3): (1, 8, 32, 1),
    ("forward", "chunks", 2, 2): (1, 16, 64, 1),
    ("forward", "chunks", 2, 3): (1, 16, 64, 1),
    ("forward", "chunks", 4, 2): (1, 16, 32, 1),
    ("forward", "chunks", 4, 3): (1, 16, 32, 1),
    ("backward", "chunks", 2, 2): (1, 16, 64, 1),
    ("backward", "chunks", 2, 3): (1, 8, 64, 1),
    ("backward", "chunks", 4, 2): (1, 16, 32, 1),
    ("backward", "chunks", 4, 3): (1, 8, 32, 1),
    ("forward", "segments", 2, 2): (8, 8, 32, 4),
    ("forward", "segments", 2, 3): (8, 8, 32, 4),
    ("forward", "segments", 4, 2): (8, 8, 32, 4),
    ("forward", "segments", 4, 3): (8, 8, 32, 4),
    ("backward", "segments", 2, 2): (16, 4, 32, 4),
    ("backward", "segments", 2, 3): (16, 4, 32, 4),
    ("backward", "segments", 4, 2): (16, 4, 32, 4),
    ("backward", "segments", 4, 3): (16, 4, 32, 4),
}

# (bytes of an element, head_dim rounded up to a power of 2): slots that a program has at once,
# warps, blocks of slots under way.
STEPS: dict[tuple[int, int], tuple[int, ...]] = {
    (2, 16): (64, 4, 3),
    (2, 32): (64, 4, 3),
    (2, 64): (64, 4, 3),
    (2, 128): (32, 4, 3),
    (2, 256): (16, 4, 3),
    (4, 16): (64, 4, 3),
    (4, 32): (64, 4, 2),
    (4, 64): (32, 4, 3),
    (4, 128): (16, 4, 3),
    (4, 256): (16, 8, 2),
}
