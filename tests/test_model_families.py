"""The table of model families, against the models of the installed transformers."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.2")
import model_families  # noqa: E402

PAGE = model_families.TABLE.read_text()
of_another_release = pytest.mark.skipif(
    f"transformers {transformers.__version__}," not in PAGE,
    reason="the table is of another release",
)


@of_another_release
@pytest.mark.parametrize("family", model_families.QUICK)
def test_a_family_is_as_the_table_says(family: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert model_families.row(family, model_families.check(family)) in PAGE.splitlines()
    finally:
        torch.set_num_threads(threads)


def test_pages_say_how_many_families_are_exact() -> None:
    count = PAGE.count("| exact |")
    for page in ("README.md", "docs/transformers.md"):
        text = (model_families.TABLE.parents[1] / page).read_text()
        assert f"[{count} model families]" in text
