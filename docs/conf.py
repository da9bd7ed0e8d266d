"""How `make docs` builds the site; every page is Markdown, and those with code cells are run."""

import os
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE / "_extensions"), str(HERE.parent)]
os.environ["PYTHONPATH"] = str(HERE.parent)  # for the processes that run the pages
# What one page compiles need not be compiled for another, nor at the next build.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(HERE.parent / "build" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

from faithdiff_jax import __version__  # noqa: E402

project = "faithdiff-jax"
author = "the faithdiff-jax authors"
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "from_code"]
exclude_patterns = ["_build", "_extensions"]

# Markdown: headings are link targets, as on GitHub.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist"]

# Code cells: run at each build; one that fails is a warning with its traceback, and warnings are errors.
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_show_tb = True
nb_merge_streams = True
nb_output_stderr = "remove"  # warnings of libraries, with paths of this machine

# API pages: in the order of the source, with the signatures as they are written there.
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
maximum_signature_line_length = 90
add_module_names = False
toc_object_entries_show_parents = "hide"
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "sphinx_book_theme"
html_title = "faithdiff-jax"
html_theme_options = {"show_navbar_depth": 1, "home_page_in_toc": True, "navbar_persistent": []}
