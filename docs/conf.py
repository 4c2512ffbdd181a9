"""Sphinx's settings. build_site.py copies this folder and the notebooks into one folder and builds there."""

project = "Direct Preference Optimization, by doing it"
copyright = "the authors of this course, MIT licence"

extensions = ["myst_nb"]
smartquotes = False  # prose quotes options and code, such as --seed, as they are written

# The committed outputs are shown. Nothing is executed, and no script for widgets is asked for from elsewhere.
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_merge_streams = True

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# MathJax 2 out of a Python package, where build_site.py finds it. It reads as formulas what the Markdown parser found
# to be formulas, and nothing else: outputs hold text of models, where $5 is a price, and a formula can be a link.
mathjax_path = "mathjax/MathJax.js"
myst_update_mathjax = False  # it would add settings for MathJax 4
mathjax2_config = {
    "config": ["TeX-AMS-MML_HTMLorMML-full.js", "Safe.js"],
    "messageStyle": "none",
    "tex2jax": {
        "inlineMath": [["\\(", "\\)"]],
        "displayMath": [["\\[", "\\]"]],
        "ignoreClass": ".*",
        "processClass": "math",
    },
    "HTML-CSS": {
        "availableFonts": [],  # no font of the reader's system, so that formulas look the same everywhere
        "preferredFont": None,
        "imageFont": None,
        "webFont": "STIX-Web",  # the one that the package has
    },
}

html_theme = "sphinx_book_theme"
html_title = "DPO, by doing it"
html_static_path = ["_static"]
html_css_files = ["course.css"]
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
html_show_sphinx = False
html_use_index = False
html_theme_options = {
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the search stands in the sidebar
    "footer_content_items": ["copyright.html"],
    "use_download_button": True,  # of the notebook; there is no button of a repository, which may be anywhere
}

linkcheck_timeout = 20
linkcheck_retries = 2
