"""Configuration of the documentation; built with warnings as errors by ``.ci/run``."""

from __future__ import annotations

import lightning_compress

project = "lightning_compress"
copyright = "the lightning_compress authors, Apache-2.0"
version = release = lightning_compress.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # as they are stored; .ci/full runs them

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_numpy_docstring = False
copybutton_prompt_text = r">>> |\$ "
copybutton_prompt_is_regexp = True
