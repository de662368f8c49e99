"""Group metrics as pure, batched functions of integer counts `[..., groups, true, predicted]`.

Every function takes counts with any leading axes (runs, resamples) and gives float64. Fractions are in
[0, 1]; `error` alone is in percent. A metric whose group or class is empty is NaN, never 0. Conventions that
differ in the field are separate functions with separate names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import checks

_CHUNK = 2**18  # examples counted at once: 2 MiB of indices stay in the cache


def group_counts(prediction: Tensor, label: Tensor, *, group: Tensor, classes: int, groups: int) -> Tensor:
    """Count examples by group, true class and predicted class.

    Shapes: prediction `[..., N]`, label and group `[N]`, all integer or bool; result `[..., groups, classes,
    classes]`, int64, on the device of `prediction`. ValueError on a value out of range or a wrong length.

    >>> group_counts(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), group=torch.tensor([0, 0, 1]),
    ...              classes=2, groups=2).tolist()
    [[[1, 1], [0, 0]], [[0, 0], [0, 1]]]
    """
    cell = true_cell(prediction, label, group=group, classes=classes, groups=groups) * classes
    runs = prediction.reshape(prediction.shape[:-1].numel(), len(label))
    size = groups * classes * classes
    counts = torch.zeros(len(runs), size, dtype=torch.int64, device=prediction.device)
    step = max(1, _CHUNK // max(1, len(label)))
    for start in range(0, len(runs), step):
        block = runs[start : start + step]
        first = torch.arange(len(block), device=block.device)[:, None] * size  # of each run's own bins
        index = block + (cell + first)
        bins = torch.bincount(index.flatten(), minlength=len(block) * size)
        counts[start : start + step] = bins.reshape(-1, size)
    return counts.reshape(*prediction.shape[:-1], groups, classes, classes)


def true_cell(prediction: Tensor, label: Tensor, *, group: Tensor, classes: int, groups: int) -> Tensor:
    """Index `group * classes + label` of each example, `[N]` int64, after a check of all three."""
    n = checks.integers("prediction", prediction, below=classes, wait=True).shape[-1]
    checks.integers("label", label, below=classes, shape=[n], wait=True)
    checks.integers("group", group, below=groups, shape=[n], wait=True)
    return (group.long() * classes + label.long()).to(prediction.device)


# --- all groups together ---------------------------------------------------------------------------------


def _pooled(counts: Tensor) -> Tensor:
    return _checked(counts).sum(-3)


def _checked(counts: Tensor, positive: int = 0) -> Tensor:
    if counts.ndim < 3 or counts.shape[-1] != counts.shape[-2]:
        raise ValueError(f"counts have shape {tuple(counts.shape)}; expected [..., groups, classes, classes]")
    checks.between("positive", positive, 0, counts.shape[-1] - 1)  # -1 would be the last class
    return counts.double()


def _correct(table: Tensor) -> Tensor:
    return table.diagonal(dim1=-2, dim2=-1)


def _gap(rates: Tensor) -> Tensor:
    # amax and amin hand NaN on: one empty group makes the gap NaN
    return rates.amax(-1) - rates.amin(-1)


def _ratio(rates: Tensor) -> Tensor:
    return rates.amin(-1) / rates.amax(-1)


def accuracy(counts: Tensor) -> Tensor:
    """Share of examples predicted right, `[...]`."""
    table = _pooled(counts)
    return _correct(table).sum(-1) / table.sum((-2, -1))


def class_f1(counts: Tensor) -> Tensor:
    """F1 of each class against the rest, `[..., classes]`; NaN where it is neither true nor predicted."""
    table = _pooled(counts)
    return 2 * _correct(table) / (table.sum(-1) + table.sum(-2))


def class_recall(counts: Tensor) -> Tensor:
    """Recall of each class, `[..., classes]`; NaN where a class has no example."""
    table = _pooled(counts)
    return _correct(table) / table.sum(-1)


def weighted_f1(counts: Tensor) -> Tensor:
    """Class F1s averaged with the class sizes as weights, `[...]` (scikit-learn's `average="weighted"`)."""
    size = _pooled(counts).sum(-1)
    # a class neither true nor predicted has weight 0; its NaN must not spread
    return (class_f1(counts).nan_to_num(nan=0.0) * size).sum(-1) / size.sum(-1)


def error(counts: Tensor) -> Tensor:
    """Err = 100 - weighted F1, in percent, `[...]` (arXiv 2403.00625, section 4.1)."""
    return 100 * (1 - weighted_f1(counts))


def min_class_f1(counts: Tensor) -> Tensor:
    """Smallest class F1, `[...]` (arXiv 2410.17358, "F1 min")."""
    return class_f1(counts).amin(-1)


def median_class_f1(counts: Tensor) -> Tensor:
    """Median class F1, `[...]` (arXiv 2410.17358, an axis of its radar charts); of two classes their mean."""
    return class_f1(counts).quantile(0.5, dim=-1)


def class_f1_gap(counts: Tensor) -> Tensor:
    """Largest minus smallest class F1, `[...]` (arXiv 2410.17358, "Delta F1")."""
    return _gap(class_f1(counts))


def positive_class_f1(counts: Tensor, positive: int = 1) -> Tensor:
    """F1 of the positive class, `[...]` (scikit-learn's `average="binary"`)."""
    return class_f1(_checked(counts, positive))[..., positive]


def min_class_recall(counts: Tensor) -> Tensor:
    """Smallest class recall, `[...]` (arXiv 2410.17358, "Recall min")."""
    return class_recall(counts).amin(-1)


def class_recall_gap(counts: Tensor) -> Tensor:
    """Largest minus smallest class recall, `[...]`."""
    return _gap(class_recall(counts))


# --- each group ------------------------------------------------------------------------------------------


def group_accuracy(counts: Tensor) -> Tensor:
    """Accuracy within each group, `[..., groups]`."""
    table = _checked(counts)
    return _correct(table).sum(-1) / table.sum((-2, -1))


def base_rate(counts: Tensor, positive: int = 1) -> Tensor:
    """P(Y = positive | group), `[..., groups]`: a property of the data, the same for every model."""
    table = _checked(counts, positive)
    return table[..., positive, :].sum(-1) / table.sum((-2, -1))


def selection_rate(counts: Tensor, positive: int = 1) -> Tensor:
    """P(prediction = positive | group), `[..., groups]`."""
    table = _checked(counts, positive)
    return table[..., positive].sum(-1) / table.sum((-2, -1))


def true_positive_rate(counts: Tensor, positive: int = 1) -> Tensor:
    """P(prediction = positive | Y = positive, group), `[..., groups]`."""
    table = _checked(counts, positive)
    return table[..., positive, positive] / table[..., positive, :].sum(-1)


def false_positive_rate(counts: Tensor, positive: int = 1) -> Tensor:
    """P(prediction = positive | Y != positive, group), `[..., groups]`; every other class is negative."""
    table = _checked(counts, positive)
    hits = table[..., positive].sum(-1) - table[..., positive, positive]
    return hits / (table.sum((-2, -1)) - table[..., positive, :].sum(-1))


# --- between groups --------------------------------------------------------------------------------------


def base_rate_difference(counts: Tensor) -> Tensor:
    """Largest minus smallest base rate, `[...]`: what a perfect classifier has as demographic parity gap."""
    return _gap(base_rate(counts))


def demographic_parity_difference(counts: Tensor) -> Tensor:
    """Largest minus smallest selection rate, `[...]`, in [0, 1] (arXiv 2403.00625: Delta_DP).

    >>> counts = torch.tensor([[[6, 2], [1, 1]], [[2, 2], [2, 4]]])     # group 0, then group 1
    >>> round(float(demographic_parity_difference(counts)), 3)          # 6/10 - 3/10
    0.3
    """
    return _gap(selection_rate(counts))


def demographic_parity_ratio(counts: Tensor) -> Tensor:
    """Smallest over largest selection rate, `[...]`, in [0, 1]; NaN where all rates are 0."""
    return _ratio(selection_rate(counts))


def equal_opportunity_difference(counts: Tensor) -> Tensor:
    """Largest minus smallest true positive rate, `[...]`, in [0, 1]."""
    return _gap(true_positive_rate(counts))


def true_positive_rate_ratio(counts: Tensor) -> Tensor:
    """Smallest over largest true positive rate, `[...]`, in [0, 1]; NaN where all rates are 0."""
    return _ratio(true_positive_rate(counts))


def false_positive_rate_difference(counts: Tensor) -> Tensor:
    """Largest minus smallest false positive rate, `[...]`, in [0, 1]."""
    return _gap(false_positive_rate(counts))


def false_positive_rate_ratio(counts: Tensor) -> Tensor:
    """Smallest over largest false positive rate, `[...]`, in [0, 1]; NaN where all rates are 0."""
    return _ratio(false_positive_rate(counts))


def equalized_odds_difference_sum(counts: Tensor) -> Tensor:
    """True positive gap plus false positive gap, `[...]`, in [0, 2] (arXiv 2403.00625: Delta_EO).

    >>> counts = torch.tensor([[[6, 2], [1, 1]], [[2, 2], [2, 4]]])
    >>> round(float(equalized_odds_difference_sum(counts)), 3)          # |1/2 - 4/6| + |2/8 - 2/4|
    0.417
    """
    return equal_opportunity_difference(counts) + false_positive_rate_difference(counts)


def equalized_odds_difference_max(counts: Tensor) -> Tensor:
    """The larger of true positive gap and false positive gap, `[...]`, in [0, 1] (fairlearn's convention)."""
    return torch.maximum(equal_opportunity_difference(counts), false_positive_rate_difference(counts))


def equalized_odds_one_vs_rest_max(counts: Tensor, positive: int | None = None) -> Tensor:
    """Largest gap in true positive rate between one group and all others together, `[...]`, in [0, 1].

    arXiv 2410.17358: EOD_max = max_i |P(Yhat=1 | Y=1, S=s_i) - P(Yhat=1 | Y=1, S!=s_i)|. Two classes: of
    `positive` (1 unless given). More classes, undefined there: mean over the classes (our reading), or of
    the class given. With two groups and two classes it is `equal_opportunity_difference`.
    """
    table = _checked(counts, positive or 0)
    hits, size = _correct(table), table.sum(-1)
    rest = (hits.sum(-2, keepdim=True) - hits) / (size.sum(-2, keepdim=True) - size)
    gap = (hits / size - rest).abs().amax(-2)  # [..., classes]
    if positive is None and gap.shape[-1] > 2:
        return gap.mean(-1)
    return gap[..., 1 if positive is None else positive]


def worst_group_accuracy(counts: Tensor) -> Tensor:
    """Smallest accuracy over the groups, `[...]`."""
    return group_accuracy(counts).amin(-1)


def worst_cell_accuracy(counts: Tensor) -> Tensor:
    """Smallest accuracy over the cells group x label, `[...]` (arXiv 1911.08731: worst-group accuracy)."""
    table = _checked(counts)
    return (_correct(table) / table.sum(-1)).flatten(-2).amin(-1)


# --- of scores -------------------------------------------------------------------------------------------


def auroc(counts: Tensor) -> Tensor:
    """Area under the ROC curve, `[...]`, of counts `[..., 2, levels]`: true class by score, from low to high.

    The share of pairs, one example of each class, in which that of class 1 has the higher score; a tie is a half.

    >>> float(auroc(torch.tensor([[2, 1, 0], [0, 1, 3]])))      # of 12 pairs 11 are in order and one is a tie
    0.9583333333333334
    """
    negative, positive = counts.double().unbind(-2)
    below = negative.cumsum(-1) - negative / 2
    return (positive * below).sum(-1) / (positive.sum(-1) * negative.sum(-1))


@dataclass(frozen=True)
class Metric:
    """A scalar metric: `function(counts) -> [...]`, a title, a unit ("%", "" for a fraction), what is better.

    `better` is None for a property of the data rather than of a model.
    """

    function: Callable[[Tensor], Tensor]
    title: str
    unit: str
    better: Literal["lower", "higher"] | None


METRICS: dict[str, Metric] = {
    function.__name__: Metric(function, title, unit, better)
    for function, title, unit, better in (
        (accuracy, "Accuracy", "", "higher"),
        (weighted_f1, "Weighted F1", "", "higher"),
        (error, "Error (100 - weighted F1)", "%", "lower"),
        (positive_class_f1, "F1 of the positive class", "", "higher"),
        (min_class_f1, "Smallest class F1", "", "higher"),
        (median_class_f1, "Median class F1", "", "higher"),
        (class_f1_gap, "Class F1 gap", "", "lower"),
        (min_class_recall, "Smallest class recall", "", "higher"),
        (class_recall_gap, "Class recall gap", "", "lower"),
        (demographic_parity_difference, "Demographic parity difference", "", "lower"),
        (demographic_parity_ratio, "Demographic parity ratio", "", "higher"),
        (equalized_odds_difference_sum, "Equalized odds difference (sum)", "", "lower"),
        (equalized_odds_difference_max, "Equalized odds difference (maximum)", "", "lower"),
        (equalized_odds_one_vs_rest_max, "Equalized odds difference (group against rest)", "", "lower"),
        (equal_opportunity_difference, "Equal opportunity difference", "", "lower"),
        (true_positive_rate_ratio, "True positive rate ratio", "", "higher"),
        (false_positive_rate_difference, "False positive rate difference", "", "lower"),
        (false_positive_rate_ratio, "False positive rate ratio", "", "higher"),
        (worst_group_accuracy, "Worst-group accuracy", "", "higher"),
        (worst_cell_accuracy, "Worst-group accuracy (group x label)", "", "higher"),
        (base_rate_difference, "Base rate difference", "", None),
    )
}
