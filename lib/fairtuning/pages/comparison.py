"""What the comparison of methods shows: tables and figures of one data set, and a page of them for your own data."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import seaborn
from pandas import DataFrame

from fairtuning import claims, runs
from fairtuning.analysis import Results
from fairtuning.datasets import GroupedData, own
from fairtuning.pages import figures, tables
from fairtuning.plan import Study
from fairtuning.runs import Store
from fairtuning.statistics import estimate
from fairtuning.studies import bench
from fairtuning.studies.bench.configuration import FEWEST_FOR_DFR, METHODS, OF_TABLES, RANK
from fairtuning.studies.bench.tables import ADAPTERS, SHOWN, row_of, rows

TITLES = {
    "accuracy": "accuracy",
    "worst_cell_accuracy": "worst group",
    "demographic_parity_difference": "demographic parity difference",
    "equalized_odds_difference_max": "equalized odds difference (max)",
}
PARTS = ("training", "validation", "test")


def told(row: str) -> str:
    """Where the attribute is needed for a row: in training, in validation (to select, or to fit), at test."""
    parts = set(METHODS[_method(row)].told) | ({"validation"} if row.endswith("/R2") else set())
    return ", ".join(part for part in PARTS if part in parts) or "nowhere"


def _method(row: str) -> str:
    return row.split("/")[0].split("=")[0]


def _setting(found: Results, row: str) -> str:
    configuration, method = found.records(row)[0]["configuration"], METHODS[_method(row)]
    if not method.strengths:
        return "-"
    given = ", given" if "=" in row else ""
    return f"{method.strength}<br>{configuration['strength'] or configuration['learning_rate']:g}{given}"


def methods_table(
    data: str, found: Results, *, rule: str = "R2", beside: Mapping[str, Results] | None = None, linked: bool = False
) -> tables.Table:
    """One row per method: what it is told, each metric with its interval, its setting, seconds, parameters.

    ``beside``: adapters on the same test images (``bench.adapters``), shown below. ``linked``: names lead to
    ``records_table``; else what a method does stands below its name.
    """
    shown = []
    for row in rows(found, rule):
        name = html.escape(row.split("/")[0])
        if linked:
            name = f'<a href="#run-{found.records(row)[0]["key"]}">{name}</a>'
        else:
            name += f"<br><small>{html.escape(METHODS[_method(row)].title)}</small>"
        shown.append(_row(found, row, name, told(row), _setting(found, row), seconds=2))
    for study, results in (beside or {}).items():
        shown += [_adapter_row(study, results, row) for row in results.runs]
    seeds = len(next(iter(found.runs.values())))
    constant = float(found.label.bincount().max()) / len(found.label)
    caption = (
        f"{html.escape(data)}: mean over {seeds} seeds on {len(found.label):,} test rows, with its 95 % interval over "
        f"seeds and rows; settings selected by {rule}; worst group: the lowest accuracy over label and group together. "
        "Every method needs the label in training. "
        f"The more frequent label alone is right in {constant:.3f} of the rows, a coin in half of every group. "
        "Seconds: of one core, a run's share of its stack, searches not counted."
    )
    if beside:
        caption += " Adapters: settings selected by the rules of their own study; timed on a machine that did more."
    header = ["method", "attribute needed in", *(TITLES[metric] for metric in SHOWN), "setting", "seconds", "trained"]
    return tables.Table(header, shown, caption=caption)


def _row(results: Results, row: str, name: str, needed: str, setting: str, *, seconds: int) -> list[str]:
    records = results.records(row)
    return [
        name,
        needed.replace(", ", ",<br>"),
        *(tables.stacked(estimate(results.effect(row, metric)), small=True) for metric in SHOWN),
        setting,
        f"{sum(record['seconds'] for record in records) / len(records):.{seconds}f}",
        f"{records[0]['parameters']:,}",
    ]


def _adapter_row(study: str, results: Results, row: str) -> list[str]:
    records = results.records(row)
    configuration = records[0]["configuration"]
    short = row.removesuffix(f"/{configuration['data']}")
    strength = configuration.get("penalty", configuration.get("strength"))
    name = tables.record_link(study, [record["key"] for record in records], html.escape(short))
    trained = "all weights" if configuration["method"] == "full" else "adapters"
    name += f"<br><small>{trained}, {len(records)} seeds</small>"
    setting = f"{'lambda' if 'penalty' in configuration else 'strength'}<br>{strength:g}" if strength else "-"
    return _row(results, row, name, ", ".join(ADAPTERS[study][short]) or "nowhere", setting, seconds=0)


def differences_table(data: str, found: Results, *, rule: str = "R2") -> tables.Table:
    """Every method less ERM, paired by seed; a star where Holm's adjusted p is below 0.05."""
    by_row: dict[str, list[str]] = {}
    for one in bench.differences(found, rule):
        cell = tables.stacked(one.estimate, signed=True, small=True) + (" ★" if one.p < 0.05 else "")
        by_row.setdefault(one.row, [html.escape(one.row.split("/")[0])]).append(cell)
    caption = (
        f"{html.escape(data)}: each method less ERM, paired by seed, with 95 % intervals; ★: p below 0.05 after Holm's "
        "adjustment over this table. Accuracies: above 0 is better; differences between groups: below 0 is better."
    )
    return tables.Table(["method less ERM", *(TITLES[m] for m in SHOWN)], list(by_row.values()), caption=caption)


def frontier_figure(data: str, points: Mapping[str, Mapping[float, Mapping[str, float]]]) -> figures.Figure:
    """Accuracy against worst group and against the two gaps, every setting of every method, on validation rows."""
    frame = DataFrame({"method": method} | one for method, settings in points.items() for one in settings.values())

    def draw(figure: Any, colours: Sequence[str]) -> None:
        for axes, metric in zip(figure.subplots(1, 3, sharey=True), SHOWN[1:], strict=True):
            seaborn.lineplot(
                frame, x=metric, y="accuracy", hue="method", style="method", sort=False, estimator=None, lw=0.8,
                ms=5, ax=axes, **figures.look(points, colours),
            )  # fmt: skip
            axes.set_xlabel(TITLES[metric], fontsize=8)
            axes.locator_params(axis="x", nbins=4)
        figures.legend(figure)

    best = {m: max(settings.values(), key=lambda one: one[SHOWN[1]]) for m, settings in points.items()}
    said = "; ".join(f"{m}: accuracy {one['accuracy']:.3f}, worst group {one[SHOWN[1]]:.3f}" for m, one in best.items())
    alt = f"{data}: accuracy against worst group and gaps by method and setting. Best worst group of each: {said}."
    return figures.Figure(draw, alt=alt, size=(8.6, 3.9))


def ranks_table(found: Mapping[str, Results], *, rule: str = "R2") -> tables.Table:
    """Mean rank of each method over the data sets, by metric, with the rank on each; shown without a test."""
    each = {metric: bench.mean_ranks(found, rule, metric) for metric in SHOWN}
    shown = []
    for row in next(iter(each.values())):
        cells = []
        for metric in SHOWN:
            mean, ranks = each[metric][row]
            cells.append(f"{mean:.1f}<br><small>{', '.join(f'{rank:g}' for rank in ranks)}</small>")
        shown.append([html.escape(row.split("/")[0]), *cells])
    caption = f"Mean rank (1 is best) over {', '.join(found)}, and the rank on each; settings by {rule}. Not a test."
    return tables.Table(["method", *(TITLES[metric] for metric in SHOWN)], shown, caption=caption)


def cells_table(data: str, found: Results, *, sizes: Mapping[str, Sequence[int]] | None = None) -> tables.Table:
    """How many test rows each label has in each group (and other parts, where ``sizes`` gives them)."""
    labels, groups = found.examples["label_names"], found.examples["group_names"]
    sizes = dict(sizes or {}) | {
        "test": (found.label * found.groups + found.group).bincount(minlength=len(labels) * len(groups)).tolist()
    }
    shown = [
        [f"{html.escape(label)}, {html.escape(group)}", *(f"{size[i * len(groups) + j]:,}" for size in sizes.values())]
        for i, label in enumerate(labels)
        for j, group in enumerate(groups)
    ]
    return tables.Table(["label, group", *sizes], shown, caption=f"{html.escape(data)}: rows by label and group.")


def verdicts(found: Mapping[str, Results], *, profile: str = "compact") -> list[claims.Verdict]:
    """A verdict for every claim of claims/bench.yaml, those across data sets included."""
    quantities = {data: bench.quantities(one) for data, one in found.items()} | {"all": bench.quantities(found)}
    return claims.evaluate(claims.load(bench.NAME), quantities, profile=profile)


def records_table(found: Mapping[str, Results], *, profile: str = "compact") -> tables.Table:
    """The keys of the records behind every number, and the commands that make them again."""
    shown = [
        [
            f'<span id="run-{records[0]["key"]}">{html.escape(f"{data}/{row}")}</span>',
            ", ".join(f"<code>{record['key']}</code>" for record in records),
            html.escape(f"fairtuning verify bench --profile {profile} --key {records[0]['key']}"),
        ]
        for data, one in found.items()
        for row, records in one.runs.items()
    ]
    return tables.Table(
        ["run", "records", "make one again"], shown, caption=f"results/bench-{profile}.jsonl", prose=True
    )


# ------------------------------------------------------------------------------------------------------ your own data
@dataclass(frozen=True)
class Own:
    """The bench on data of your own: what ``runs.ensure`` takes. Its one profile is "own"."""

    STUDY: Study
    units = staticmethod(bench.units)
    work = staticmethod(bench.work)


def own_study(data: GroupedData, source: Path, *, seeds: int) -> Own:
    """A head makes about 300 steps, in 10 to 100 epochs."""
    rows = len(data.part("training"))
    batch = min(512, rows)
    options = {"source": str(source.resolve()), "edition": data.edition}
    options |= {"batch_size": batch, "epochs": min(100, max(10, 300 * batch // rows))}
    profile = {"seeds": seeds, "data": {"own": options | ({} if data.feature_names else {"backbone": "vit-tiny"})}}
    return Own(replace(bench.STUDY, profiles={"own": profile}, labels={}))


def own_page(source: Path, output: Path, *, seeds: int = 10, executor: str = "inline") -> Path:
    """Compares the methods on the data that ``source`` describes; writes ``output``/index.html, and the records.

    Everything wrong with the data is said (``own.Problems``) before anything is trained.
    """
    data = own.read(source)
    cells = data.label * len(data.group_names) + data.group
    sizes = {part: cells[data.part(part)].bincount(minlength=int(cells.max()) + 1).tolist() for part in PARTS}
    warnings = list(data.notes)
    without = [] if data.feature_names else [*OF_TABLES]
    if 0 < len(data.feature_names) < RANK:
        without += ["P1"]
        warnings.append(f"P1 is left out: it needs {RANK} inputs or more, here is {len(data.feature_names)}")
    if find_spec("fairlearn") is None:
        without += ["threshold DP", "threshold EO"]
        warnings.append("thresholds per group are left out: they need fairlearn, pip install fairlearn")
    if min(sizes["validation"]) < FEWEST_FOR_DFR:
        without += ["DFR"]
        warnings.append(
            f"DFR is left out: it needs {FEWEST_FOR_DFR} validation rows of each label in each group, the smallest has "
            f"{min(sizes['validation'])}"
        )
    study = own_study(data, source, seeds=seeds)
    labels = bench.labels_of("own", without=without)
    store = runs.ensure(study, labels, profile="own", seeds=seeds, executor_name=executor, folder=output)
    found = bench.columns(store, "own", labels=labels, seeds=seeds, study=study.STUDY)["own"]
    path = output / "index.html"
    path.write_text(_page(source.name, data, found, store, study, sizes, warnings), encoding="utf-8")
    return path


def _page(
    name: str,
    data: GroupedData,
    found: Results,
    store: Store,
    study: Own,
    sizes: Mapping[str, Sequence[int]],
    warnings: Sequence[str],
) -> str:
    positive = html.escape(data.label_names[1])
    first = found.records(row_of("ERM", "R1"))[0]
    made = store.environments[first["environment"]]
    table = bool(data.feature_names)
    number = len(data.feature_names)
    inputs = f"{number} input{'s' * (number > 1)}" if table else "features of a frozen ViT-Tiny/16"
    frontier = bench.frontier(store, "own", "own", study=study.STUDY)
    parts: list[Any] = [
        f"<h1>Fair fine-tuning, compared on {html.escape(name)}</h1>",
        f"<p>{len(data.label):,} rows, {inputs}, label 1 is <b>{positive}</b>, groups: "
        f"{html.escape(', '.join(data.group_names))}. One linear head per method{' (MLP: a small network)' * table}, "
        "trained on the same inputs; the group is never an input. No method makes a model fair: the tables say which "
        "gap moved, by how much, and what accuracy it cost.</p>",
        "<h2>Notes and warnings</h2>" + _list(warnings) if warnings else "",
        "<h2>Rows by label and group</h2>",
        cells_table(name, found, sizes=sizes),
        "<h2>Methods, settings selected with the groups of the validation rows (R2)</h2>",
        methods_table(name, found, rule="R2"),
        "<h2>Less ERM</h2>",
        differences_table(name, found, rule="R2"),
        "<h2>Every setting</h2>",
        frontier_figure(name, frontier),
        "<h2>Methods, settings selected by validation accuracy alone (R1)</h2>",
        methods_table(name, found, rule="R1"),
        differences_table(name, found, rule="R1"),
        "<h2>How to read this</h2>" + _list(READING),
        f"<p>Records: {html.escape(store.path.name)} beside this page; data digest <code>{data.digest[:16]}</code>; "
        f"made with fairtuning {html.escape(made['packages']['fairtuning'])}, torch "
        f"{html.escape(made['packages']['torch'])} on {html.escape(made['processor'])}.</p>",
    ]
    body = "\n".join(part if isinstance(part, str) else part._repr_html_() for part in parts)
    title = html.escape(f"Fair fine-tuning, compared on {name}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body>{body}</body></html>\n"
    )


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


READING = (
    "An interval has two sources: the seeds, and the rows that the test part happens to hold. Small groups make the "
    "second wide; more seeds do not narrow it.",
    "R1 selects each setting by validation accuracy; R2 by the worst group among settings within a point of the "
    "method's own best accuracy, and needs the group of validation rows for that. A penalty whose strong settings cost "
    "accuracy is held back by both; look at every setting before you call it weak.",
    "A method that is no more accurate than the more frequent label, or whose worst group is near one half, has learnt "
    "little that could be shared out fairly.",
    "Thresholds per group need the group of everybody that is judged, which the law may forbid; their decisions are "
    "partly random.",
    "DFR and the thresholds are fitted on the validation rows: their accuracy there is no estimate of anything.",
    "A gap that is small here says nothing of harms that the label itself carries, nor of people whom the data lacks.",
)
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;color:#1f2328;"
    "background:#fff}table{border-collapse:collapse;margin:1rem 0;font-size:.85rem;display:block;overflow-x:auto}"
    "caption{text-align:left;padding:.4rem 0;color:#57606a}th,td{padding:.3rem .6rem;border-bottom:1px solid #d0d7de;"
    "text-align:left;vertical-align:top}small{color:#57606a}code{font-size:.85em}"
)
