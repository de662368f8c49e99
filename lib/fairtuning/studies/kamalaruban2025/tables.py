"""How records become the quantities that P3's claims are about. The paper's own numbers could not be had."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from fairtuning.analysis import MissingRuns, Results
from fairtuning.metrics import auroc
from fairtuning.records import examples_key
from fairtuning.runs import Record, Store, unpack
from fairtuning.statistics import Effect, resampled_score_counts
from fairtuning.studies.kamalaruban2025.configuration import (
    LABELS,
    NAME,
    PROFILES,
    Run,
    key_with,
    offered,
    resolve,
    seeded,
    selected,
    task_key,
    task_of,
)
from fairtuning.studies.sukumaran2024.configuration import published_digest


class TaskResults(Results):
    """The records of one task (``data_name``), with what else the evaluator saw in them.

    ``other(task)`` gives the records of another task of the store. Besides METRICS an effect can be of "auroc", and of
    "probe_accuracy": the share of test images whose attribute a fresh linear classifier tells from the features.
    """

    def __init__(self, runs: dict[str, list[Record]], examples: Record, *, task: str, other: Callable, **options):
        super().__init__(runs, examples, **options)
        self.data_name, self.other = task, other

    def effect(self, of: str, metric: str, *, minus: str | None = None) -> Effect:
        """Of a metric, or the difference of two labels paired by seed; "frozen" is the backbone without adapter."""
        if metric == "probe_accuracy":
            return self.probes.effect(of, "accuracy", minus=minus)
        return super().effect(of, metric, minus=minus)

    def values(self, label: str, metric: str) -> Tensor:
        if metric == "auroc":
            scores = self._scores([label])
            counts = torch.zeros(len(scores), 2, self.levels)
            for run, row in enumerate(scores):
                counts[run].index_put_((self.label, row), torch.ones(()), accumulate=True)
            return auroc(counts)
        return super().values(label, metric)

    def resampled(self, label: str, metric: str) -> Tensor:
        if metric != "auroc":
            return super().resampled(label, metric)
        return self._resampled_auroc[label]

    @property
    def levels(self) -> int:
        return next(iter(self.runs.values()))[0]["scores"]["test"]["classes"]

    def _scores(self, labels: Sequence[str]) -> Tensor:
        """Score of the positive class, one of ``levels``, ``[runs, N]``."""
        found = [unpack(record["scores"]["test"]) for label in labels for record in self.records(label)]
        return torch.stack([torch.from_numpy(scores.astype("int64")) for scores in found])

    @cached_property
    def _resampled_auroc(self) -> dict[str, Tensor]:
        counts = resampled_score_counts(
            self._scores(list(self.runs)), self.label, classes=2, levels=self.levels, resamples=self.resamples
        )
        return dict(zip(self.runs, auroc(counts).split([len(r) for r in self.runs.values()], 1), strict=True))

    @cached_property
    def probes(self) -> Results:
        """What linear classifiers predict of the attribute, by label; "frozen": from the backbone without adapter.

        Where an adapter was sent, "<label>, sent" is a classifier on its features that knows the attribute of a few
        images, and "<label>, frozen" one that knows as many and has the backbone alone.
        """
        found: dict[str, list[Record]] = {}
        for label, records in self.runs.items():
            found.setdefault("frozen", [_probe(record, "frozen") for record in records])
            found[label] = [_probe(record, "trained") for record in records]
            if "sent, few" in records[0]["probes"]:
                found[f"{label}, sent"] = [_probe(record, "sent, few") for record in records]
                found[f"{label}, frozen"] = [_probe(record, "frozen, few") for record in records]
        names = {"label": self.examples["group"], "label_names": self.examples["group_names"]}
        return Results(found, self.examples | names, resamples=self.resamples)


def _probe(record: Record, name: str) -> Record:
    return record | {"predictions": {"test": record["probes"][name]}}


def results(
    store: Store,
    profile: str,
    *,
    labels: Sequence[str] | None = None,
    seeds: int | None = None,
    data: str | None = None,
) -> TaskResults:
    """What ``store`` holds for ``labels`` (default: all) on one task of the profile (default: its first).

    A label counts as present when all its seeds are. The data itself is not needed: where no digest of it is published,
    the records say which they were made of.
    """
    task = data or next(iter(PROFILES[profile]["data"]))
    seeds = PROFILES[profile]["seeds"] if seeds is None else seeds
    wanted = labels if labels is not None else [label for found in LABELS.values() for label in found]
    recorded = {_place(record["configuration"]): record["data"]["digest"] for record in store.records.values()}

    def lookup(run: Run) -> Record | None:
        digest = published_digest(run.data, run.size, run.edition) or recorded.get(_place(vars(run)))
        return store.records.get(key_with(run, digest)) if digest else None

    found: dict[str, list[Record]] = {}
    for label in dict.fromkeys(wanted):
        if offered(label, profile) and task_of(label, profile) == task:
            run, _ = selected(label, profile, lookup)
            records = [lookup(seeded(run, seed)) for seed in range(seeds)]
            if all(record is not None for record in records):
                found[label] = records
    if not found:
        raise MissingRuns(
            f"missing runs: {NAME} has no records of {task} in profile {profile}; `fairtuning run {NAME}` makes them"
        )
    record = next(iter(found.values()))[0]
    key = examples_key(record["data"]["digest"], "test", task_key(Run(**record["configuration"])))
    return TaskResults(
        found, store.examples[key], task=task, other=lambda task: results(store, profile, seeds=seeds, data=task)
    )


def _place(configuration: dict) -> tuple:
    return tuple(configuration[name] for name in ("data", "size", "edition"))


def cell(results: Results, slug: str, row: str, column: str) -> None:
    """Nothing printed by the paper could be had, so there is no cell to compare with."""
    raise MissingRuns(f"missing runs: {slug}")


# --------------------------------------------------------------------------------------------------------- quantities
def quantities(results: TaskResults) -> dict[str, Callable[..., Effect]]:
    """The functions that claims/kamalaruban2025.yaml names. Labels there are without their task."""
    task = next((resolve(label).task for label in results.runs), None)
    named = partial(_named, task)
    return {
        "difference": lambda metric, of, minus: results.effect(named(of), metric, minus=named(minus)),
        "gain_beyond": lambda metric, of, minus, task: _minus(
            results.effect(named(minus), metric, minus=named(of)),
            results.other(task).effect(_named(task, minus), metric, minus=_named(task, of)),
        ),
        "leak": lambda of: results.probes.effect(f"{named(of)}, sent", "accuracy", minus=f"{named(of)}, frozen"),
    }


def _named(task: str | None, label: str) -> str:
    return label if task is None or label == "frozen" else f"{label}/{task}"


def _minus(one: Effect, other: Effect) -> Effect:
    """The difference of effects on two tasks, seed by seed; on the same images also resample by resample."""
    if one.resampled.shape != other.resampled.shape:
        raise MissingRuns("missing runs: the two tasks have different numbers of seeds")
    return Effect(one.by_seed - other.by_seed, one.resampled - other.resampled)


__all__ = ["TaskResults", "cell", "quantities", "results"]
