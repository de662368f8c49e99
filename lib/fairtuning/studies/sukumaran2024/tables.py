"""How records become the cells of P2's tables and figures, and the quantities that its claims are about."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fairtuning.analysis import MissingRuns, Results
from fairtuning.runs import Store
from fairtuning.statistics import Effect
from fairtuning.studies.sukumaran2024.configuration import (
    LABELS,
    NAME,
    PROFILES,
    digest,
    key,
    label_seeds,
    offered,
    resolve,
    seeded,
    selected,
)

#: The paper's column names, the metrics behind them, and the factor to its unit (percent).
METRIC = {
    "Acc": ("accuracy", 100.0),
    "F1 min": ("min_class_f1", 100.0),
    "Recall min": ("min_class_recall", 100.0),
    "F1 diff": ("class_f1_gap", 100.0),
    "EOD max": ("equalized_odds_one_vs_rest_max", 100.0),
}


@dataclass(frozen=True)
class Ours:
    """Our value of one cell: one number per seed, or one number (``exact``), and the records it comes from."""

    values: torch.Tensor
    records: tuple[str, ...] = ()
    exact: bool = False


def results(
    store: Store,
    profile: str,
    *,
    labels: Sequence[str] | None = None,
    seeds: int | None = None,
    data: str | None = None,
) -> Results:
    """What ``store`` holds for ``labels`` (default: all) on one data set of the profile (default: its first).

    A label counts as present when all its seeds are.
    """
    nothing = MissingRuns(
        f"missing runs: {NAME} has no records in profile {profile}; `fairtuning run {NAME}` makes them"
    )
    if not store.records:  # and perhaps no data, whose digest would be part of their keys
        raise nothing
    data = data or next(iter(PROFILES[profile]["data"]))
    seeds = PROFILES[profile]["seeds"] if seeds is None else seeds
    wanted = labels if labels is not None else [label for found in LABELS.values() for label in found]
    found, split = {}, "test"
    for label in dict.fromkeys(wanted):
        if not offered(label, profile) or (resolve(label).data or next(iter(PROFILES[profile]["data"]))) != data:
            continue
        run, _ = selected(label, profile, lambda run: store.records.get(key(run)))
        records = [store.records.get(key(seeded(run, seed))) for seed in range(label_seeds(label, profile, seeds))]
        if all(record is not None for record in records):
            found[label] = records
    settings = PROFILES[profile]["data"][data]
    examples = store.examples.get(f"{digest(data, settings['size'], settings.get('edition', ''))[:16]}-{split}")
    if examples is None or not found:
        raise nothing
    return Results(found, examples)


# -------------------------------------------------------------------------------------------------------------- cells
def _rows(results: Results, row: str, column: str) -> Ours:
    """Rows are "CLIP LoRA", "ViT FairFFT" ...; the profile's first backbone stands in the rows of ViT."""
    if column not in METRIC:
        raise MissingRuns(f"missing runs: {column}")
    backbone, method = row.split()
    label = method if backbone == "ViT" else f"{method}/{backbone.lower()}"
    metric, factor = METRIC[column]
    return Ours(factor * results.values(label, metric), tuple(record["key"] for record in results.records(label)))


CELLS: dict[str, Callable[[Results, str, str], Ours]] = {"table2": _rows, "table3": _rows}


def cell(results: Results, slug: str, row: str, column: str) -> Ours:
    """Our value of one published cell; MissingRuns where its runs have no records."""
    if slug not in CELLS:
        raise MissingRuns(f"missing runs: {slug}")
    return CELLS[slug](results, row, column)


# --------------------------------------------------------------------------------------------------------- quantities
def quantities(results: Results) -> dict[str, Callable[..., Effect]]:
    """The functions that claims/sukumaran2024.yaml names."""
    return {
        "value": lambda metric, of: results.effect(of, metric),
        "difference": lambda metric, of, minus: results.effect(of, metric, minus=minus),
    }


__all__ = ["CELLS", "METRIC", "Ours", "cell", "quantities", "results"]
