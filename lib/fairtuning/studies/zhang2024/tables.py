"""How records become the cells of P1's tables and figures, and the quantities that its claims are about."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from fairtuning.analysis import MissingRuns, Results
from fairtuning.networks import count, mlp_parameters
from fairtuning.papers import published_cells
from fairtuning.records import examples_of
from fairtuning.runs import Record, Store
from fairtuning.statistics import Effect
from fairtuning.studies.zhang2024.attributes import AttributeResults
from fairtuning.studies.zhang2024.configuration import (
    ALPHAS,
    IMAGES,
    LABELS,
    NAME,
    PENALISED,
    PROFILES,
    STUDY,
    Pretraining,
    Run,
    alpha_label,
)

PARTS = ("pretraining", "training", "validation", "test")
COUNTED = ()  # items that are counted, and need no runs
BACKBONES = {}  # titles of backbones: its pages name none
#: The paper's column names and the metrics behind them.
METRIC = {"Err": "error", "DP": "demographic_parity_difference", "EO": "equalized_odds_difference_sum"}


@dataclass(frozen=True)
class Ours:
    """Our value of one cell: one number per seed, or one number (``exact``), the records it comes from, and, on images,
    the backbone whose features the head saw."""

    values: torch.Tensor
    records: tuple[str, ...] = ()
    exact: bool = False
    backbone: str = ""


def results(
    store: Store,
    profile: str,
    *,
    labels: Sequence[str] | None = None,
    seeds: int | None = None,
    data: str | None = None,
    split_seed: int | None = None,
) -> Results | AttributeResults:
    """What ``store`` holds for ``labels`` on one data set of the profile (default: its first; "40 attributes" is one):
    all that are evaluated on the test examples by default. On one split (default: the profile's first).

    A label counts as present when all its seeds are. ``LABELS["sensitivity"]`` are on the validation examples, and
    cannot be mixed with others. The data itself is not needed: where no digest of it is published, the records say
    which they were made of.
    """
    first = next(iter(PROFILES[profile]["data"]))
    data = data or first
    wanted = (
        labels if labels is not None else [label for slug in LABELS if slug != "sensitivity" for label in LABELS[slug]]
    )
    of_data = [label for label in wanted if STUDY.place_of(label, profile) == data]
    split_seed = STUDY.splits(profile, split_seed)[0]
    found = STUDY.present(store.records.values(), of_data, profile, seeds=seeds, split_seed=split_seed)
    if not found:
        raise MissingRuns(
            f"missing runs: {NAME} has no records in profile {profile}; `fairtuning run {NAME}` makes them"
        )
    record = next(iter(found.values()))[0]
    parts = {part: examples_of(store, record, part) for part in PARTS}
    examples = parts[record["configuration"]["evaluate"]]
    if data == "40 attributes":
        return AttributeResults(found, examples)
    return Results(found, examples, sizes={name: line["label"]["n"] for name, line in parts.items() if line})


# -------------------------------------------------------------------------------------------------------------- cells
def _metric(results: Results, label: str, metric: str) -> Ours:
    if results.data_name in IMAGES:
        label = f"{label}/{results.data_name}"
    records = results.records(label)
    backbone = records[0].get("backbone", {}).get("name", "")
    return Ours(results.values(label, metric), tuple(record["key"] for record in records), backbone=backbone)


def _number(value: float, *records: Record) -> Ours:
    return Ours(torch.tensor([float(value)]), tuple(record["key"] for record in records), exact=True)


def _table1(results: Results, row: str, column: str) -> Ours:
    if row not in results.sizes:
        raise MissingRuns(f"missing runs: no examples of the {row} part are recorded")
    return _number(results.sizes[row])


def _table2(results: Results, row: str, column: str) -> Ours:
    label = f"pre-trained {row}" if column.endswith("pre-trained") else f"TL after {row}"
    return _metric(results, label, "error" if column.startswith("Err") else METRIC[row[:2]])


def _rows(results: Results, row: str, column: str) -> Ours:
    return _metric(results, row, METRIC[column])


def _table4(results: Results, row: str, column: str) -> Ours:
    return _metric(results, f"OURS/{row}", METRIC[column])


def _figure3(results: Results, row: str, column: str) -> Ours:
    records = results.records("pre-trained/fisher")
    keys = tuple(record["key"] for record in records)
    if row == "head":
        return Ours(torch.tensor([float(len(records[0]["fisher"]["rows"][0]))]), keys, exact=True)
    group = [name.lower() for name in results.examples["group_names"]].index(row)
    scores = [max(record["fisher"]["rows"][group]) for record in records]
    return Ours(torch.tensor(scores, dtype=torch.float64), keys)


def _figure5(results: Results, row: str, column: str) -> Ours:
    return _metric(results, alpha_label(float(row.split()[-1])), METRIC[column])


def _parameters(results: Results, row: str, column: str) -> Ours:
    ours = trainable({"OURS": "factored head"}.get(row, row))
    return _number(ours if column == "trainable parameters" else 100 * (1 - ours / trainable("network")))


def trainable(what: str) -> int:
    """Numbers that are trained: of the whole network, the ordinary head, the factored head (Adult, r = 2)."""
    network = mlp_parameters((13, *Pretraining.hidden, 2), seed=0)
    head = count({name: network[name] for name in ("W", "b")})
    d, k = network["W"].shape
    rank = Run.rank
    return {"network": count(network), "head": head, "factored head": rank * (d + k) + k}[what]


CELLS: dict[str, Callable[[Results, str, str], Ours]] = {
    "table1": _table1,
    "table2": _table2,
    "table3": _rows,
    "table4": _table4,
    "figure3": _figure3,
    "figure4": _rows,
    "figure5": _figure5,
    "parameters": _parameters,
}


def cell(results: Results, slug: str, row: str, column: str) -> Ours:
    """Our value of one published cell; MissingRuns where its runs have no records."""
    return CELLS[slug](results, row, column)


def printed(metric: str, label: str, *, place: str = "Figure 4") -> float | None:
    """What the paper prints of a run, None where it prints nothing. ``place``: the claim's, for OURS is in several."""
    column = {name: column for column, name in METRIC.items()}.get(metric)
    method, *modifiers = label.removesuffix("/additive").split("/")
    data = modifiers.pop() if modifiers and modifiers[-1] in ("celeba", "lfw") else "adult"
    slug, row = "figure4", method
    if match := re.fullmatch(r"(pre-trained|TL after) ((?:EO|DP) [\d.]+)", method):
        slug, row = "table2", match[2]
        kind = "Err" if column == "Err" else "bias" if column == row[:2] else None
        column = f"{kind} {'fine-tuned' if match[1] == 'TL after' else 'pre-trained'}"
    elif modifiers:
        slug, row = "table4", "/".join(modifiers)
    elif method in ("pre-trained",) or method.startswith("Retrain") or (method == "OURS" and place == "Table 3"):
        slug = "table3"
    cells = published_cells(NAME, slug)
    found = [c["mean"] for c in cells if (c["row"], c["column"], c["data"]) == (row, column, data)]
    return found[0] if found else None


def left_out(slug: str, profile: str) -> str:
    """What of a table a profile has no runs for: nothing."""
    return ""


# --------------------------------------------------------------------------------------------------------- quantities
def quantities(results: Results) -> dict[str, Callable[..., Effect]]:
    """The functions that claims/zhang2024.yaml names."""
    return {
        "difference": lambda metric, of, minus: results.effect(of, metric, minus=minus),
        "alpha_slope": partial(alpha_slope, results),
        "fisher_profile_distance": partial(fisher_profile_distance, results),
        "below_base_rate_gap": partial(below_base_rate_gap, results),
        "parameter_saving": parameter_saving,
        "disagreement": partial(disagreement, results),
    }


def alpha_slope(results: Results, metric: str, orientation: str) -> Effect:
    """Least-squares slope of a metric over alpha in 0.5..0.9, times 0.4: the change along the fitted line."""
    alpha = torch.tensor(ALPHAS, dtype=torch.float64)
    weight = 0.4 * (alpha - alpha.mean()) / (alpha - alpha.mean()).square().sum()
    effects = [results.effect(alpha_label(value, orientation), metric) for value in ALPHAS]
    return Effect(
        by_seed=sum(w * effect.by_seed for w, effect in zip(weight, effects, strict=True)),
        resampled=sum(w * effect.resampled for w, effect in zip(weight, effects, strict=True)),
    )


def fisher_profile_distance(results: Results, kind: str = "empirical") -> Effect:
    """Total variation between the genders' normalised Fisher rows, less its mean when genders are shuffled."""
    label = "pre-trained/fisher" + ("/true Fisher" if kind == "true" else "")
    found = [record["fisher"] for record in results.records(label)]
    noise = torch.tensor([one["permuted"] for one in found], dtype=torch.float64)
    distance = torch.tensor([one["distance"] for one in found], dtype=torch.float64)
    resampled = torch.tensor([one["resampled"] for one in found], dtype=torch.float64)
    return Effect(by_seed=distance - noise, resampled=(resampled - noise[:, None]).T)


def below_base_rate_gap(results: Results, of: str) -> Effect:
    """How far a demographic parity difference lies below that of the labels themselves (a perfect classifier's)."""
    effect = results.effect(of, METRIC["DP"])
    return Effect(
        by_seed=results.base_rate_gap - effect.by_seed,
        resampled=results.base_rate_gap_resampled()[:, None] - effect.resampled,
    )


def parameter_saving(of: str, against: str) -> Effect:
    """Trainable numbers of ``against`` less those of ``of``: exact."""
    names = {"OURS": "factored head", "TL": "head"}
    saving = trainable(names.get(against, against)) - trainable(names.get(of, of))
    return Effect(by_seed=torch.tensor([float(saving)], dtype=torch.float64), resampled=None)


def disagreement(results: Results, of: str, and_: str) -> Effect:
    """Share of test examples on which two methods predict differently."""
    differ = (results.predictions(of) != results.predictions(and_)).double()
    return Effect(by_seed=differ.mean(1), resampled=None)


__all__ = [
    "BACKBONES", "CELLS", "COUNTED", "METRIC", "Ours", "PENALISED", "cell", "left_out", "quantities", "results",
    "trainable",
]  # fmt: skip
