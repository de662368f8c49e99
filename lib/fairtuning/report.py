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
from fairtuning.runs import Record, Store, ensure

#: The data set whose place a profile's first one takes (generated data in the classroom's), by paper.
MAIN = {"zhang2024": "adult", "sukumaran2024": "waterbirds", "kamalaruban2025": "celeba"}
#: The profile whose records the book shows, where it is not the papers' own scale.
SHOWN = {"sukumaran2024": "compact", "kamalaruban2025": "compact", "bench": "compact"}


def shown(study: str) -> str:
    """The profile whose records the book shows of a study."""
    return SHOWN.get(study, "paper")


def profiles(study: str) -> list[str]:
    """The profiles that the book shows of a study: that of ``shown``, then others of its that have records."""
    others = [name for name in ("paper", "gpu", "compact") if name != shown(study)]
    return [shown(study), *(name for name in others if Store.of(study, name).records)]


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
def _results(study: str, profile: str, data: str | None, stamp: float) -> Results:
    options = {"data": data} if data else {}
    return studies.study(study).results(Store.of(study, profile), profile, **options)


def results(study: str, profile: str = "paper", data: str | None = None) -> Results:
    """Every record of a study and profile on one data set (default: its first); read once as long as its file stays
    the same."""
    studies.check_profile(studies.study(study), profile)
    path = Store.path_of(study, profile)
    stamp = path.stat().st_mtime if path.is_file() else 0.0
    return _results(study, profile, None if _stands_for(study, profile, data) else data, stamp)


def every(study: str, profile: str) -> dict[str, list[Record]]:
    """The records of every label of a study and profile, on all of its data sets."""
    found: dict[str, list[Record]] = {}
    for data in _own_data(study, profile) or [None]:
        if results := _available(study, profile, data):
            found |= results.runs
    return found


def _own_data(study: str, profile: str) -> list[str]:
    """The data sets that a profile names itself; a study of one data set names none."""
    found = studies.study(study).PROFILES[profile].get("data", {})
    return list(found) if isinstance(found, dict) else []


def _stands_for(study: str, profile: str, data: str | None) -> bool:
    """Whether the results on ``data`` are those of the profile's first data set."""
    own = _own_data(study, profile)
    return data is None or data == (own[0] if own else None) or (data == MAIN.get(study) and data not in own)


def runnable(study: str, profile: str, data: str | None) -> bool:
    """Whether a profile has runs on a data set, or on one that takes its place; "all": what compares data sets."""
    return data in ("all", MAIN.get(study)) or data in _own_data(study, profile)


def read(
    study: str,
    labels: Sequence[str],
    *,
    profile: str,
    seeds: int | None = None,
    data: str | None = None,
    compute: bool = False,
) -> Results | None:
    """The records of ``labels`` on one data set of a profile (default: its first); None where there are none.

    Labels whose seeds are not all there are left out. ``compute`` trains what is missing first.
    """
    module = studies.study(study)
    studies.check_profile(module, profile)
    if compute:
        ensure(module, labels, profile=profile, seeds=seeds)
    options = {} if _stands_for(study, profile, data) else {"data": data}
    try:
        return module.results(Store.of(study, profile), profile, labels=labels, seeds=seeds, **options)
    except MissingRuns:
        return None


def published(cell: dict[str, Any]) -> dict[str, Any]:
    return {name: cell[name] for name in ("mean", "spread", "n")}


def ours(module: ModuleType, found: Results | None, name: str, row: str, column: str, profile: str) -> dict | None:
    """Our mean, standard deviation over seeds (n - 1) and records of one cell; None where it was not run."""
    if found is None and slug(name) not in counted(module):
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
        "data": found.data_name if found else "",
        "records": list(cell.records),
    } | ({"backbone": backbone} if backbone else {})


def items_of(module: ModuleType, slug: str, data: str | None) -> str:
    """The name in LABELS of the runs of a table or figure on one data set: ``figure4-celeba`` where there is one."""
    return f"{slug}-{data}" if f"{slug}-{data}" in module.LABELS else slug


def counted(module: ModuleType) -> tuple[str, ...]:
    """The items of a study that are counted, and need no runs."""
    return module.COUNTED


def table(study: str, name: str, *, profile: str = "paper", found: Results | None = None) -> list[dict[str, Any]]:
    """One object per published cell: row, column, data, published {mean, spread, n}, ours (or None).

    ``found``, where given, is of one data set: the cells of the others then have no "ours".
    """
    cells = item(study, name) and papers.published_cells(study, slug(name))
    module = studies.study(study) if study in studies.STUDIES else None
    by_data = {data: _on(study, profile, data, found) for data in {cell["data"] for cell in cells}} if module else {}
    return [
        {
            "row": cell["row"],
            "column": cell["column"],
            "data": cell["data"],
            "published": published(cell),
            "ours": ours(module, by_data[cell["data"]], name, cell["row"], cell["column"], profile) if module else None,
        }
        for cell in cells
    ]


def _on(study: str, profile: str, data: str | None, found: Results | None) -> Results | None:
    """``found`` if it is of ``data``, else what there is of it."""
    if found is not None:
        return found if _stands_for(study, profile, data) or found.data_name == data else None
    return _available(study, profile, data)


def _available(study: str, profile: str, data: str | None = None) -> Results | None:
    studies.check_profile(studies.study(study), profile)
    if data is not None and not runnable(study, profile, data):
        return None
    try:
        return results(study, profile, data)
    except MissingRuns:
        return None


def verdicts(study: str, *, profile: str = "paper", found: Results | None = None) -> list[Verdict]:
    """A verdict for every claim of a study's paper; ``found``, where given, is of its main data set."""
    module, loaded = studies.study(study), claims.load(study)
    tested = {data for claim in loaded for data, entry in claim.data.items() if not entry.state}
    by_data = {
        data: found if found and data == MAIN.get(study) else _available(study, profile, data)
        for data in sorted(tested)
    }
    quantities = {data: module.quantities(results) if results else {} for data, results in by_data.items()}
    return claims.evaluate(loaded, quantities, profile=profile)


# ----------------------------------------------------------------------------------------------------------- coverage
def coverage(*, profile: str | None = None) -> list[dict[str, Any]]:
    """Every table and figure of every paper, one object per data set that it is about, with its state.

    ``profile``: by default the one that the book shows of each study, or else another one that has it.
    """
    known = {name for study in studies.STUDIES for name in studies.study(study).PROFILES}
    if profile and profile not in known:
        raise FairtuningError(f"profile is {profile!r}; allowed: {', '.join(sorted(known))}")
    rows = []
    for study in studies.PAPERS:
        scales = [profile] if profile or study not in studies.STUDIES else profiles(study)
        for entry in papers.load_published(study)["items"]:
            for data in entry["data"] or [None]:
                states = {scale: _state(study, entry, data, scale) for scale in scales}
                scale = next((scale for scale, (state, _) in states.items() if state == "reproduced"), scales[0])
                state, note = states[scale]
                rows.append(
                    {
                        "paper": study,
                        "item": entry["item"],
                        "data": data,
                        "state": state,
                        "profile": scale if state == "reproduced" else None,
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
    module = studies.study(study)
    if profile not in module.PROFILES:
        return "not yet", f"this paper's study has no profile {profile}"
    if entry["slug"] in counted(module):
        return "reproduced", entry.get("note", "")
    if not runnable(study, profile, data):
        return "not yet", f"profile {profile} does not run on {data}"
    runs = items_of(module, entry["slug"], data)
    if runs not in module.LABELS:
        return "not yet", "no runs are defined for it yet"
    found = _available(study, profile, data)
    wanted = [label for label in module.LABELS[runs] if module.offered(label, profile)]
    absent = [label for label in wanted if found is None or label not in found.runs]
    if absent or not wanted:
        absent = absent or module.LABELS[runs]
        return "not yet", f"no records of {', '.join(absent[:3])}{' …' if len(absent) > 3 else ''}"
    left_out = module.left_out(runs, profile)
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
