"""How Sphinx builds the pages of this folder: ``make docs``."""

from importlib.metadata import version as installed_version

project = "globenc-lightning"
author = "the authors of globenc-lightning"
release = version = installed_version("globenc-lightning")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nitpicky = True
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Types in docstrings are words for readers, such as "(b, k)", and none to be looked up.
napoleon_preprocess_types = False
nitpick_ignore_regex = [
    # Other packages' classes, which are named and not linked: the build needs no network.
    ("py:.*", r"(torch|pytorch_lightning|lightning|numpy|pandas|collections|typing|pathlib|os)\b.*"),
    # Parts of a probe that nobody makes by hand.
    ("py:class", r"globenc_lightning\.task\..*"),
]

html_theme = "furo"
html_title = "globenc-lightning"
