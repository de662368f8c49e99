"""How records become the cells of P2's tables and figures, and the quantities that its claims are about."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fairtuning.analysis import MissingRuns, Results
from fairtuning.papers import published_cells
from fairtuning.records import examples_of
from fairtuning.runs import Store
from fairtuning.statistics import Effect
from fairtuning.studies.sukumaran2024.configuration import LABELS, NAME, PROFILES, RANKS, STUDY

#: The paper's column names, the metrics behind them, and the factor to its unit (percent).
METRIC = {
    "Acc": ("accuracy", 100.0),
    "F1 min": ("min_class_f1", 100.0),
    "Recall min": ("min_class_recall", 100.0),
    "F1 diff": ("class_f1_gap", 100.0),
    "EOD max": ("equalized_odds_one_vs_rest_max", 100.0),
}
#: What a backbone of a run is called beside our numbers.
BACKBONES = {
    "clip": "CLIP ViT-B/32",
    "dino": "DINO ViT-B/16",
    "vit": "ViT-B/16",
    "vit-tiny": "ViT-Tiny/16",
    "small": "a small ViT of the classroom",
}


@dataclass(frozen=True)
class Ours:
    """Our value of one cell: one number per seed, or one number (``exact``), the records it comes from, and on which
    backbone: the rows of ViT hold whatever backbone comes first in the profile."""

    values: Tensor
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
) -> Results:
    """What ``store`` holds for ``labels`` (default: all) on one data set of the profile (default: its first).

    A label counts as present when all its seeds are. The data itself is not needed.
    """
    data = data or next(iter(PROFILES[profile]["data"]))
    wanted = labels if labels is not None else [label for found in LABELS.values() for label in found]
    of_data = [label for label in wanted if STUDY.place_of(label, profile) == data]
    found = STUDY.present(store.records.values(), of_data, profile, seeds=seeds)
    if not found:
        raise MissingRuns(
            f"missing runs: {NAME} has no records in profile {profile}; `fairtuning run {NAME}` makes them"
        )
    return Results(found, examples_of(store, next(iter(found.values()))[0], "test"))


def left_out(slug: str, profile: str) -> str:
    """What of a table or figure a profile has no runs for, in words; "" where it has them all."""
    absent = [STUDY.resolve(label) for label in LABELS[slug] if not STUDY.offered(label, profile)]
    backbones = dict.fromkeys(BACKBONES[asked["backbone"]] for asked in absent if "backbone" in asked)
    ranks = dict.fromkeys(f"r={asked['rank']}" for asked in absent if "rank" in asked)
    if not absent:
        return ""
    settings = PROFILES[profile]
    size = next(iter(settings["data"].values()))["size"]
    scale = f"{BACKBONES[settings['backbones'][0]]} at {size} px"
    return f"only {scale} (profile {profile}); not run: {', '.join([*backbones, *ranks])}"


# -------------------------------------------------------------------------------------------------------------- cells
def _ours(results: Results, label: str, values: Tensor) -> Ours:
    records = results.records(label)
    made_by = records[0]["configuration"]
    name = f"{BACKBONES.get(made_by['backbone'], made_by['backbone'])} at {made_by['size']} px"
    return Ours(values, tuple(record["key"] for record in records), backbone=name)


def _label(row: str) -> str:
    """The label of a row: LoRA/clip/r=8 of "CLIP LoRA r=8". The profile's first backbone is in the rows of ViT."""
    backbone, method, *rank = row.split()
    return "/".join([method, *([] if backbone == "ViT" else [backbone.lower()]), *rank])


def _percent(results: Results, row: str, column: str, *, data: str = "") -> Ours:
    label = f"{_label(row)}/{data}" if data else _label(row)
    if column == "Sensitive Acc":
        return _ours(results, label, 100 * attribute_agreement(results.counts(label)))
    metric, factor = METRIC[column]
    return _ours(results, label, factor * results.values(label, metric))


def _fraction(results: Results, row: str, column: str) -> Ours:
    label = _label(row)
    return _ours(results, label, results.values(label, METRIC[column][0]))


def _figure12(results: Results, row: str, column: str) -> Ours:
    """Rows are methods; the numbers are those of ViT."""
    if column == "loss variance":
        return _ours(results, row, class_loss_variance(results, row))
    return _fraction(results, f"ViT {row}", column)


CELLS: dict[str, Callable[[Results, str, str], Ours]] = {
    "table1": partial(_percent, data="geode"),
    "table2": _percent,
    "table3": _percent,
    "table6": partial(_percent, data="aircraft"),
    "figure12": _figure12,
    "ranks": _fraction,
}


def cell(results: Results, slug: str, row: str, column: str) -> Ours:
    """Our value of one published cell; MissingRuns where its runs have no records."""
    if slug not in CELLS:
        raise MissingRuns(f"missing runs: {slug}")
    return CELLS[slug](results, row, column)


def printed(metric: str, label: str, *, backbone: str = "ViT") -> float | None:
    """What the paper prints of a run on Waterbirds (a fraction), in the rows of one backbone; None where nothing."""
    columns = {name: column for column, (name, _) in METRIC.items()} | {"loss variance": "loss variance"}
    column = "Sensitive Acc" if metric == "demographic_parity_difference" else columns.get(metric)
    row, factor = f"{backbone} {label}", 0.01
    slug = "table3" if column in ("EOD max", "Sensitive Acc") else "table2"
    if "/r=" in label:
        slug, row, factor = "ranks", row.replace("/", " "), 1.0
    elif metric == "loss variance":
        slug, row, factor = "figure12", label, 1.0
    cells = published_cells(NAME, slug)
    found = [c["mean"] * factor for c in cells if (c["row"], c["column"], c["data"]) == (row, column, "waterbirds")]
    if found and column == "Sensitive Acc":  # our reading, see attribute_agreement
        return 2 * found[0] - 1
    return found[0] if found else None


# --------------------------------------------------------------------------------------------------------- quantities
def quantities(results: Results) -> dict[str, Callable[..., Effect]]:
    """The functions that claims/sukumaran2024.yaml names."""
    return {
        "difference": lambda metric, of, minus: results.effect(of, metric, minus=minus),
        "log_loss_variance_ratio": partial(log_loss_variance_ratio, results),
        "rank_range": partial(rank_range, results),
        "noise_above_half": lambda of: Effect(by_seed=noise_share(results, of).mean(-1) - 0.5, resampled=None),
    }


def attribute_agreement(counts: Tensor) -> Tensor:
    """Share of examples whose predicted class has the number of their attribute, of counts ``[..., G, C, C]``.

    Our reading of the paper's "sensitive accuracy", for two classes and two backgrounds: landbird goes with land,
    waterbird with water. Where the attributes are balanced it is (1 + demographic parity difference) / 2.
    """
    if counts.shape[-3] != counts.shape[-1]:
        raise MissingRuns("missing runs: sensitive accuracy needs as many attributes as classes")
    return counts.sum(-2).diagonal(dim1=-2, dim2=-1).sum(-1) / counts.sum((-3, -2, -1))


def class_loss_variance(results: Results, label: str) -> Tensor:
    """Population variance over the classes of their mean test loss, ``[seeds]``; eq. 1's penalty is C times this."""
    size = torch.zeros(results.groups, results.classes, dtype=torch.float64)
    size.index_put_((results.group, results.label), torch.ones(len(results.label), dtype=torch.float64), True)
    found = []
    for record in results.records(label):
        cells = torch.tensor([[value or 0.0 for value in row] for row in record["cell_loss"]["test"]])
        found.append(((cells.double() * size).sum(0) / size.sum(0)).var(correction=0))
    return torch.stack(found)


def log_loss_variance_ratio(results: Results, of: str, over: str) -> Effect:
    """log of the ratio of two class loss variances, by seed; its interval is over seeds alone."""
    ratio = class_loss_variance(results, of) / class_loss_variance(results, over)
    return Effect(by_seed=ratio.log(), resampled=None)


def noise_share(results: Results, label: str, *, multiple: float = 1) -> Tensor:
    """How much of the penalty in a batch is noise within the groups (`losses.penalty_and_signal`), ``[seeds, epochs]``.

    In batches of ``multiple`` times the size of those of the training, on the losses of the training itself.
    """
    found = []
    for record in results.records(label):
        if "penalty" not in record:
            raise MissingRuns(f"missing runs: the records of {label} were made before the penalty's noise was measured")
        place = record["penalty"]["batch_sizes"].index(round(multiple * record["configuration"]["batch_size"]))
        pairs = [[float("nan") if v is None else v for v in epoch[place]] for epoch in record["penalty"]["and_signal"]]
        both = torch.tensor(pairs, dtype=torch.float64)
        found.append(1 - both[:, 1] / both[:, 0])
    return torch.stack(found)


def value_range(effects: Sequence[Effect]) -> Effect:
    """Largest minus smallest of several quantities, within each seed and each resample. Never below 0."""
    by_seed = torch.stack([effect.by_seed for effect in effects])
    resampled = torch.stack([effect.resampled for effect in effects])
    return Effect(by_seed=by_seed.amax(0) - by_seed.amin(0), resampled=resampled.amax(0) - resampled.amin(0))


def rank_range(results: Results, metric: str, of: str, minus: str) -> Effect:
    """Largest minus smallest value of a metric over the paper's ranks, of one method less that of another, by seed."""
    one, other = (
        value_range([results.effect(f"{method}/r={rank}", metric) for rank in RANKS]) for method in (of, minus)
    )
    return Effect(by_seed=one.by_seed - other.by_seed, resampled=one.resampled - other.resampled)


# ------------------------------------------------------------------------------------------------------------- counted
def vit_parameters(*, rank: int, classes: int, width: int = 768, depth: int = 12) -> tuple[int, int]:
    """Trained numbers and all numbers of a ViT-B/16 with LoRA on query and value (or fused qkv), as Table 5 has them.

    Trained are the adapters, ``4 * width * rank`` in each block, and the classifier. peft counts the classifier twice
    in the total: the one that is trained and the original, which stays.

    >>> vit_parameters(rank=8, classes=40)
    (325672, 86155088)
    """
    head, adapters = (width + 1) * classes, depth * 4 * width * rank
    blocks = depth * (12 * width**2 + 13 * width)  # attention, two layers of 4 * width, two norms, all with biases
    frozen = (3 * 16 * 16 + 1) * width + (196 + 2) * width + blocks + 2 * width  # patches, positions, class token, norm
    return adapters + head, frozen + adapters + 2 * head


#: Items that are counted, and need no runs.
COUNTED = ("table5",)


def _table5(results: Results | None, row: str, column: str) -> Ours:
    """Our decoding: the row of rank 8 has the 40 classes of GeoDE, the others the 100 of Aircraft."""
    rank = int(row.partition("=")[2])
    trained, total = vit_parameters(rank=rank, classes=40 if rank == 8 else 100)
    value = {"trainable": trained, "total": total, "percent": 100 * trained / total}[column]
    return Ours(torch.tensor([value], dtype=torch.float64), exact=True)


CELLS["table5"] = _table5

__all__ = [
    "CELLS", "COUNTED", "METRIC", "Ours", "cell", "left_out", "quantities", "results", "vit_parameters",
]  # fmt: skip
