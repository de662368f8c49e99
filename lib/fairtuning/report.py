"""Published and ours side by side: tables, coverage, verdicts, as plain data."""

import math
import re
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

from fairtuning import FairtuningError, claims, papers, studies
from fairtuning.analysis import MissingRuns, Results
from fairtuning.claims import Verdict
from fairtuning.runs import Store

#: Data sets that a study can be run on so far, by paper.
RUNNABLE = {"zhang2024": ("adult",), "sukumaran2024": ("waterbirds",)}


def slug(name: str) -> str:
    """``Table 3``, ``table3``, ``Fig. 5`` -> ``table3``, ``figure5``."""
    return re.sub(r"^fig(ure)?", "figure", re.sub(r"[\s.]", "", name.lower()))


def item(study: str, name: str) -> dict[str, Any]:
    try:
        return papers.published_item(study, slug(name))
    except ValueError as error:
        raise FairtuningError(str(error)) from None


def title(study: str, name: str) -> str:
    paper = papers.load_published(study)["paper"]
    return f"arXiv {paper['arxiv']}, {item(study, name)['item']}"


def labels(module: ModuleType, only: str | None = None) -> list[str]:
    """Labels of the runs that one table or figure (all for None) needs."""
    if only is None:
        return list(dict.fromkeys(label for found in module.LABELS.values() for label in found))
    if slug(only) not in module.LABELS:
        raise FairtuningError(f"no table or figure {only!r} in {module.NAME}; allowed: {', '.join(module.LABELS)}")
    return module.LABELS[slug(only)]


@cache
def _results(study: str, profile: str, stamp: float) -> Results:
    return studies.study(study).results(Store.of(study, profile), profile)


def results(study: str, profile: str = "paper") -> Results:
    """Every record of a study and profile; read once as long as its file stays the same."""
    studies.check_profile(studies.study(study), profile)
    path = Store.path_of(study, profile)
    return _results(study, profile, path.stat().st_mtime if path.is_file() else 0.0)


def published(cell: dict[str, Any]) -> dict[str, Any]:
    return {name: cell[name] for name in ("mean", "spread", "n")}


def ours(module: ModuleType, found: Results | None, name: str, row: str, column: str, profile: str) -> dict | None:
    """Our mean, standard deviation over seeds (n - 1) and records of one cell; None where it was not run."""
    if found is None:
        return None
    try:
        cell = module.cell(found, slug(name), row, column)
    except MissingRuns:
        return None
    n = 0 if cell.exact else len(cell.values)
    backbone = getattr(cell, "backbone", "")
    return {
        "mean": float(cell.values.mean()),
        "spread": float(cell.values.std()) if n > 1 else None,
        "n": n,
        "profile": profile,
        "data": found.data_name,
        "records": list(cell.records),
    } | ({"backbone": backbone} if backbone else {})


def table(study: str, name: str, *, profile: str = "paper", found: Results | None = None) -> list[dict[str, Any]]:
    """One object per published cell: row, column, data, published {mean, spread, n}, ours (or None)."""
    cells = item(study, name) and papers.published_cells(study, slug(name))
    module = studies.study(study) if study in studies.STUDIES else None
    found = found or (_available(study, profile) if module else None)
    return [
        {
            "row": cell["row"],
            "column": cell["column"],
            "data": cell["data"],
            "published": published(cell),
            "ours": ours(module, found, name, cell["row"], cell["column"], profile)
            if module and cell["data"] in RUNNABLE[study]
            else None,
        }
        for cell in cells
    ]


def _available(study: str, profile: str) -> Results | None:
    try:
        return results(study, profile)
    except MissingRuns:
        return None


def verdicts(study: str, *, profile: str = "paper", found: Results | None = None) -> list[Verdict]:
    """A verdict for every claim of a study's paper."""
    module = studies.study(study)
    found = found or _available(study, profile)
    return claims.evaluate(claims.load(study), module.quantities(found) if found else {}, profile=profile)


# ----------------------------------------------------------------------------------------------------------- coverage
def coverage(*, profile: str = "paper") -> list[dict[str, Any]]:
    """Every table and figure of every paper, one object per data set that it is about, with its state."""
    rows = []
    for study in studies.PAPERS:
        for entry in papers.load_published(study)["items"]:
            for data in entry["data"] or [None]:
                state, note = _state(study, entry, data, profile)
                shown = profile if state == "reproduced" else None
                rows.append(
                    {
                        "paper": study,
                        "item": entry["item"],
                        "data": data,
                        "state": state,
                        "profile": shown,
                        "note": note,
                    }
                )
    return rows


def _state(study: str, entry: dict[str, Any], data: str | None, profile: str) -> tuple[str, str]:
    if "not_testable" in entry:
        return "not testable here", entry["not_testable"]
    if study not in studies.STUDIES:
        return "not yet", "this paper's study is not built yet"
    if data is None and not entry["cells"]:
        return "reproduced", "a diagram of our own"
    if data not in RUNNABLE[study]:
        return "not yet", f"the study does not run on {data} yet"
    module = studies.study(study)
    if entry["slug"] not in module.LABELS:
        return "not yet", "no runs are defined for it yet"
    found = _available(study, profile)
    offered = getattr(module, "offered", lambda label, profile: True)
    wanted = [label for label in module.LABELS[entry["slug"]] if offered(label, profile)]
    absent = [label for label in wanted if found is None or label not in found.runs]
    if absent or not wanted:
        absent = absent or module.LABELS[entry["slug"]]
        return "not yet", f"no records of {', '.join(absent[:3])}{' …' if len(absent) > 3 else ''}"
    left_out = module.left_out(entry["slug"], profile) if hasattr(module, "left_out") else ""
    return ("not yet", left_out) if left_out else ("reproduced", entry.get("note", ""))


# --------------------------------------------------------------------------------------------------------------- text
def number(value: float | None, *, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no minus sign before a rounded zero


def interval(values: Sequence[float | None], *, digits: int = 3) -> str:
    low, high = (number(value, digits=digits) for value in values)
    return "-" if values[0] is None else f"[{low}, {high}]"


def plain(cell: dict[str, Any] | None) -> str:
    """mean ± spread, with as many digits as the size of the mean calls for."""
    if cell is None or cell["mean"] is None:
        return "-"
    mean, spread = cell["mean"], cell["spread"]
    if cell["n"] in (0, None) and spread is None and float(mean).is_integer():
        return f"{int(mean):,}"
    digits = 2 if abs(mean) >= 1 else 3 if mean == 0 or abs(mean) >= 0.005 else 4 if abs(mean) >= 0.001 else 5
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")
