"""Sphinx's configuration of this site; ``nox -s docs`` builds it. What Sphinx lacks for it is in ``extension.py``."""

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for extension.py

project = "hatnet"
author = "the hatnet developers"
copyright = f"{author}. Apache-2.0"
release = importlib.metadata.version("hatnet-core")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinxcontrib.programoutput",
    "extension",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_dmath_double_inline = True

# MathJax lies in the site itself, so that it reads without a network.
mathjax_path = "mathjax/tex-chtml.js"

nitpicky = True
# Names of other projects: their inventories would have to be fetched.
nitpick_ignore_regex = [
    ("py:.*", rf"({package})(\..*)?")
    for package in [
        "argparse",
        "collections",
        "deepspeed",
        "fvcore",
        "glob",
        "huggingface_hub",
        "logging",
        "matplotlib",
        "multiprocessing",
        "mmdet",
        "mmengine",
        "msgspec",
        "np",
        "numpy",
        "onnx",
        "pathlib",
        "PIL",
        "safetensors",
        "timm",
        "torch",
        "torchvision",
        "transformers",
        "triton",
        "tyro",
        "typing",
    ]
] + [("py:class", r"Figure|Image|Tensor|tqdm|1e\+300|hatnet_train\.[\w.]+\.(T|_Made)")]
autodoc_mock_imports = ["mmcv"]  # which would have to be compiled; every other library is there

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "hatnet"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True
