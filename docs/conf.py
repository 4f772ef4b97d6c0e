"""How Sphinx builds the site: `make docs`. Nothing is fetched, neither while it is built nor while it is read."""

import os
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import meanfield  # noqa: E402
from docs.extensions import docstrings, pages, reference  # noqa: E402

project, author, copyright = "meanfield", "the meanfield developers", "the meanfield developers"
version = release = meanfield.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_gallery.gen_gallery"]
exclude_patterns = ["_build", "extensions", "tutorials", "gallery/*.py", "gallery/*.ipynb", "**/witnesses"]
suppress_warnings = ["config.cache", "myst.header"]  # the pages of docs/ are read on their own as well
myst_heading_anchors = 3
highlight_language = "none"  # formulas stand as indented text
default_role = "code"

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "gallery",
    "abort_on_example_error": True,
    "capture_repr": (),  # what is printed, and no objects
    "download_all_examples": False,
    "min_reported_time": 1e6,
    "remove_config_comments": True,
    "within_subsection_order": "FileNameSortKey",
    "write_computation_times": False,
}

html_theme = "furo"
html_title = "meanfield"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"top_of_page_buttons": []}


def setup(app):
    app.connect("builder-inited", reference.write)
    app.connect("autodoc-process-docstring", docstrings.process)
    app.connect("autodoc-process-signature", docstrings.signature)
    app.connect("build-finished", pages.copy)
    app.add_transform(pages.Linked)
