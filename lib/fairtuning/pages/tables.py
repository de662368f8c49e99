"""The tables of the book: a paper's numbers beside ours, effects with intervals, verdicts, links to records."""

import html
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from fairtuning import claims, papers, report, studies
from fairtuning.analysis import Results
from fairtuning.claims import Verdict
from fairtuning.metrics import METRICS
from fairtuning.statistics import Effect, Estimate, estimate

#: Data sets as a page calls them.
DATA = {
    "adult": "Adult", "celeba": "CelebA", "lfw": "LFW+a", "waterbirds": "Waterbirds", "geode": "GeoDE",
    "aircraft": "Aircraft", "utkface": "UTKFace", "kinds": "Kinds of bird",
}  # fmt: skip
TITLES = {
    "error": "error (100 - weighted F1), %",
    "demographic_parity_difference": "demographic parity difference",
    "equalized_odds_difference_sum": "equalized odds difference (sum)",
}
SIGNS = {"supported": "●", "contradicted": "✕", "unresolved": "?", "not yet": "…", "not testable here": "-"}

Effects = Mapping[str, Callable[..., Effect]]  # title of a measure -> function (of, minus=None)


class Table:
    """A plain HTML table: header and cells are HTML already (escape text with ``html.escape``)."""

    def __init__(self, header: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str, prose: bool = False):
        self.header, self.rows, self.caption = list(header), [list(row) for row in rows], caption
        self.kind = "fairtuning prose table" if prose else "fairtuning table"  # prose: cells hold sentences, and wrap

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col">{cell}</th>' for cell in self.header)
        body = "\n".join(
            f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
            for row in self.rows
        )
        return (
            f'<table class="{self.kind}">\n<caption>{self.caption}</caption>\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
        )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return ["", *(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)), ""]


class Missing:
    """What stands in the place of numbers that have no records."""

    def __init__(self, text: str, *, title: str = "Not run yet."):
        self.text, self.title = text, title

    def _repr_html_(self) -> str:
        return f"<p><strong>{html.escape(self.title)}</strong> {self.text}</p>"


# ------------------------------------------------------------------------------------------------- what a page is about
def having(found: Results | None, labels: Sequence[str]) -> list[str]:
    """The labels that have records."""
    return [label for label in labels if found is not None and label in found.runs]


def scale(study: str, found: Results | None, *, profile: str) -> str:
    """In words what the runs of a page were: profile, data, backbone, seeds."""
    if found is None or not found.runs:
        return f"profile {profile}"
    records, named = max(found.runs.values(), key=len), studies.study(study).BACKBONES
    made_by = records[0]["configuration"]
    backbone = f", {named.get(made_by['backbone'], made_by['backbone'])} at {made_by['size']} px" if named else ""
    return f"profile {profile}, data {found.data_name}{backbone}, {len(records)} seeds"


def state(study: str, labels: Sequence[str], found: Results | None, *, profile: str) -> Missing:
    """At the head of a page: at which scale its numbers were measured, what has no records, the command for it."""
    module, there = studies.study(study), having(found, labels)
    absent = [label for label in labels if label not in there]
    offered = [label for label in absent if module.offered(label, profile)]
    items = {next((slug for slug, named in module.LABELS.items() if label in named), "") for label in offered}
    parts = []
    if offered:
        commands = [
            f"<code>fairtuning run {study} --profile {profile} --only {item}</code>" for item in sorted(items) if item
        ]
        if "" in items:
            commands.append("the parameter <code>compute = True</code> of this page")
        parts.append(f"No records yet: {html.escape(', '.join(offered))}; to make them: {'; '.join(commands)}.")
    if left := [label for label in absent if label not in offered]:
        parts.append(f"Profile {profile} does not offer: {html.escape(', '.join(left))}.")
    title = f"Measured here: {scale(study, found, profile=profile)}." if there else "Not run yet."
    return Missing(" ".join(parts), title=title)


def record_link(study: str, records: Sequence[str], text: str) -> str:
    """Text that leads to the records behind it, from a notebook two folders below the book's root."""
    if not records:
        return text
    return f'<a href="../../book/records/{study}.html#run-{records[0]}">{text}</a>'


class RecordsBehind:
    """Links to the records of every run that a page's numbers come from, by label."""

    def __init__(self, study: str, *found: Results | None):
        self.links = [
            record_link(study, [record["key"] for record in records], html.escape(label))
            for results in found
            if results is not None
            for label, records in results.runs.items()
        ]

    def _repr_html_(self) -> str:
        if not self.links:
            return "<p>No number of ours on this page comes from a run yet.</p>"
        return f"<p>The numbers of this page come from the records of: {'; '.join(self.links)}.</p>"


# ------------------------------------------------------------------------------------------------------ paper and ours
def published_by_metric(study: str, name: str, *, data: str, labels: Mapping[str, str] | None = None) -> dict:
    """A paper's cells as ``figures.dots`` takes them: (label, metric) -> cell; ``labels`` maps rows to labels of runs.

    Where a study's columns have a unit of their own (a metric and a factor), the column stands for the metric.
    """
    columns = studies.study(study).METRIC
    named = {column: how if isinstance(how, str) else column for column, how in columns.items()}
    return {
        ((labels or {}).get(cell["row"], cell["row"]), named.get(cell["column"], cell["column"])): cell
        for cell in papers.published_cells(study, report.slug(name))
        if cell["data"] == data and (cell["column"] in columns or named != columns)
    }


def paper_table(
    study: str, name: str, *, data: str | None, profile: str = "paper", found: Any = None, blocks: bool = False
) -> Table:
    """One table or figure of a paper: a row per row of the paper, two columns (paper, ours) per column of the paper.

    Ours: mean ± standard deviation over seeds, leading to its records. Best of a column: bold, with a star. ``blocks``:
    rows that begin with the same word (a backbone) belong together, the best is the best of a block, and ours are rows
    of their own below the paper's, for their backbone may be another. ``data`` None: all of the table's data sets.
    """
    cells = [
        cell for cell in report.table(study, name, profile=profile, found=found) if data is None or cell["data"] == data
    ]
    rows, columns = (list(dict.fromkeys(cell[what] for cell in cells)) for what in ("row", "column"))
    by_place = {(cell["row"], cell["column"]): cell for cell in cells}
    better = {column: _better(study, column) for column in columns}
    block = {row: tuple(one for one in rows if not blocks or one.split()[0] == row.split()[0]) for row in rows}
    best = {
        (row, column, who): _best(better[column], [by_place.get((one, column)) for one in block[row]], who)
        for row, column, who in product(rows, columns, ("published", "ours"))
    }

    def text(row: str, column: str, who: str) -> str:
        cell = by_place.get((row, column))
        value = cell[who] if cell else None
        found = report.plain(value)
        if value and _mean(value) == best[row, column, who]:
            found = f"<strong>{found} ★</strong>"
        return record_link(study, value["records"], found) if value and who == "ours" else found

    if blocks:
        header, shown = ["", *map(html.escape, columns)], []
        for members in dict.fromkeys(block.values()):
            shown += [[html.escape(row), *(text(row, column, "published") for column in columns)] for row in members]
            for row in members:
                values = [cell["ours"] for column in columns if (cell := by_place.get((row, column))) and cell["ours"]]
                if values:
                    what = f"ours: {html.escape(row.partition(' ')[2])}<br>{html.escape(values[0].get('backbone', ''))}"
                    shown.append([what, *(text(row, column, "ours") for column in columns)])
    else:
        header = ["", *(f"{html.escape(column)}<br>{who}" for column in columns for who in ("paper", "ours"))]
        shown = [
            [html.escape(row), *(text(row, column, who) for column in columns for who in ("published", "ours"))]
            for row in rows
        ]
    entry = report.item(study, name)
    numbers = f"arXiv {papers.load_published(study)['paper']['arxiv']}, {entry['item']}: the paper's numbers"
    mark = "best of its column" if "higher" in better.values() else "lowest of its column"
    mark = "best of its backbone" if blocks else mark
    said = list(filter(None, [_spread(cells), f"★ {mark}" if any(best.values()) else ""]))
    if not any(cell["ours"] for cell in cells):
        caption = numbers + (f" ({', '.join(said)})" if said else "") + "; ours: no records yet."
    elif entry["slug"] in studies.study(study).COUNTED:
        caption = f"{numbers}, and ours, counted: no run is needed."
    else:
        runs = report.items_of(studies.study(study), entry["slug"], data)
        backbones = sorted({cell["ours"]["backbone"] for cell in cells if cell["ours"] and "backbone" in cell["ours"]})
        measured = dict.fromkeys(report.in_place(cell["ours"]["data"], cell["data"]) for cell in cells if cell["ours"])
        scale = ", ".join([*measured, *backbones])
        caption = (
            f"{numbers} and ours (profile {profile}, data {scale}; {', '.join(said)}). Each of our numbers leads to "
            f"its records. Make them again: <code>fairtuning run {study} --profile {profile} --only {runs}</code>"
        )
    return Table(header, shown, caption=caption)


def _spread(cells: Sequence[dict]) -> str:
    seeds, runs = (
        max((cell[source]["n"] or 0 for cell in cells if cell[source]), default=0) for source in ("ours", "published")
    )
    if not seeds:
        return "counted, not estimated" if any(cell["ours"] for cell in cells) else f"over {runs} runs" if runs else ""
    theirs = f" (the paper's over {runs} runs)" if runs and runs != seeds else ""
    return f"mean ± standard deviation over {seeds} seeds{theirs}"


def _better(study: str, column: str) -> str | None:
    how = studies.study(study).METRIC.get(column)
    return METRICS[how if isinstance(how, str) else how[0]].better if how else None


def _best(better: str | None, cells: Sequence[dict | None], who: str) -> str | None:
    """The best mean, as printed, of a column that compares methods; None where all print alike."""
    found = [cell[who] for cell in cells if cell and cell[who] and cell[who]["mean"] is not None]
    if not better or len(found) < max(3, len(cells)) or len({_mean(one) for one in found}) == 1:
        return None
    return _mean((max if better == "higher" else min)(found, key=lambda one: one["mean"]))


def _mean(cell: dict[str, Any]) -> str:
    return report.plain(cell).split(" ")[0]


# ------------------------------------------------------------------------------------------------------------- effects
def stacked(one: Estimate, *, digits: int = 3, signed: bool = False, small: bool = False) -> str:
    """A cell of an effect above its interval."""
    value, interval = report.number(one.effect, digits=digits), report.interval((one.low, one.high), digits=digits)
    plus = "+" if signed and one.effect > 0 and float(value) != 0 else ""
    return f"{plus}{value}<br>" + (f"<small>{interval}</small>" if small else interval)


def effects_table(rows: Sequence[tuple[str, Estimate, str]], *, caption: str, digits: int = 3) -> Table:
    """Effects with 95 % intervals over seeds and examples: (what, Estimate, unit) each."""
    shown = [
        [
            html.escape(what),
            report.number(one.effect, digits=digits) + unit,
            report.interval((one.low, one.high), digits=digits),
            str(one.n),
        ]
        for what, one, unit in rows
    ]
    return Table(["", "effect", "95 % interval", "seeds"], shown, caption=caption)


def differences(
    found: Results | None,
    pairs: Sequence[tuple[str, str]],
    measures: Effects,
    *,
    shown: Sequence[str] = (),
    caption: str,
    digits: int = 1,
) -> Table | Missing:
    """Effects of the first label less the second with their 95 % intervals: a row per pair that has records, a column
    per measure."""
    there = [pair for pair in pairs if len(having(found, pair)) == 2]
    there = [(of, minus) for of, minus in there if len(found.runs[of]) == len(found.runs[minus])]
    if not there:
        return Missing(f"no records yet of {'; '.join(f'{of} with {minus}' for of, minus in pairs)}")
    names = list(shown or measures)
    rows = [
        (f"{html.escape(of)}<br>- {html.escape(minus)}", [measures[name](of, minus=minus) for name in names])
        for of, minus in there
    ]
    return _matrix(names, rows, caption, digits)


def levels(
    found: Results | None, labels: Sequence[str], measures: Effects, *, caption: str, digits: int = 1
) -> Table | Missing:
    """Means with their 95 % intervals: a row per label that has records, a column per measure."""
    rows = [(html.escape(label), [effect(label) for effect in measures.values()]) for label in having(found, labels)]
    return _matrix(list(measures), rows, caption, digits) if rows else Missing(f"no records yet of {', '.join(labels)}")


def _matrix(names: Sequence[str], rows: Sequence[tuple[str, list[Effect]]], caption: str, digits: int) -> Table:
    seeds = sorted({len(effects[0].by_seed) for _, effects in rows})
    caption = f"{caption} In brackets 95 % intervals; {' and '.join(map(str, seeds))} seeds."
    shown = [[what, *(stacked(estimate(effect), digits=digits) for effect in effects)] for what, effects in rows]
    return Table(["", *map(html.escape, names)], shown, caption=caption)


# ------------------------------------------------------------------------------------------------------------ verdicts
def claims_table(study: str, *, profile: str = "paper", verdicts: Sequence[Verdict] | None = None) -> Table:
    """Every claim of a paper with its verdict, effect, interval and reason."""
    texts = {claim.id: claim for claim in claims.load(study)}
    rows = [
        [
            f"{v.id}, {v.data}",
            html.escape(texts[v.id].statement) + (" <em>(ours)</em>" if texts[v.id].origin == "ours" else ""),
            f"{SIGNS[v.verdict]} {v.verdict}",
            report.number(v.effect, digits=4),
            report.interval(v.interval, digits=4),
            html.escape(v.reason),
        ]
        for v in (report.verdicts(study, profile=profile) if verdicts is None else verdicts)
    ]
    caption = f"Profile {profile}. {own_scale(profile)}Effect and interval are those of the claim's weakest part."
    header = ["claim, data", "what it says", "verdict", "effect", "95 % interval", "reason"]
    return Table(header, rows, caption=caption, prose=True)


def parts_table(verdicts: Sequence[Verdict]) -> Table:
    """Every part of every claim with its test, and what is shown beside it."""

    def p_value(p: float | None) -> str:
        return "-" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}"

    rows = [
        [
            f"{verdict.id}, {verdict.data}",
            part["says"],
            part.get("test", "shown only"),
            f"{part['m']:g}" if "m" in part else "-",
            report.number(part["effect"], digits=4),
            f"[{', '.join(report.number(end, digits=4) for end in part['interval'])}]",
            *(p_value(part.get(name)) for name in ("p_support", "p_contradiction")),
        ]
        for verdict in verdicts
        for part in [*verdict.parts, *verdict.beside]
    ]
    return Table(
        ["claim, data", "part", "test", "m", "effect", "95 % interval", "p support", "p contradiction"],
        rows,
        caption="p values before Holm's correction. greater: effect above 0, may reach m; not_worse: harm below m; "
        "equivalent: within ± m; exact: a number without sampling error; shown only: another reading, not tested.",
        prose=True,
    )


def own_scale(profile: str) -> str:
    """What has to be said of a verdict that is not of the paper's scale."""
    return "" if profile == "paper" else "A verdict of this profile is about its scale, not about the paper's. "
