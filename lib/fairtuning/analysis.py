"""From records to numbers: predictions -> counts -> metrics -> effects with what they need for an interval."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fairtuning import FairtuningError
from fairtuning.metrics import METRICS, base_rate_difference, group_counts
from fairtuning.runs import Record, unpack
from fairtuning.statistics import Effect, resampled_counts


class MissingRuns(FairtuningError, KeyError):
    """Runs that a number needs and that have no record yet."""

    __str__ = FairtuningError.__str__


class Results:
    """The records of a study by label (a list per label, in order of seed), all on one set of examples.

    Metrics are evaluated on counts, one batch over labels and seeds; the resampling of the examples is one for all
    labels and seeds (``statistics.resampled_counts``) and is drawn when an effect first needs it.
    """

    def __init__(
        self,
        runs: Mapping[str, Sequence[Record]],
        examples: Record,
        *,
        sizes: Mapping[str, int] | None = None,
        resamples: int = 1000,
    ):
        self.runs = {label: list(records) for label, records in runs.items() if records}
        self.examples = examples
        self.sizes = dict(sizes or {})  # examples of each split, where the store has them
        self.label = torch.from_numpy(unpack(examples["label"]).astype("int64"))
        self.group = torch.from_numpy(unpack(examples["group"]).astype("int64"))
        self.classes, self.groups = examples["label"]["classes"], len(examples["group_names"])
        if examples.get("label_names") == examples["group_names"] and torch.equal(self.group, self.label):
            # No attribute, so the classes stand for the groups: counts by both would grow with their third power.
            self.group, self.groups = torch.zeros_like(self.group), 1
        self.resamples = resamples
        self.data_name = next((records[0]["data"]["name"] for records in self.runs.values()), "")
        self._counts: dict[str, Tensor] = {}
        self._resampled: dict[str, dict[str, Tensor]] = {}

    def records(self, label: str) -> list[Record]:
        if label not in self.runs:
            raise MissingRuns(f"missing runs: {label}")
        return self.runs[label]

    def predictions(self, label: str) -> Tensor:
        """``[seeds, N]`` int64."""
        split = self.examples["key"].rsplit("-", 1)[1]
        return torch.stack(
            [torch.from_numpy(unpack(record["predictions"][split]).astype("int64")) for record in self.records(label)]
        )

    def counts(self, label: str) -> Tensor:
        """``[seeds, groups, true, predicted]``"""
        if label not in self._counts:
            self._counts[label] = group_counts(
                self.predictions(label), self.label, group=self.group, classes=self.classes, groups=self.groups
            )
        return self._counts[label]

    def values(self, label: str, metric: str) -> Tensor:
        """The metric of each seed, ``[seeds]``."""
        return METRICS[metric].function(self.counts(label))

    def resampled(self, label: str, metric: str) -> Tensor:
        """The metric of each seed under each resampling of the examples, ``[resamples, seeds]``."""
        self.records(label)
        if metric not in self._resampled:
            values = METRICS[metric].function(self._resampled_counts)
            self._resampled[metric] = dict(
                zip(self.runs, values.split([len(r) for r in self.runs.values()], 1), strict=True)
            )
        return self._resampled[metric][label]

    @cached_property
    def _resampled_counts(self) -> Tensor:
        """``[resamples, runs, groups, true, predicted]``: one matrix product for all labels and seeds."""
        return resampled_counts(
            torch.cat([self.predictions(label) for label in self.runs]),
            self.label,
            group=self.group,
            classes=self.classes,
            groups=self.groups,
            resamples=self.resamples,
        )

    def effect(self, of: str, metric: str, *, minus: str | None = None) -> Effect:
        """``metric(of)``, or ``metric(of) - metric(minus)`` paired by seed."""
        by_seed, resampled = self.values(of, metric), self.resampled(of, metric)
        if minus is not None:
            other = self.values(minus, metric)
            if len(other) != len(by_seed):
                raise MissingRuns(f"missing runs: {of} has {len(by_seed)} seeds, {minus} has {len(other)}")
            by_seed, resampled = by_seed - other, resampled - self.resampled(minus, metric)
        return Effect(by_seed=by_seed, resampled=resampled)

    @property
    def base_rate_gap(self) -> float:
        counts = group_counts(self.label, self.label, group=self.group, classes=self.classes, groups=self.groups)
        return float(base_rate_difference(counts))

    def base_rate_gap_resampled(self) -> Tensor:
        counts = resampled_counts(
            self.label[None], self.label, group=self.group, classes=self.classes, groups=self.groups,
            resamples=self.resamples,
        )  # fmt: skip
        return base_rate_difference(counts)[:, 0]
