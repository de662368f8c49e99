"""Docstrings in lib/ are plain text: a formula such as |a - b| or a * b must not be taken for markup.

Everything outside ``double backticks``, directives and literal blocks is escaped before Sphinx parses it.
"""

import re

KEEP = re.compile(r"(``.+?``|:\w+:`[^`]+`|^\s*(?:>>>|\.\.).*$)")


def plain(line: str) -> str:
    parts = KEEP.split(line)
    return "".join(
        p if i % 2 else re.sub(r"([|*\\]|(?<=\w)_(?=\W|$))", r"\\\1", p) for i, p in enumerate(parts)
    )


def process(app, what, name, obj, options, lines):
    example = False  # inside a doctest, up to the next empty line
    for i, line in enumerate(lines):
        example = line.strip() != "" and (example or line.lstrip().startswith(">>>"))
        if not example:
            lines[i] = plain(line)


def setup(app):
    # Before napoleon (priority 500), whose own output is markup and has to stay.
    app.connect("autodoc-process-docstring", process, priority=400)
    return {"parallel_read_safe": True}
