"""Forty attributes at once: a head with binary logistic outputs, where a rank below 40 leaves something out.

With two outputs the weights of the SVD cannot matter as an approximation (arXiv 2403.00625 has no other head); with
forty they can. Everything here has one more axis than elsewhere: ``label [..., n, k]`` of 0 and 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from fairtuning import datasets, metrics
from fairtuning.analysis import MissingRuns
from fairtuning.datasets import GroupedData, images
from fairtuning.factorization import neutralise
from fairtuning.networks import Parameters, head
from fairtuning.records import examples_key, frame
from fairtuning.runs import Record, pack, unpack
from fairtuning.statistics import Effect, resampled_counts

FEWEST = 20  # test images that each value of an attribute must have in each group for its gaps to count


def read(data: GroupedData) -> GroupedData:
    """``data`` (of CelebA, by one attribute) with every attribute as its label, ``[N, 40]``, in alphabetical order."""
    recipe = datasets.source(data.name).call("RECIPE")
    edition, _, size = data.edition.partition(" at ")
    columns = images.read(recipe, size=size, edition=edition).columns
    names = sorted(set(columns) - {"split", "name", "content"})
    label = torch.stack([torch.from_numpy((columns[name] > 0).astype("int64")) for name in names], 1)
    return replace(data, label=label, label_names=("absent", "present"), feature_names=tuple(names))


# ------------------------------------------------------------------------------------------------- the mathematics
def loss(logits: Tensor, label: Tensor) -> Tensor:
    """Mean binary cross-entropy over examples and attributes, ``[..., n, k] -> [...]``."""
    label = label.to(logits).expand_as(logits)
    return binary_cross_entropy_with_logits(logits, label, reduction="none").mean((-2, -1))


def head_fisher(
    features: Tensor, logits: Tensor, label: Tensor, *, group: Tensor, groups: int, kind: str = "empirical"
) -> Tensor:
    """``fisher.head_fisher`` for the summed binary cross-entropy: δ = sigmoid(logits) - label, ``[groups, d, k]``."""
    p = logits.sigmoid()
    square = (p - label).square() if kind == "empirical" else p * (1 - p)
    member = one_hot(group, groups).to(p)
    by_group = (member.unsqueeze(-1) * square.unsqueeze(-2)).flatten(-2)
    total = (features.square().mT @ by_group).unflatten(-1, (groups, square.shape[-1])).movedim(-2, -3)
    return total / member.sum(0)[:, None, None]


def lost(source: Parameters, start: Parameters, fisher: Tensor) -> dict[str, float]:
    """What truncation leaves out of a head W, ‖D (W - A B)‖ / ‖D W‖, for D = 1 ("plain"), for the neutralised
    importance and for each group's, from ``fisher [2, d, k]``.
    """
    W, rest = source["W"], source["W"] - start["A"] @ start["B"]
    rows = {"plain": torch.ones_like(W[:, 0])}
    rows |= {variant: neutralise(fisher, variant=variant) for variant in ("neutralised", "group_0", "group_1")}
    return {name: float(f"{(d[:, None] * rest).norm() / (d[:, None] * W).norm():.6g}") for name, d in rows.items()}


# ------------------------------------------------------------------------------------------------------------ records
def examples_line(data: GroupedData, split: str, task: str, *, split_seed: int = 0) -> Record:
    """Labels ``[n, k]`` (flat) and groups of the examples of a split."""
    index = data.part(split)
    return {
        "kind": "examples",
        "key": examples_key(data.digest, split, task, split_seed=split_seed),
        "label": pack(data.label[index].flatten().tolist(), classes=2),
        "group": pack(data.group[index].tolist(), classes=len(data.group_names)),
        "label_names": data.label_names,
        "group_names": data.group_names,
        "attributes": data.feature_names,
    }


def make_record(
    run, data: GroupedData, *, version: int, scores: Mapping[str, Tensor], history: list[float], parameters: int,
    seconds: float,
) -> Record:  # fmt: skip
    """As ``records.make_record``; accuracy is the mean over attributes, and only test predictions are kept."""
    label = {split: data.label[data.part(split)] for split in scores}
    predictions = {split: (values > 0).long() for split, values in scores.items()}
    return frame(run, data, version=version, history=history, parameters=parameters, seconds=seconds) | {
        "accuracy": {s: round(float((p == label[s]).double().mean()), 6) for s, p in predictions.items()},
        "loss": {s: float(f"{loss(values, label[s]):.8g}") for s, values in scores.items()},
        "predictions": {s: pack(p.flatten().tolist(), classes=2) for s, p in predictions.items() if s == "test"},
    }


def start_of(source: Parameters, start: Parameters, data: GroupedData, *, kind: str) -> Record:
    """The truncated head before any fine-tuning: what it leaves out, and its test counts ``[k, groups, 2, 2]``."""
    index = data.part("training")
    inputs, label, group = data.inputs[index], data.label[index], data.group[index]
    fisher = head_fisher(inputs, head(source, inputs), label, group=group, groups=2, kind=kind)
    index = data.part("test")
    predicted = (head(start, data.inputs[index]) > 0).long()
    counts = attribute_counts(predicted[None], data.label[index], group=data.group[index])[0]
    return {"lost": lost(source, start, fisher), "counts": counts.tolist()}


# ----------------------------------------------------------------------------------------------------------- analysis
def attribute_counts(prediction: Tensor, label: Tensor, *, group: Tensor) -> Tensor:
    """``prediction [..., n, k]``, ``label [n, k]``, ``group [n]`` -> counts ``[..., k, 2, 2, 2]``."""
    found = [
        metrics.group_counts(prediction[..., k], label[:, k], group=group, classes=2, groups=2)
        for k in range(label.shape[1])
    ]
    return torch.stack(found, -4)


#: Of counts ``[..., k, 2, 2, 2]`` over the attributes, and over those that have gaps.
MEASURES: dict[str, tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "mean error": ("all", metrics.error, lambda values: values.mean(-1)),
    "mean demographic parity difference": ("gaps", metrics.demographic_parity_difference, lambda v: v.mean(-1)),
    "worst demographic parity difference": ("gaps", metrics.demographic_parity_difference, lambda v: v.amax(-1)),
    "mean equalized odds difference": ("gaps", metrics.equalized_odds_difference_sum, lambda v: v.mean(-1)),
    "worst equalized odds difference": ("gaps", metrics.equalized_odds_difference_sum, lambda v: v.amax(-1)),
}


class AttributeResults:
    """The records of runs on all attributes by label, as ``analysis.Results`` holds those on one.

    The group itself is among the attributes; it has an error, but no gaps. Nor has an attribute of which a value has
    fewer than FEWEST test images in a group.
    """

    def __init__(self, runs: Mapping[str, Sequence[Record]], examples: Record, *, resamples: int = 1000):
        self.runs = {label: list(records) for label, records in runs.items()}
        self.examples, self.resamples = examples, resamples
        self.names = tuple(examples["attributes"])
        self.group = torch.from_numpy(unpack(examples["group"]).astype("int64"))
        self.label = torch.from_numpy(unpack(examples["label"]).astype("int64")).reshape(len(self.group), -1)
        self.data_name = "40 attributes"

    def records(self, label: str) -> list[Record]:
        if label not in self.runs:
            raise MissingRuns(f"missing runs: {label}")
        return self.runs[label]

    def predictions(self, label: str) -> Tensor:
        """``[seeds, n, k]`` int64."""
        found = [unpack(record["predictions"]["test"]).astype("int64") for record in self.records(label)]
        return torch.stack([torch.from_numpy(one) for one in found]).reshape(len(found), *self.label.shape)

    @cached_property
    def with_gaps(self) -> Tensor:
        """Indices of the attributes whose gaps count."""
        cells = attribute_counts(self.label[None], self.label, group=self.group)[0].sum(-1)  # [k, groups, true]
        group_itself = (self.label == self.group[:, None]).all(0)
        return torch.nonzero((cells.flatten(1).amin(1) >= FEWEST) & ~group_itself).squeeze(1)

    def measure(self, name: str, counts: Tensor) -> Tensor:
        """One of MEASURES of counts ``[..., k, 2, 2, 2]``, ``[...]``."""
        which, metric, together = MEASURES[name]
        values = metric(counts)
        return together(values if which == "all" else values[..., self.with_gaps])

    def values(self, label: str, name: str) -> Tensor:
        """``[seeds]``"""
        return self.measure(name, attribute_counts(self.predictions(label), self.label, group=self.group))

    def before(self, label: str, name: str) -> Tensor:
        """The same of the truncated heads before fine-tuning."""
        return self.measure(name, torch.tensor([record["start"]["counts"] for record in self.records(label)]))

    def lost(self, label: str, norm: str = "neutralised") -> Tensor:
        """What truncation leaves out of the head, in one of the norms of ``attributes.lost``, ``[seeds]``."""
        return torch.tensor([record["start"]["lost"][norm] for record in self.records(label)], dtype=torch.float64)

    def resampled(self, label: str, name: str) -> Tensor:
        """``[resamples, seeds]``, one resampling of the test images for all labels, seeds and attributes."""
        self.records(label)
        return self._resampled[label][name]

    @cached_property
    def _resampled(self) -> dict[str, dict[str, Tensor]]:
        predicted = torch.cat([self.predictions(label) for label in self.runs])  # one matrix product per attribute
        counts = [
            resampled_counts(
                predicted[..., k], self.label[:, k], group=self.group, classes=2, groups=2, resamples=self.resamples
            )
            for k in range(len(self.names))
        ]
        found, first = {}, 0
        for label, records in self.runs.items():
            own = torch.stack([one[:, first : first + len(records)] for one in counts], -4)
            found[label] = {name: self.measure(name, own) for name in MEASURES}
            first += len(records)
        return found

    def effect(self, of: str, name: str, *, minus: str | None = None) -> Effect:
        """``measure(of)``, or ``measure(of) - measure(minus)`` paired by seed."""
        by_seed, resampled = self.values(of, name), self.resampled(of, name)
        if minus is not None:
            by_seed, resampled = by_seed - self.values(minus, name), resampled - self.resampled(minus, name)
        return Effect(by_seed=by_seed, resampled=resampled)
