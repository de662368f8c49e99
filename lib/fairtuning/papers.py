"""The numbers that the papers print, as data: ``published/<study>.yaml``."""

from functools import cache
from importlib.resources import files
from typing import Any

import yaml

STUDIES = ("zhang2024", "sukumaran2024", "kamalaruban2025")
OWN = ("bench",)  # of ours: claims, but nothing published


def read_yaml(folder: str, study: str) -> Any:
    """Content of ``fairtuning/<folder>/<study>.yaml``. ValueError where this study has no such file."""
    present = {name: files("fairtuning").joinpath(folder, f"{name}.yaml") for name in (*STUDIES, *OWN)}
    present = {name: file for name, file in present.items() if file.is_file()}
    if study not in present:
        raise ValueError(f"no {folder} of study {study!r}; permitted: {', '.join(present)}")
    return yaml.safe_load(present[study].read_text(encoding="utf-8"))


@cache
def load_published(study: str) -> dict[str, Any]:
    """``{"paper", "items", ...}`` of one paper; items: item, slug, kind, data, caption, cells, perhaps note.

    The result is shared by all callers: read it, don't change it.

    >>> load_published("zhang2024")["paper"]["arxiv"]
    '2403.00625'
    """
    return read_yaml("published", study)


def published_item(study: str, slug: str) -> dict[str, Any]:
    """One table, figure or number of the text. ValueError where the paper has no such item."""
    items = {item["slug"]: item for item in load_published(study)["items"]}
    if slug not in items:
        raise ValueError(f"no item {slug!r} in study {study!r}; permitted: {', '.join(items)}")
    return items[slug]


def published_cells(study: str, slug: str) -> list[dict[str, Any]]:
    """Cells of one item, in the paper's order, each with all keys.

    Keys: row, column, data; mean; spread (standard deviation over runs), n (runs) and change (from the
    pre-trained model), each None where the paper gives none; decoded (the value is only drawn), approximate
    (read off a colour scale).

    >>> published_cells("zhang2024", "figure4")[0]["mean"]
    16.522
    """
    empty = {"spread": None, "n": None, "change": None, "decoded": False, "approximate": False}
    return [empty | cell for cell in published_item(study, slug)["cells"]]
