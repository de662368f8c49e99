"""What a page of the book shows: figures for light and dark pages, tables, verdicts, links to records."""

import base64
import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from fairtuning import claims, papers, report, studies
from fairtuning.analysis import Results
from fairtuning.claims import Verdict
from fairtuning.metrics import METRICS
from fairtuning.statistics import Effect, estimate

TEXT = {"light": "#1f2328", "dark": "#e6edf3"}
#: Okabe and Ito's colours, told apart by readers with any common colour blindness; light enough for dark pages too.
COLOURS = {
    "light": ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#996F00", "#3A8FB7", "#555555"],
    "dark": ["#56B4E9", "#E69F00", "#2FC796", "#E19BC4", "#F0E442", "#8CC8EA", "#BBBBBB"],
}
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
#: Data sets as a page calls them.
DATA = {
    "adult": "Adult", "celeba": "CelebA", "lfw": "LFW+a", "waterbirds": "Waterbirds", "geode": "GeoDE",
    "aircraft": "Aircraft", "utkface": "UTKFace", "kinds": "Kinds of bird",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ figures
class Figure:
    """A figure drawn once for light and once for dark pages; ``draw(figure, colours)`` fills a matplotlib figure.

    ``alt`` says in words what the figure shows; it is required.
    """

    def __init__(self, draw: Callable[[Any, Sequence[str]], None], *, alt: str, size: tuple[float, float] = (7.0, 3.4)):
        self.draw, self.alt, self.size = draw, alt, size

    def svg(self, theme: str) -> bytes:
        """The figure as SVG, transparent, the same bytes each time."""
        import matplotlib
        from matplotlib.figure import Figure as Canvas

        text = TEXT[theme]
        names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
        style = dict.fromkeys(names, text) | {
            "svg.hashsalt": "fairtuning",
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": matplotlib.cycler(color=COLOURS[theme]),
            "legend.frameon": False,
            "legend.labelcolor": text,
        }
        with matplotlib.rc_context(style):
            figure = Canvas(figsize=self.size, layout="constrained")
            self.draw(figure, COLOURS[theme])
            out = io.BytesIO()
            figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return out.getvalue()

    def _repr_html_(self) -> str:
        pictures = [
            f'<img class="fairtuning-{theme}" alt="{html.escape(self.alt)}" '
            f'src="data:image/svg+xml;base64,{base64.b64encode(self.svg(theme)).decode()}">'
            for theme in TEXT
        ]
        return THEME_STYLE + "".join(pictures)


# The book's own dark theme sets data-theme, JupyterLab's data-jp-theme-light; anywhere else the light picture is shown.
THEME_STYLE = (
    "<style>.fairtuning-light,.fairtuning-dark{max-width:100%;background:none!important;filter:none!important}"
    ".fairtuning-dark{display:none}"
    'html[data-theme="dark"] .fairtuning-light,[data-jp-theme-light="false"] .fairtuning-light{display:none}'
    'html[data-theme="dark"] .fairtuning-dark,[data-jp-theme-light="false"] .fairtuning-dark{display:inline}</style>'
)


TITLES = {
    "error": "error (100 - weighted F1), %",
    "demographic_parity_difference": "demographic parity difference",
    "equalized_odds_difference_sum": "equalized odds difference (sum)",
}


Effects = Mapping[str, Callable[..., Effect]]  # title of a measure -> function of a label


def dots(
    found: Results | None,
    labels: Sequence[str],
    *,
    names: Mapping[str, str] | None = None,
    published: Mapping[tuple[str, str], Mapping[str, Any]] | None = None,
    metrics: Sequence[str] | Effects = tuple(TITLES),
    shown: Sequence[str] = (),
    aligned: bool = False,
    what: str = "",
) -> "Figure | Missing":
    """One panel per metric, one line per label: our mean with its 95 % interval (seeds and examples), and the paper's
    mean ± standard deviation where ``published[label, metric]`` has one. A dashed line marks the gap in the labels
    themselves, which is the demographic parity difference of a perfect classifier.

    ``metrics`` are names of METRICS or measures of a study; ``shown`` are those that have a panel, by default all.
    Labels without records show the paper's numbers alone, and without these nothing. ``aligned``: a unit has the same
    length in all panels.
    """
    names, published, present = names or {}, published or {}, having(found, labels)
    measures = metrics if isinstance(metrics, Mapping) else {name: partial(_effect, found, name) for name in metrics}
    panels = [name for name in shown or (metrics if not isinstance(metrics, Mapping) else measures)]
    values = {
        (label, name): estimate(measures[name](label)) for label in present for name in panels if name in measures
    }
    rows = [label for label in labels if any((label, name) in values or (label, name) in published for name in panels)]
    if not rows:
        return Missing(f"no records yet of {', '.join(labels)}")

    down, high = 1 if len(panels) < 6 else math.ceil(len(panels) / 4), 0.36 if len(rows) < 10 else 0.26
    across = math.ceil(len(panels) / down)

    def draw(figure: Any, colours: Sequence[str]) -> None:
        grid = list(figure.subplots(down, across, sharey=True, squeeze=False).flat)
        for axes in grid[len(panels) :]:
            axes.remove()
        for axes, name in zip(grid, panels, strict=False):
            for y, label in enumerate(rows):
                one, cell = values.get((label, name)), published.get((label, name))
                if one:
                    reach = None if math.isnan(one.low) else [[one.effect - one.low], [one.high - one.effect]]
                    axes.errorbar(one.effect, y, xerr=reach, fmt="o", color=colours[0], label="ours, 95 % interval")
                if cell:
                    axes.errorbar(
                        cell["mean"], y + (0.25 if one else 0), xerr=cell["spread"] or 0.0, fmt="s", mfc="none",
                        color=colours[1], label="paper, standard deviation",
                    )  # fmt: skip
            if found is not None and name == "demographic_parity_difference":
                axes.axvline(found.base_rate_gap, ls="--", lw=1, color=colours[6], label="gap in the labels")
            axes.set(xlabel=TITLES.get(name, name), ylim=(len(rows) - 0.4, -0.6))
            axes.set_yticks(range(len(rows)), [names.get(label, label) for label in rows])
            axes.xaxis.label.set_fontsize(9)
            axes.locator_params(axis="x", nbins=4)
            axes.tick_params(axis="x", labelsize=8)
            axes.grid(axis="y", lw=0.3, color=colours[6])
        if aligned:
            limits = [axes.get_xlim() for axes in figure.axes]
            half = max(high - low for low, high in limits) / 2
            for axes, (low, high) in zip(figure.axes, limits, strict=True):
                axes.set_xlim((low + high) / 2 - half, (low + high) / 2 + half)
        handles: dict[str, Any] = {}
        for axes in figure.axes:
            handles |= {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, fontsize=8)

    def told(label: str, name: str) -> str:
        ours = f"{values[label, name].effect:.3g}" if (label, name) in values else ""
        paper = f"paper {published[label, name]['mean']:.4g}" if published and (label, name) in published else ""
        return (ours or paper) if not (ours and paper) else ours if name in TITLES else f"{ours} ({paper})"

    text = "; ".join(
        f"{names.get(label, label)}: " + ", ".join(filter(None, (told(label, name) for name in panels)))
        for label in rows
    )
    alt = f"{what} Mean {', '.join(TITLES.get(name, name) for name in panels)} by method. {text}."
    return Figure(draw, alt=alt.strip(), size=(max(8.0, 1.7 * across), 0.6 + down * (0.7 + high * len(rows))))


def _effect(found: Results, metric: str, label: str) -> Effect:
    return found.effect(label, metric)


def having(found: Results | None, labels: Sequence[str]) -> list[str]:
    """The labels that have records."""
    return [label for label in labels if found is not None and label in found.runs]


def published_by_metric(study: str, name: str, *, data: str, labels: Mapping[str, str] | None = None) -> dict:
    """A paper's cells as ``dots`` takes them: (label, metric) -> cell; ``labels`` maps rows to labels of runs.

    Where a study's columns have a unit of their own (a metric and a factor), the column stands for the metric.
    """
    columns = studies.study(study).METRIC
    named = {column: how if isinstance(how, str) else column for column, how in columns.items()}
    return {
        ((labels or {}).get(cell["row"], cell["row"]), named.get(cell["column"], cell["column"])): cell
        for cell in papers.published_cells(study, report.slug(name))
        if cell["data"] == data and (cell["column"] in columns or named != columns)
    }


# ------------------------------------------------------------------------------------------------------------- tables
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


class Missing:
    """What stands in the place of numbers that have no records."""

    def __init__(self, text: str, *, title: str = "Not run yet."):
        self.text, self.title = text, title

    def _repr_html_(self) -> str:
        return f"<p><strong>{html.escape(self.title)}</strong> {self.text}</p>"


def scale(study: str, found: Results | None, *, profile: str) -> str:
    """In words what the runs of a page were: profile, data, backbone, seeds."""
    if found is None or not found.runs:
        return f"profile {profile}"
    records = max(found.runs.values(), key=len)
    made_by = records[0]["configuration"]
    named = getattr(studies.study(study), "BACKBONES", {})
    backbone = f", {named.get(made_by['backbone'], made_by['backbone'])} at {made_by['size']} px" if named else ""
    return f"profile {profile}, data {found.data_name}{backbone}, {len(records)} seeds"


def state(study: str, labels: Sequence[str], found: Results | None, *, profile: str) -> Missing:
    """At the head of a page: at which scale its numbers were measured, what has no records, the command for it."""
    module = studies.study(study)
    absent = [label for label in labels if label not in having(found, labels)]
    all_offered = lambda label, profile: True  # noqa: E731
    offered = [label for label in absent if getattr(module, "offered", all_offered)(label, profile)]
    items = {next((slug for slug, named in module.LABELS.items() if label in named), "") for label in offered}
    parts = []
    if offered:
        commands = "; ".join(
            f"<code>fairtuning run {study} --profile {profile} --only {item}</code>" for item in sorted(items) if item
        )
        if "" in items:
            commands = "; ".join(filter(None, [commands, "the parameter <code>compute = True</code> of this page"]))
        parts.append(f"No records yet: {html.escape(', '.join(offered))}; to make them: {commands}.")
    if left := [label for label in absent if label not in offered]:
        parts.append(f"Profile {profile} does not offer: {html.escape(', '.join(left))}.")
    title = f"Measured here: {scale(study, found, profile=profile)}." if len(absent) < len(labels) else "Not run yet."
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
    rows = list(dict.fromkeys(cell["row"] for cell in cells))
    columns = list(dict.fromkeys(cell["column"] for cell in cells))
    by_place = {(cell["row"], cell["column"]): cell for cell in cells}
    block = {row: row.split()[0] if blocks else "" for row in rows}
    best = {
        (block[row], column, source): _best(
            study, [by_place.get((other, column)) for other in rows if block[other] == block[row]], source
        )
        for row in rows
        for column in columns
        for source in ("published", "ours")
    }

    def text(row: str, column: str, source: str) -> str:
        cell = by_place.get((row, column))
        value = cell[source] if cell else None
        found = report.plain(value)
        if value and _mean(value) == best[block[row], column, source]:
            found = f"<strong>{found} ★</strong>"
        return record_link(study, value["records"], found) if value and source == "ours" else found

    if blocks:
        header, shown = ["", *map(html.escape, columns)], []
        for name_of_block in dict.fromkeys(block.values()):
            of_block = [row for row in rows if block[row] == name_of_block]
            shown += [[html.escape(row), *(text(row, column, "published") for column in columns)] for row in of_block]
            for row in of_block:
                values = [cell["ours"] for column in columns if (cell := by_place.get((row, column))) and cell["ours"]]
                if values:
                    method = html.escape(row.partition(" ")[2])
                    backbone = html.escape(values[0].get("backbone", ""))
                    shown.append([f"ours: {method}<br>{backbone}", *(text(row, column, "ours") for column in columns)])
    else:
        header = ["", *(f"{html.escape(column)}<br>{who}" for column in columns for who in ("paper", "ours"))]
        shown = [
            [html.escape(row), *(text(row, column, who) for column in columns for who in ("published", "ours"))]
            for row in rows
        ]
    entry = report.item(study, name)
    arxiv = papers.load_published(study)["paper"]["arxiv"]
    lowest = all(_better(study, column) != "higher" for column in columns)
    mark = f", ★ {'best of its backbone' if blocks else 'lowest of its column' if lowest else 'best of its column'}"
    stars = mark if any(value is not None for value in best.values()) else ""
    backbones = sorted({cell["ours"]["backbone"] for cell in cells if cell["ours"] and "backbone" in cell["ours"]})
    numbers = f"arXiv {arxiv}, {entry['item']}: the paper's numbers"
    if not any(cell["ours"] for cell in cells):
        told = ", ".join(filter(None, [_spread(cells), stars.removeprefix(", ")]))
        return Table(header, shown, caption=f"{numbers}{f' ({told})' if told else ''}; ours: no records yet.")
    if entry["slug"] in report.counted(studies.study(study)):
        return Table(header, shown, caption=f"{numbers}, and ours, counted: no run is needed.")
    runs = report.items_of(studies.study(study), entry["slug"], data)
    command = f"fairtuning run {study} --profile {profile} --only {runs}"
    measured = dict.fromkeys(report.in_place(cell["ours"]["data"], cell["data"]) for cell in cells if cell["ours"])
    caption = (
        f"{numbers} and ours (profile {profile}, data "
        f"{', '.join([*measured, *backbones])}; {_spread(cells)}{stars}). "
        f"Each of our numbers leads to its records. Make them again: <code>{command}</code>"
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
    how = getattr(studies.study(study), "METRIC", {}).get(column)
    return METRICS[how if isinstance(how, str) else how[0]].better if how else None


def _best(study: str, cells: Sequence[dict | None], source: str) -> str | None:
    """The best mean, as printed, of a column that compares methods; None where all print alike."""
    if len(cells) < 3 or not all(cell and _better(study, cell["column"]) for cell in cells):
        return None
    found = [cell[source] for cell in cells if cell[source] and cell[source]["mean"] is not None]
    if len(found) < len(cells) or len({_mean(one) for one in found}) == 1:
        return None
    pick = max if _better(study, cells[0]["column"]) == "higher" else min
    return _mean(pick(found, key=lambda one: one["mean"]))


def _mean(cell: dict[str, Any]) -> str:
    return report.plain(cell).split(" ")[0]


def effects_table(rows: Sequence[tuple[str, Any, str]], *, caption: str, digits: int = 3) -> Table:
    """Effects with 95 % intervals over seeds and examples: (what, Estimate, unit) each."""
    shown = [
        [
            html.escape(what),
            report.number(estimate.effect, digits=digits) + unit,
            f"[{report.number(estimate.low, digits=digits)}, {report.number(estimate.high, digits=digits)}]",
            str(estimate.n),
        ]
        for what, estimate, unit in rows
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
    there = [(of, minus) for of, minus in pairs if len(having(found, [of, minus])) == 2]
    there = [(of, minus) for of, minus in there if len(found.runs[of]) == len(found.runs[minus])]
    if not there:
        return Missing(f"no records yet of {'; '.join(f'{of} with {minus}' for of, minus in pairs)}")
    names = list(shown or measures)
    rows = [
        (f"{html.escape(of)}<br>- {html.escape(minus)}", [measures[name](of, minus=minus) for name in names])
        for of, minus in there
    ]
    return _matrix(names, rows, caption=caption, digits=digits)


def levels(
    found: Results | None, labels: Sequence[str], measures: Effects, *, caption: str, digits: int = 1
) -> Table | Missing:
    """Means with their 95 % intervals: a row per label that has records, a column per measure."""
    there = having(found, labels)
    if not there:
        return Missing(f"no records yet of {', '.join(labels)}")
    rows = [(html.escape(label), [effect(label) for effect in measures.values()]) for label in there]
    return _matrix(list(measures), rows, caption=caption, digits=digits)


def _matrix(names: Sequence[str], rows: Sequence[tuple[str, list[Effect]]], *, caption: str, digits: int) -> Table:
    def cell(effect: Effect) -> str:
        one = estimate(effect)
        low, high = (report.number(value, digits=digits) for value in (one.low, one.high))
        return f"{report.number(one.effect, digits=digits)}<br>[{low}, {high}]"

    seeds = sorted({len(effects[0].by_seed) for _, effects in rows})
    caption = f"{caption} In brackets 95 % intervals; {' and '.join(map(str, seeds))} seeds."
    return Table(
        ["", *map(html.escape, names)], [[what, *map(cell, effects)] for what, effects in rows], caption=caption
    )


# ----------------------------------------------------------------------------------------------------------- verdicts
SIGNS = {"supported": "●", "contradicted": "✕", "unresolved": "?", "not yet": "…", "not testable here": "-"}


def claims_table(study: str, *, profile: str = "paper", verdicts: Sequence[Verdict] | None = None) -> Table:
    """Every claim of a paper with its verdict, effect, interval and reason."""
    verdicts = report.verdicts(study, profile=profile) if verdicts is None else verdicts
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
        for v in verdicts
    ]
    caption = f"Profile {profile}. {own_scale(profile)}Effect and interval are those of the claim's weakest part."
    header = ["claim, data", "what it says", "verdict", "effect", "95 % interval", "reason"]
    return Table(header, rows, caption=caption, prose=True)


def parts_table(verdicts: Sequence[Verdict]) -> Table:
    """Every part of every claim with its test, and what is shown beside it."""

    def p_value(p: float | None) -> str:
        return "-" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}"

    rows = []
    for verdict in verdicts:
        for part in [*verdict.parts, *verdict.beside]:
            low, high = part["interval"]
            rows.append(
                [
                    f"{verdict.id}, {verdict.data}",
                    part["says"],
                    part.get("test", "shown only"),
                    f"{part['m']:g}" if "m" in part else "-",
                    report.number(part["effect"], digits=4),
                    f"[{report.number(low, digits=4)}, {report.number(high, digits=4)}]",
                    *(p_value(part.get(name)) for name in ("p_support", "p_contradiction")),
                ]
            )
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
