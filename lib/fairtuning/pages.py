"""What the book shows: tables, figures for light and dark pages, the scoreboard, the pages of records."""

import base64
import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from fairtuning import claims, papers, report, studies
from fairtuning.analysis import Results
from fairtuning.claims import Verdict
from fairtuning.runs import Record, Store
from fairtuning.statistics import estimate

TEXT = {"light": "#1f2328", "dark": "#e6edf3"}
#: Okabe and Ito's colours, told apart by readers with any common colour blindness; light enough for dark pages too.
COLOURS = {
    "light": ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#996F00", "#3A8FB7", "#555555"],
    "dark": ["#56B4E9", "#E69F00", "#2FC796", "#E19BC4", "#F0E442", "#8CC8EA", "#BBBBBB"],
}
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]


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


def dots(
    found: Results,
    labels: Sequence[str],
    *,
    names: Mapping[str, str] | None = None,
    published: Mapping[tuple[str, str], Mapping[str, Any]] | None = None,
    metrics: Sequence[str] = tuple(TITLES),
    what: str = "",
) -> Figure:
    """One panel per metric, one line per label: our mean with its 95 % interval (seeds and examples), and the paper's
    mean ± standard deviation where ``published[label, metric]`` has one. A dashed line marks the gap in the labels
    themselves, which is the demographic parity difference of a perfect classifier.
    """
    names = names or {}
    values = {(label, metric): estimate(found.effect(label, metric)) for label in labels for metric in metrics}

    def draw(figure: Any, colours: Sequence[str]) -> None:
        for axes, metric in zip(figure.subplots(1, len(metrics), sharey=True), metrics, strict=True):
            for y, label in enumerate(labels):
                one = values[label, metric]
                reach = [[one.effect - one.low], [one.high - one.effect]]
                axes.errorbar(one.effect, y, xerr=reach, fmt="o", color=colours[0], label="ours, 95 % interval")
                if published and (label, metric) in published:
                    cell = published[label, metric]
                    spread = cell["spread"] or 0.0
                    axes.errorbar(
                        cell["mean"], y + 0.25, xerr=spread, fmt="s", mfc="none", color=colours[1],
                        label="paper, standard deviation",
                    )  # fmt: skip
            if metric == "demographic_parity_difference":
                axes.axvline(found.base_rate_gap, ls="--", lw=1, color=colours[6], label="gap in the labels")
            axes.set(xlabel=TITLES.get(metric, metric), ylim=(len(labels) - 0.4, -0.6))
            axes.set_yticks(range(len(labels)), [names.get(label, label) for label in labels])
            axes.xaxis.label.set_fontsize(9)
            axes.locator_params(axis="x", nbins=4)
        handles: dict[str, Any] = {}
        for axes in figure.axes:
            handles |= {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, fontsize=8)

    shown = "; ".join(
        f"{names.get(label, label)}: " + ", ".join(f"{values[label, metric].effect:.3g}" for metric in metrics)
        for label in labels
    )
    alt = f"{what} Mean {', '.join(TITLES.get(metric, metric) for metric in metrics)} by method. {shown}."
    return Figure(draw, alt=alt.strip(), size=(8.0, 1.3 + 0.36 * len(labels)))


def published_by_metric(study: str, name: str, *, data: str, labels: Mapping[str, str] | None = None) -> dict:
    """A paper's cells as ``dots`` takes them: (label, metric) -> cell; ``labels`` maps rows to labels of runs."""
    columns = studies.study(study).METRIC
    return {
        ((labels or {}).get(cell["row"], cell["row"]), columns[cell["column"]]): cell
        for cell in papers.published_cells(study, report.slug(name))
        if cell["data"] == data and cell["column"] in columns
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


def record_link(study: str, records: Sequence[str], text: str) -> str:
    """Text that leads to the records behind it, from a notebook two folders below the book's root."""
    if not records:
        return text
    return f'<a href="../../book/records/{study}.html#run-{records[0]}">{text}</a>'


class RecordsBehind:
    """Links to the records of every run that a page's numbers come from, by label."""

    def __init__(self, study: str, found: Results):
        self.links = [
            record_link(study, [record["key"] for record in records], html.escape(label))
            for label, records in found.runs.items()
        ]

    def _repr_html_(self) -> str:
        return f"<p>The numbers of this page come from the records of: {'; '.join(self.links)}.</p>"


def paper_table(study: str, name: str, *, data: str, profile: str = "paper", found: Any = None) -> Table:
    """One table or figure of a paper: a row per row of the paper, two columns (paper, ours) per column of the paper.

    Ours: mean ± standard deviation over seeds, leading to its records. Best of a column: bold, with a star.
    """
    cells = [cell for cell in report.table(study, name, profile=profile, found=found) if cell["data"] == data]
    rows = list(dict.fromkeys(cell["row"] for cell in cells))
    columns = list(dict.fromkeys(cell["column"] for cell in cells))
    by_place = {(cell["row"], cell["column"]): cell for cell in cells}
    best = {
        (column, source): _best([by_place.get((row, column)) for row in rows], source)
        for column in columns
        for source in ("published", "ours")
    }
    shown = []
    for row in rows:
        line = [html.escape(row)]
        for column in columns:
            cell = by_place.get((row, column))
            for source in ("published", "ours"):
                value = cell[source] if cell else None
                text = report.plain(value)
                if value and _mean(value) == best[column, source]:
                    text = f"<strong>{text} ★</strong>"
                line.append(record_link(study, value["records"], text) if value and source == "ours" else text)
        shown.append(line)
    header = ["", *(f"{html.escape(column)}<br>{who}" for column in columns for who in ("paper", "ours"))]
    entry = report.item(study, name)
    arxiv = papers.load_published(study)["paper"]["arxiv"]
    stars = ", ★ lowest of its column" if any(value is not None for value in best.values()) else ""
    command = f"fairtuning run {study} --profile {profile} --only {entry['slug']}"
    backbones = sorted({cell["ours"]["backbone"] for cell in cells if cell["ours"] and "backbone" in cell["ours"]})
    caption = (
        f"arXiv {arxiv}, {entry['item']}: the paper's numbers and ours (profile {profile}, data "
        f"{', '.join([found.data_name if found else data, *backbones])}; {_spread(cells)}{stars}). "
        f"Each of our numbers leads to its records. Make them again: <code>{command}</code>"
    )
    return Table(header, shown, caption=caption)


def _spread(cells: Sequence[dict]) -> str:
    counts = {cell["ours"]["n"] for cell in cells if cell["ours"] and cell["ours"]["n"]}
    return f"mean ± standard deviation over {max(counts)} seeds" if counts else "counted, not estimated"


def _best(cells: Sequence[dict | None], source: str) -> str | None:
    """The lowest mean, as printed, of a column of errors or gaps that compares methods; None where all print alike."""
    if not all(cell and cell["column"] in ("Err", "DP", "EO") for cell in cells) or len(cells) < 3:
        return None
    found = [cell[source] for cell in cells if cell[source] and cell[source]["mean"] is not None]
    if len(found) < len(cells) or len({_mean(one) for one in found}) == 1:
        return None
    return _mean(min(found, key=lambda one: one["mean"]))


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


# --------------------------------------------------------------------------------------------------------- scoreboard
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
    caption = f"Profile {profile}. Effect and interval are those of the claim's weakest part."
    header = ["claim, data", "what it says", "verdict", "effect", "95 % interval", "reason"]
    return Table(header, rows, caption=caption, prose=True)


def scoreboard(*, profile: str = "paper") -> Figure:
    """One row per claim, one column per data set, the verdict as a sign, a word and a colour."""
    study = "zhang2024"
    verdicts = report.verdicts(study, profile=profile)
    texts = {
        claim.id: " ".join(claim.statement.split()) + (" (ours)" if claim.origin == "ours" else "")
        for claim in claims.load(study)
    }
    names = list(dict.fromkeys(v.id for v in verdicts))
    data = list(dict.fromkeys(v.data for v in verdicts))
    titles = {"adult": "Adult", "celeba": "CelebA", "lfw": "LFW+a"}
    order = ["supported", "contradicted", "unresolved", "not yet", "not testable here"]
    lines = {name: wrap(f"{name[3:]}  {texts[name]}", 88, max_lines=2, placeholder=" …") for name in names}

    def draw(figure: Any, colours: Sequence[str]) -> None:
        colour = dict(zip(order, (colours[0], colours[1], colours[4], colours[6], colours[6]), strict=True))
        axes = figure.add_subplot()
        axes.set(xlim=(-4.6, len(data) - 0.4), ylim=(len(names) - 0.4, -1.1))
        axes.axis("off")
        axes.text(-4.6, -0.8, f"arXiv 2403.00625, profile {profile}", va="center", weight="bold")
        for x, name in enumerate(data):
            axes.text(x, -0.8, titles.get(name, name), ha="center", va="center", weight="bold")
        for y, name in enumerate(names):
            axes.text(-4.6, y, "\n".join(lines[name]), ha="left", va="center", fontsize=7.5)
            axes.axhline(y + 0.5, lw=0.3, color=colours[6])
        markers = {"supported": "o", "contradicted": "X", "unresolved": "$?$", "not yet": "$…$"}
        for v in verdicts:
            x, y = data.index(v.data), names.index(v.id)
            axes.plot(x - 0.36, y, marker=markers.get(v.verdict, "_"), color=colour[v.verdict], ms=6)
            axes.text(x - 0.26, y, v.verdict, ha="left", va="center", color=colour[v.verdict], fontsize=8)

    counts = [f"{sum(v.verdict == o for v in verdicts)} {o}" for o in order if any(v.verdict == o for v in verdicts)]
    alt = f"Scoreboard of the claims of arXiv 2403.00625, profile {profile}: {', '.join(counts)}."
    return Figure(draw, alt=alt, size=(9.0, 0.4 * len(names) + 0.6))


def write_scoreboard(folder: Path, *, profile: str = "paper") -> list[Path]:
    """``scoreboard-light.svg``, ``scoreboard-dark.svg`` and ``scoreboard.md`` (the same as a table) into ``folder``."""
    figure = scoreboard(profile=profile)
    paths = []
    for theme in TEXT:
        paths.append(folder / f"scoreboard-{theme}.svg")
        paths[-1].write_bytes(figure.svg(theme))
    verdicts = report.verdicts("zhang2024", profile=profile)
    texts = {claim.id: claim.statement for claim in claims.load("zhang2024")}
    lines = ["| claim | data | verdict | effect | 95 % interval |", "|---|---|---|---|---|"]
    lines += [
        f"| {v.id}: {' '.join(texts[v.id].split())} | {v.data} | {SIGNS[v.verdict]} {v.verdict} "
        f"| {report.number(v.effect)} | {report.interval(v.interval)} |"
        for v in verdicts
        if v.verdict != "not yet"
    ]
    later = sum(v.verdict == "not yet" for v in verdicts)
    lines += ["", f"Profile {profile}; {later} further verdicts are not given yet."]
    paths.append(folder / "scoreboard.md")
    paths[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


# ------------------------------------------------------------------------------------------------------------ records
def write_record_pages(folder: Path, *, profile: str = "paper") -> list[Path]:
    """``records/<study>.md`` into ``folder``: every number of the book leads to a section there."""
    paths = []
    for study in studies.STUDIES:
        if not Store.path_of(study, profile).is_file():  # no records in this profile
            continue
        path = folder / "records" / f"{study}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_record_page(study, profile), encoding="utf-8")
        paths.append(path)
    return paths


def _record_page(study: str, profile: str) -> str:
    module, store = studies.study(study), Store.of(study, profile)
    found = report.results(study, profile)
    arxiv = papers.load_published(study)["paper"]["arxiv"]
    behind = sum(len(records) for records in found.runs.values())
    lines = [
        f"# Records of arXiv {arxiv}",
        "",
        f"{len(store.records)} records in `results/{store.path.name}`; {behind} stand behind numbers of "
        "this book, in the sections below; the others are the searches that chose settings on the validation data. "
        "A record's key is a hash of its configuration, of the data and of the version of its method.",
        "",
        *_environments(store),
    ]
    for label, records in found.runs.items():
        lines += _record_section(study, module, label, records)
    return "\n".join(lines) + "\n"


def _environments(store: Store) -> list[str]:
    lines = [
        "## Where they were made",
        "",
        "| environment | processor | Python | packages | commit |",
        "|---|---|---|---|---|",
    ]
    for key, entry in store.environments.items():
        packages = ", ".join(f"{name} {version}" for name, version in entry["packages"].items())
        lines.append(f"| `{key}` | {entry['processor']} | {entry['python']} | {packages} | `{entry['commit'][:12]}` |")
    return [*lines, ""]


def _record_section(study: str, module: Any, label: str, records: Sequence[Record]) -> list[str]:
    first = records[0]
    item = next(slug for slug, found in module.LABELS.items() if label in found)
    fields = {name: value for name, value in first["configuration"].items() if name not in ("seed", "order_seed")}
    command = f"fairtuning verify {study} --key {first['key']}"
    own = "profile" in first
    profile = first["profile"] if own else "paper"
    return [
        f"(run-{first['key']})=",
        f"## `{label}`",
        "",
        f"- needed by: {item}; computed by `fairtuning run {study} --profile {profile} --only {item}`",
        f"- seeds: {', '.join(str(record['configuration']['seed']) for record in records)}; "
        f"environment: {', '.join(f'`{key}`' for key in sorted({record['environment'] for record in records}))}; "
        f"{sum(record['seconds'] for record in records):.1f} seconds in all",
        f"- data: {first['data']['name']}, edition {first['data']['edition']}, digest `{first['data']['digest'][:16]}`",
        f"- make one again and compare: `{command}`",
        "",
        "```{dropdown} Configuration and keys",
        f"`{json.dumps(fields)}`",
        "",
        ", ".join(f"`{record['key']}`" for record in records),
        "```",
        "",
    ]
