"""How records become the quantities that P3's claims are about. The paper's own numbers could not be had."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from fairtuning.analysis import MissingRuns, Results
from fairtuning.collaboration.leakage import ATTACKS, true_positive_rate
from fairtuning.metrics import auroc
from fairtuning.records import examples_of
from fairtuning.runs import Record, Store, pack, unpack
from fairtuning.statistics import Effect, resampled_score_counts
from fairtuning.studies.kamalaruban2025.configuration import LABELS, NAME, PROFILES, STUDY

#: Metrics of scores, from counts ``[..., 2, levels]``.
OF_SCORES = {"auroc": auroc, "true_positive_rate_at_1%": partial(true_positive_rate, at=0.01)}


class TaskResults(Results):
    """The records of one task (``data_name``), with what else the evaluator saw in them.

    ``other(task)`` gives the records of another task of the store. Besides METRICS an effect can be of OF_SCORES, and
    of "probe_accuracy": the share of test images whose attribute a fresh linear classifier tells from the features.
    """

    def __init__(self, runs: dict[str, list[Record]], examples: Record, *, task: str, other: Callable, **options):
        super().__init__(runs, examples, **options)
        self.data_name, self.other = task, other
        self._resampled_scores: dict[str, dict[str, Tensor]] = {}

    def effect(self, of: str, metric: str, *, minus: str | None = None) -> Effect:
        """Of a metric, or the difference of two labels paired by seed; "frozen" is the backbone without adapter."""
        if metric == "probe_accuracy":
            return self.probes.effect(of, "accuracy", minus=minus)
        return super().effect(of, metric, minus=minus)

    def values(self, label: str, metric: str) -> Tensor:
        if metric in OF_SCORES:
            scores = self.scores(label)
            counts = torch.zeros(len(scores), 2, self.levels)
            for run, row in enumerate(scores):
                counts[run].index_put_((self.label, row), torch.ones(()), accumulate=True)
            return OF_SCORES[metric](counts)
        return super().values(label, metric)

    def resampled(self, label: str, metric: str) -> Tensor:
        if metric not in OF_SCORES:
            return super().resampled(label, metric)
        if label not in self._resampled_scores:  # one at a time: the counts of all would fill a small machine
            counts = resampled_score_counts(
                self.scores(label), self.label, classes=2, levels=self.levels, resamples=self.resamples
            )
            self._resampled_scores[label] = {name: function(counts) for name, function in OF_SCORES.items()}
        return self._resampled_scores[label][metric]

    @property
    def levels(self) -> int:
        return next(iter(self.runs.values()))[0]["scores"]["test"]["classes"]

    def scores(self, label: str) -> Tensor:
        """Score of the positive class, one of ``levels``, ``[seeds, N]``."""
        found = [unpack(record["scores"]["test"]) for record in self.records(label)]
        return torch.stack([torch.from_numpy(scores.astype("int64")) for scores in found])

    @cached_property
    def probes(self) -> Results:
        """What linear classifiers predict of the attribute, by label; "frozen": from the backbone without adapter.

        Where an adapter was sent, "<label>, sent" is a classifier on its features that knows the attribute of a few
        images, and "<label>, frozen" one that knows as many and has the backbone alone. Where what leaks was measured,
        "<label>, sent, 10" and "<label>, frozen, 10" are the same with as many known images; 0: clusters.
        """
        found: dict[str, list[Record]] = {}
        for label, records in self.runs.items():
            found.setdefault("frozen", [_probe(record, "frozen") for record in records])
            found[label] = [_probe(record, "trained") for record in records]
            if "sent, few" in records[0]["probes"]:
                found[f"{label}, sent"] = [_probe(record, "sent, few") for record in records]
                found[f"{label}, frozen"] = [_probe(record, "frozen, few") for record in records]
            for name in records[0]["probes"]:
                if name.rpartition(", ")[2].isdigit():
                    found[f"{label}, {name}"] = [_probe(record, name) for record in records]
        names = {"label": self.examples["group"], "label_names": self.examples["group_names"]}
        return Results(found, self.examples | names, resamples=self.resamples)

    @cached_property
    def membership(self) -> "TaskResults":
        """How candidates score in each attack, by "<label>, <attack>", where what leaks was measured.

        Their own examples: the label says who was among the auditor's training images. Effects are of OF_SCORES.
        """
        attacked = {label: records for label, records in self.runs.items() if "membership" in records[0]}
        if not attacked:
            raise MissingRuns("missing runs: what leaks")
        found = {
            f"{label}, {attack}": [
                record | {"scores": {"test": record["membership"]["scores"][attack]}} for record in records
            ]
            for label, records in attacked.items()
            for attack in ATTACKS
        }
        first = next(iter(attacked.values()))[0]["membership"]
        member = [1] * first["members"] + [0] * (first["scores"]["loss"]["n"] - first["members"])
        examples = {"key": "candidates", "label": pack(member, classes=2), "group": pack(member, classes=2)}
        examples["group_names"] = ["not a member", "member"]
        return TaskResults(found, examples, task=self.data_name, other=self.other, resamples=self.resamples)


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

    A label counts as present when all its seeds are. The data itself is not needed.
    """
    task = data or next(iter(PROFILES[profile]["data"]))
    wanted = labels if labels is not None else [label for found in LABELS.values() for label in found]
    of_task = [label for label in wanted if STUDY.place_of(label, profile) == task]
    found = STUDY.present(store.records.values(), of_task, profile, seeds=seeds)
    if not found:
        raise MissingRuns(
            f"missing runs: {NAME} has no records of {task} in profile {profile}; `fairtuning run {NAME}` makes them"
        )
    return TaskResults(
        found,
        examples_of(store, next(iter(found.values()))[0], "test"),
        task=task,
        other=lambda task: results(store, profile, seeds=seeds, data=task),
    )


COUNTED = ()  # items that are counted, and need no runs
BACKBONES = {}  # titles of backbones: its pages name none
METRIC = {}  # the paper's columns: no number of it could be had


def left_out(slug: str, profile: str) -> str:
    """What of a table a profile has no runs for: nothing."""
    return ""


def cell(results: Results, slug: str, row: str, column: str) -> None:
    """Nothing printed by the paper could be had, so there is no cell to compare with."""
    raise MissingRuns(f"missing runs: {slug}")


# --------------------------------------------------------------------------------------------------------- quantities
def quantities(results: TaskResults) -> dict[str, Callable[..., Effect]]:
    """The functions that claims/kamalaruban2025.yaml names. Labels there are without their task."""
    task = next((STUDY.resolve(label).get("place") for label in results.runs), None)
    named = partial(_named, task)
    return {
        "difference": lambda metric, of, minus: results.effect(named(of), metric, minus=named(minus)),
        "gain_beyond": lambda metric, of, minus, task: _minus(
            results.effect(named(minus), metric, minus=named(of)),
            results.other(task).effect(_named(task, minus), metric, minus=_named(task, of)),
        ),
        "leak": lambda of, known=None: _leak(results, named(of), known),
        "leak_difference": lambda of, minus, known: _minus(
            _leak(results, named(of), known), _leak(results, named(minus), known)
        ),
        "membership": lambda of, attack: _above_chance(results.membership.effect(f"{named(of)}, {attack}", "auroc")),
    }


def _leak(results: TaskResults, label: str, known: int | None) -> Effect:
    """By how much an adapter that was sent raises the accuracy of who knows the attribute of so many images."""
    end = "" if known is None else f", {known}"
    return results.probes.effect(f"{label}, sent{end}", "accuracy", minus=f"{label}, frozen{end}")


def _above_chance(effect: Effect) -> Effect:
    """Of an area under a ROC curve what is above that of a coin."""
    return Effect(effect.by_seed - 0.5, effect.resampled - 0.5)


def _named(task: str | None, label: str) -> str:
    return label if task is None or label == "frozen" else f"{label}/{task}"


def _minus(one: Effect, other: Effect) -> Effect:
    """The difference of effects on two tasks, seed by seed; on the same images also resample by resample."""
    if one.resampled.shape != other.resampled.shape:
        raise MissingRuns("missing runs: the two tasks have different numbers of seeds")
    return Effect(one.by_seed - other.by_seed, one.resampled - other.resampled)


__all__ = ["BACKBONES", "COUNTED", "METRIC", "TaskResults", "cell", "left_out", "quantities", "results"]
