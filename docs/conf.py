"""Sphinx: the pages of this folder and, by way of api.md, the docstrings. See `make docs`."""

import msrnn_ops

project = "msrnn_ops"
version = release = msrnn_ops.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
html_theme = "alabaster"
html_show_copyright = False
html_theme_options = {"description": msrnn_ops.__doc__, "page_width": "60rem"}

# Types stand in the text of each argument and result, with their shapes.
autodoc_typehints = "none"
napoleon_use_rtype = False
autodoc_member_order = "bysource"

# What other projects document, and Python's own names: their sites are not asked for.
nitpick_ignore_regex = [("py:.*", r"(torch|transformers)\..*")]
