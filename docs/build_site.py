"""The course as a static site in build/site/: `make site`. It needs no network, neither to build nor to read.

The notebooks are shown as they were committed, with their outputs. They are not executed and never written to. The
pages are those of this folder.
"""

from __future__ import annotations

import argparse
import json
import posixpath
import re
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sphinx.cmd.build import build_main

from dpo_helpers.run.course import drop_widgets, notebooks_in

DOCS = Path(__file__).resolve().parent
FOLDED = {"setup": "set-up cell", "solution": "solution"}  # cells with these tags, and what their fold says
LINK = re.compile(r"\[([^\[\]]*)\]\(([^\s():#]+)(#[^\s()]*)?\)")  # in Markdown, to another file of the course


def for_the_site(notebook: dict[str, Any]) -> dict[str, Any]:
    """A notebook as the site shows it; the one that is given is changed.

    Without widgets, which do nothing without a kernel, and without Colab's badge, an image of another site. The set-up
    cell is folded. A figure's alternative text is what its cell prints: every plot_… prints a sentence for that.
    """
    drop_widgets(notebook)
    notebook["metadata"]["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}  # knows %pip and !echo
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            _show_outputs(cell)
        elif cell["cell_type"] == "markdown":
            lines = "".join(cell["source"]).split("\n")
            cell["source"] = "\n".join(_bars(line) for line in lines if "colab-badge.svg" not in line)
    return notebook


def _bars(line: str) -> str:
    r"""In a row of a table a formula's \| is a double bar to JupyterLab, but an escaped | to the parser of the site."""
    return re.sub(r"\$[^$]+\$", lambda m: m[0].replace(r"\|", r"\Vert "), line) if line.startswith("|") else line


def _show_outputs(cell: dict[str, Any]) -> None:
    metadata = cell["metadata"]
    printed = "".join("".join(output["text"]) for output in cell["outputs"] if output.get("name") == "stdout")
    metadata["mystnb"] = {"image": {"alt": " ".join(printed.split()) or "figure"}}
    tags = metadata.setdefault("tags", [])
    if "setup" in tags:
        tags.append("hide-input")
    for tag, name in FOLDED.items():
        if tag in tags:
            metadata["mystnb"] |= {"code_prompt_show": f"Show the {name}", "code_prompt_hide": f"Hide the {name}"}


def site_links(text: str, where: str, pages: set[str]) -> str:
    """Markdown whose links to other files of the course lead to their pages on the site.

    where: the text's own path in the course, such as docs/speed.md. pages: what the site is made of. Of a link to a
    file of the course that is not among them, its text is left; one to no file at all stays, and fails the build.
    """
    folder = posixpath.dirname(where)

    def lead(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, found[2]))
        top, _, page = target.partition("/")
        if top in ("docs", "notebooks") and page in pages:
            return f"[{found[1]}]({posixpath.relpath(page, folder.partition('/')[2] or '.')}{found[3] or ''})"
        return found[1] if (DOCS.parent / target).exists() else found[0]

    return LINK.sub(lead, text)


def prepare(notebooks: Path, source: Path) -> list[Path]:
    """Put docs/, MathJax and the notebooks into a new folder that Sphinx can build; the notebooks' paths in it."""
    shutil.copytree(DOCS, source, ignore=shutil.ignore_patterns("*.py[co]", "__pycache__", Path(__file__).name))
    mathjax = find_spec("jupyter_server_mathjax")
    if mathjax is None or not mathjax.submodule_search_locations:
        raise SystemExit("error: the package jupyter-server-mathjax is missing; install '.[site]'")
    shutil.copytree(Path(mathjax.submodule_search_locations[0]) / "static", source / "_static/mathjax")
    lessons = [path.relative_to(notebooks) for path in notebooks_in(notebooks, beyond=True)]
    pages = {path.as_posix() for path in lessons} | {path.name for path in source.iterdir()}
    for page in source.glob("*.md"):
        page.write_text(site_links(page.read_text(encoding="utf-8"), f"docs/{page.name}", pages), encoding="utf-8")
    for path in lessons:
        notebook = for_the_site(json.loads((notebooks / path).read_text(encoding="utf-8")))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = site_links(cell["source"], f"notebooks/{path.as_posix()}", pages)
        (source / path).parent.mkdir(exist_ok=True)
        (source / path).write_text(json.dumps(notebook, ensure_ascii=False), encoding="utf-8")
    return lessons


def build(folder: Path, notebooks: Path, builder: str = "html") -> int:
    """Build folder/site/ from a folder of notebooks; Sphinx's exit status. A warning fails."""
    source, made, site = folder / "site-src", folder / "site-made", folder / "site"
    for old in (source, made, site) if builder == "html" else (source, made):
        if old.exists():
            shutil.rmtree(old)
    lessons = prepare(notebooks, source)
    options = ["-q", "-W", "--keep-going", "-d", str(made / "doctrees"), "-b", builder]
    status = build_main([*options, str(source), str(made / builder)])
    if status == 0 and builder == "html":
        for path in lessons:  # what the download button gives is the committed notebook
            shutil.copyfile(notebooks / path, made / "html/_sources" / path)
        (made / "html").replace(site)
        print(f"site: {site / 'index.html'}")
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=DOCS.parent / "build", help="where site/ is put")
    parser.add_argument("--notebooks", type=Path, default=DOCS.parent / "notebooks")
    parser.add_argument("--links", action="store_true", help="ask every other site that is linked to; needs a network")
    given = parser.parse_args(arguments)
    return build(given.folder.resolve(), given.notebooks.resolve(), "linkcheck" if given.links else "html")


if __name__ == "__main__":
    sys.exit(main())
