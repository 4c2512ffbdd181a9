"""Hostile texts, in one place, and how to see whether one took effect.

A payload of SCRIPTS that runs leaves a mark on its page: the attribute `data-ran-<name>` of <html>. A payload of CODE
that runs leaves a file.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path


def _mark(name: str) -> str:
    return f"document.documentElement.setAttribute('data-ran-{name}','')"


SCRIPTS = {
    "img": f'<img src=x onerror="{_mark("img")}">',
    "svg": f'<svg onload="{_mark("svg")}">',
    "pre": f"</pre><script>{_mark('pre')}</script>",
    "textarea": f"</textarea><script>{_mark('textarea')}</script>",
    "table": f"</td></tr></tbody></table><script>{_mark('table')}</script>",
    "title": f"</title></style><script>{_mark('title')}</script>",
    "attribute": f'" onerror="{_mark("attribute")}',  # ends alt="…"
    "focus": f'<input autofocus onfocus="{_mark("focus")}">',
    "frame": f'<iframe srcdoc="<script>parent.{_mark("frame")}</script>"></iframe>',
    "link": f'<a href="javascript:{_mark("link")}">link</a>',
}
OTHER_HTML = {
    "commandlinker": '<a data-commandlinker-command="terminal:create-new">run</a>',
    "form": "<form action=https://example.invalid><button>send</button></form>",
    "entities": "&lt;b&gt; &amp; &#x3c;b>",
}
TEMPLATES = {
    "jinja": "{{7*7}} {% for x in [1] %}{{ x.__class__.__mro__ }}{% endfor %}",
    "format": "{0.__class__} {settings} %s %(name)s ${7*7}",
    "mathjax": r"$\href{javascript:alert(1)}{a formula}$ \(x\) $$y$$",
    "mathtext": r"$\frac{1}{$ and 5 $",  # matplotlib cannot draw it as a formula
    "markdown": "`` ` ``` [link](javascript:alert(1)) ![x](x) | # **b**",
}
CONTROLS = {
    "colour": "\x1b[31mred\x1b[2J\x1b[1;1H",
    "terminal title": "\x1b]0;title\x07",
    "terminal link": "\x1b]8;;file:///etc/passwd\x1b\\here\x1b]8;;\x1b\\",
    "one-byte escape": "\x9b31mred",
    "backspace": "good\b\b\b\bevil",
    "overwritten line": "evil\rgood",
    "other newlines": "one\x0btwo\x0cthree\x1cfour\x85five\u2028six\u2029seven",
    "more lines": "first\nerror: second\n\nAPPLIES  third",
    "NUL": "a\0b",
    "backwards": "\u202etxt.exe\u202c \u2066isolated\u2069 \u200fmark",
    "unseen": "pass\u200bword\ufeff soft\xadhyphen tag\U000e0041\U000e007f",
    "surrogate": "half \ud83d of a pair",
    "private": "\ue000 \U000f0000",
}
ALL = {**SCRIPTS, **OTHER_HTML, **TEMPLATES, **CONTROLS}
ROWS = {name: text for name, text in ALL.items() if name not in ("NUL", "surrogate")}  # a row with one is dropped

# written down apart from the package's own rule, which goes by Unicode's categories
ACTIVE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ue000-\uf8ff"
    "\U000e0000-\U000e007f\U000f0000-\U0010ffff]"
)


def code(marker: Path) -> dict[str, object]:
    """Values for a JSON file that leave `marker` behind, should anybody evaluate, import or unpickle them."""
    touch = f"touch {marker}"
    return {
        "expression": f"__import__('os').system({touch!r})",
        "yaml": f"!!python/object/apply:os.system [{touch!r}]",
        "template": "{{ cycler.__init__.__globals__.os.popen('" + touch + "').read() }}",
        "shell": f"$({touch}) `{touch}` ; {touch}",
        "module": "hostile_module",
        "class": "hostile_module.Hostile",
        "jsonpickle": {"py/object": "hostile_module.Hostile", "py/reduce": [{"py/type": "os.system"}, [touch]]},
        "attributes": {"__class__": "hostile_module.Hostile", "__reduce__": ["os.system", [touch]]},
        "deep": _nested(200),
    }


def _nested(depth: int) -> list[object]:
    value: list[object] = []
    for _ in range(depth):
        value = [value]
    return value


def module(marker: Path) -> str:
    """Python that leaves `marker` when it is imported."""
    return f"open({str(marker)!r}, 'w').close()\nclass Hostile: pass\n"


class Page(HTMLParser):
    """The elements of a page with the names of their attributes, the values of links, and the text between them."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append(" ".join([tag, *(name for name, _ in attributes)]))
        self.links += [value or "" for name, value in attributes if name in ("href", "src", "action", "srcdoc")]

    def handle_data(self, data):
        self.text += data
