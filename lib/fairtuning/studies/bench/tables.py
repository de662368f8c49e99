"""How records become rows, paired differences from ERM, frontiers and ranks, and the quantities of claims."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from fairtuning import statistics, studies
from fairtuning.analysis import MissingRuns, Results
from fairtuning.metrics import METRICS
from fairtuning.plan import Study, seeded
from fairtuning.records import examples_of
from fairtuning.runs import Record, Store
from fairtuning.statistics import Effect, Estimate, estimate
from fairtuning.studies import kamalaruban2025, sukumaran2024
from fairtuning.studies.bench.configuration import (
    LABELS,
    METHODS,
    NAME,
    PROFILES,
    SEARCH_SEEDS,
    STUDY,
    Run,
    place,
)
from fairtuning.studies.sukumaran2024.measures import searches

#: What is shown of each method: utility, the worst cell of label and group, two gaps.
SHOWN = ("accuracy", "worst_cell_accuracy", "demographic_parity_difference", "equalized_odds_difference_max")
#: Rows of the papers' own studies that may stand beside these: adapters instead of a head alone. For each where it
#: needs the attribute; in kamalaruban2025 the auditor alone has it.
ADAPTERS: dict[str, dict[str, tuple[str, ...]]] = {
    "sukumaran2024": {
        "LoRA": (),
        "FairLoRA": ("validation",),
        "FairLoRA/groups=cell": ("training", "validation"),
        "GroupDRO": ("training",),
        "Balanced": ("training",),
        "DFR": ("validation",),
        "FFT": (),
        "FairFFT": ("validation",),
    },
    "kamalaruban2025": {"Erm": ()} | dict.fromkeys(("Unl", "Adv", "Orth", "Orth/weight", "Ent"), ("training",)),
}


def columns(
    store: Store,
    profile: str,
    *,
    labels: Sequence[str] | None = None,
    seeds: int | None = None,
    study: Study = STUDY,
) -> dict[str, Results]:
    """What ``store`` holds, by data set; the labels of each are those of ``labels`` without the data set's name.

    A label counts as present when all its seeds are. MissingRuns where nothing is.
    """
    names = study.profiles[profile]["data"]
    wanted = labels if labels is not None else [label for data in names for label in LABELS[data]]
    found: dict[str, dict[str, list[Record]]] = {}
    for label, records in study.present(store.records.values(), wanted, profile, seeds=seeds).items():
        data, _, row = label.partition("/")
        found.setdefault(data, {})[row] = records
    if not found:
        raise _missing(profile)
    return {
        data: Results(rows, examples_of(store, next(iter(rows.values()))[0], "test")) for data, rows in found.items()
    }


def _missing(profile: str) -> MissingRuns:
    return MissingRuns(
        f"missing runs: {NAME} has no records in profile {profile}; `fairtuning run {NAME} --profile {profile}` makes "
        "them"
    )


def results(
    store: Store,
    profile: str,
    *,
    labels: Sequence[str] | None = None,
    seeds: int | None = None,
    data: str | None = None,
) -> Results | dict[str, Results]:
    """The column of one data set (default: the profile's first), or for "all" every one that there is, by name."""
    found = columns(store, profile, labels=labels, seeds=seeds)
    if data == "all":
        return found
    data = data or next(iter(PROFILES[profile]["data"]))
    if data not in found:
        raise _missing(profile)
    return found[data]


def row_of(method: str, rule: str) -> str:
    """The label of a method's row: by a rule where it has a setting to select."""
    return f"{method}/{rule}" if METHODS[method].strengths else method


def rows(found: Results, rule: str) -> list[str]:
    """The rows that there are, in the order of METHODS: one per method, and those whose strength is given."""
    return [
        row
        for method in METHODS
        for row in (row_of(method, rule), *(label for label in found.runs if label.startswith(f"{method}=")))
        if row in found.runs
    ]


def adapters_of(data: str, profile: str) -> dict[str, dict[str, str]]:
    """By study: which of ADAPTERS a profile has on the same images, label and attribute, and their labels there."""
    mine, found = PROFILES[profile]["data"].get(data, {}), {}
    same = ("size", "edition", "label", "attribute")
    for study in (sukumaran2024, kamalaruban2025):
        theirs = study.PROFILES[profile]["data"]
        if mine and data in theirs and all(mine.get(name) == theirs[data].get(name) for name in same):
            suffix = "" if data == next(iter(theirs)) else f"/{data}"
            found[study.NAME] = {label: label + suffix for label in ADAPTERS[study.NAME]}
    return found


def adapters(data: str, profile: str) -> dict[str, Results]:
    """The records of ``adapters_of``, by study; those of the test set."""
    found = {}
    for name, labels in adapters_of(data, profile).items():
        study = studies.study(name)
        with suppress(MissingRuns):
            found[name] = study.results(Store.of(name, profile), profile, labels=list(labels.values()), data=data)
    return found


def adapter_frontier(data: str, profile: str) -> dict[str, dict[float, dict[str, float]]]:
    """The penalty of sukumaran2024 on adapters, of the same form as ``frontier``: one seed, and 0 is plain LoRA.

    A search keeps the epoch of the best validation accuracy, so this is of that epoch; the rule judges the last one.
    """
    if "sukumaran2024" not in adapters_of(data, profile):
        return {}
    store = Store.of("sukumaran2024", profile)
    found: dict[str, dict[float, dict[str, float]]] = {}
    for label, full in adapters_of(data, profile)["sukumaran2024"].items():
        if not label.startswith("FairLoRA"):
            continue
        *rates, penalties = searches(store, profile, full)
        plain = [(run, record) for run, record in rates[0] if run.learning_rate == penalties[0][0].learning_rate]
        there = [(run, record) for run, record in [*plain, *penalties] if record is not None]
        for run, record in there if len(there) > 1 else []:
            one = Results({"run": [record]}, examples_of(store, record, "validation"))
            values = {metric: float(one.values("run", metric).mean()) for metric in SHOWN}
            found.setdefault(label, {})[run.penalty] = values
    return found


# --------------------------------------------------------------------------------------------------------- differences
@dataclass(frozen=True)
class Difference:
    """One method less ERM, paired by seed; p is two-sided, after Holm's adjustment inside the data set."""

    row: str
    metric: str
    estimate: Estimate
    p: float


def differences(found: Results, rule: str, *, metrics: Sequence[str] = SHOWN) -> list[Difference]:
    """Every method less ERM by the same rule, on every metric; NaN where a metric is not defined in some cell."""
    base = row_of("ERM", rule)
    pairs = [(row, metric) for row in rows(found, rule) if row != base for metric in metrics]
    estimates = [estimate(found.effect(row, metric, minus=base)) for row, metric in pairs]
    raw = [2 * min(statistics.p_above(one, 0.0), statistics.p_below(one, 0.0), 0.5) for one in estimates]
    defined = [index for index, p in enumerate(raw) if p == p]
    adjusted = [float("nan")] * len(raw)
    for index, p in zip(defined, statistics.holm([raw[index] for index in defined]).tolist(), strict=True):
        adjusted[index] = p
    return [Difference(row, metric, one, p) for (row, metric), one, p in zip(pairs, estimates, adjusted, strict=True)]


# ----------------------------------------------------------------------------------------------------------- frontiers
def frontier(
    store: Store, profile: str, data: str, *, study: Study = STUDY
) -> dict[str, dict[float, dict[str, float]]]:
    """method -> strength -> metric: means over the search's seeds on the validation rows, which chose the settings."""
    by_run = study.by_run(store.records.values())
    wanted = place(Run(**{"data": data} | study.profiles[profile]["data"][data]))
    there = [run for run in by_run if run.evaluate == "validation" and place(run) == wanted]
    found: dict[str, dict[float, dict[str, float]]] = {}
    for method in METHODS:
        of = {(run.strength or run.learning_rate, seeded(run, 0)) for run in there if run.method == method}
        for strength, run in sorted(of, key=lambda one: one[0]):
            records = [by_run.get(seeded(run, seed)) for seed in range(SEARCH_SEEDS)]
            if any(record is None for record in records):
                continue
            one = Results({"run": records}, examples_of(store, records[0], "validation"))
            values = {metric: float(one.values("run", metric).mean()) for metric in SHOWN}
            found.setdefault(method, {})[strength] = values
    return found


# --------------------------------------------------------------------------------------------------------------- ranks
def ranks(values: Tensor) -> Tensor:
    """Ranks along the last axis, 1 = the largest, the mean rank for equals.

    >>> ranks(torch.tensor([0.5, 0.9, 0.5])).tolist()
    [2.5, 1.0, 2.5]
    """
    mine, others = values.unsqueeze(-1), values.unsqueeze(-2)
    return (others > mine).double().sum(-1) + ((others == mine).double().sum(-1) + 1) / 2


def common(found: Mapping[str, Results], rule: str) -> list[str]:
    """Rows that every data set has."""
    return [row_of(m, rule) for m in METHODS if all(row_of(m, rule) in one.runs for one in found.values())]


def mean_ranks(found: Mapping[str, Results], rule: str, metric: str) -> dict[str, tuple[float, list[float]]]:
    """row -> (mean rank over the data sets, its rank on each), of the means over seeds; 1 is best. Not a test."""
    sign = 1 if METRICS[metric].better == "higher" else -1
    shared = common(found, rule)
    each = [
        ranks(sign * torch.stack([one.values(row, metric).mean() for row in shared])).tolist() for one in found.values()
    ]
    return {row: (sum(found) / len(found), found) for row, *found in zip(shared, *each, strict=True)}


# ---------------------------------------------------------------------------------------------------------- quantities
def quantities(found: Results | Mapping[str, Results]) -> dict[str, Callable[..., Effect]]:
    """The functions that claims/bench.yaml names: of one column, or of all together."""
    if isinstance(found, Results):
        return {"difference": lambda metric, of, minus: found.effect(of, metric, minus=minus)}
    return {"rank_agreement": lambda metric, rule: rank_agreement(found, metric, rule)}


def rank_agreement(found: Mapping[str, Results], metric: str, rule: str) -> Effect:
    """Spearman's correlation of the methods' order between two data sets, averaged over all pairs of them.

    Examples of different data sets are resampled independently.
    """
    if len(found) < 2:
        raise MissingRuns(f"missing runs: an order across data sets needs two or more, here are {len(found)}")
    shared = common(found, rule)

    def agreement(values: Sequence[Tensor]) -> Tensor:
        order = [ranks(value) for value in values]  # [..., methods]
        order = [one - one.mean(-1, keepdim=True) for one in order]
        pairs = [(a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)) for a, b in combinations(order, 2)]
        return torch.stack(pairs).mean(0)

    def drawn(one: Results, number: int) -> Tensor:
        """[resamples, seeds, methods]; in an order of its own, for every set is resampled by the same generator."""
        values = torch.stack([one.resampled(row, metric) for row in shared], -1)
        return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(number))]

    return Effect(
        by_seed=agreement([torch.stack([one.values(row, metric) for row in shared], -1) for one in found.values()]),
        resampled=agreement([drawn(one, number) for number, one in enumerate(found.values())]),
    )
