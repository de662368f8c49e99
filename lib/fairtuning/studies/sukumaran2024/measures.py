"""What the book's pages on P2 show beside the tables: columns as effects, recalls of the cells, searches."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from fairtuning.analysis import Results
from fairtuning.plan import Fields, best, seeded
from fairtuning.runs import Record, Store
from fairtuning.statistics import Effect, resampled_counts
from fairtuning.studies.sukumaran2024.configuration import RULES, STUDY, Run
from fairtuning.studies.sukumaran2024.tables import METRIC, attribute_agreement


def label_of(
    method: str,
    *,
    rank: int | None = None,
    penalty: float | None = None,
    groups: str | None = None,
    data: str | None = None,
    backbone: str | None = None,
) -> str:
    """The label of a method with modifiers; those that do not concern it are left out (a rank of FFT, say).

    >>> label_of("FairLoRA", rank=8, penalty=0.1, data="celeba"), label_of("FFT", rank=8, penalty=0.1)
    ('FairLoRA/r=8/lambda=0.1/celeba', 'FFT')
    """
    fair = method.startswith("Fair")
    modifiers = {
        "r={}": rank if method.endswith("LoRA") else None,
        "lambda={:g}": penalty if fair else None,
        "groups={}": groups if fair else None,
        "{}": data,
    }
    parts = [form.format(value) for form, value in modifiers.items() if value is not None]
    return "/".join([method, *parts, *([backbone] if backbone else [])])


def count_effect(
    results: Results, function: Callable[[Tensor], Tensor], of: str, *, minus: str | None = None
) -> Effect:
    """``function`` of counts ``[..., groups, classes, classes]`` for each seed, and under the shared resampling."""

    def both(label: str) -> tuple[Tensor, Tensor]:
        resampled = resampled_counts(
            results.predictions(label),
            results.label,
            group=results.group,
            classes=results.classes,
            groups=results.groups,
            resamples=results.resamples,
        )
        return function(results.counts(label)), function(resampled)

    by_seed, resampled = both(of)
    if minus is not None:
        others = both(minus)
        by_seed, resampled = by_seed - others[0], resampled - others[1]
    return Effect(by_seed=by_seed, resampled=resampled)


def cell_recall(counts: Tensor, group: int, label: int) -> Tensor:
    """Share of the examples of one cell (group, class) that are predicted right, ``[...]``."""
    cell = counts.double()[..., group, label, :]
    return cell[..., label] / cell.sum(-1)


def adjusted_accuracy(counts: Tensor, shares: Tensor) -> Tensor:
    """Accuracy with the cells (group, class) weighted by ``shares [groups, classes]``, ``[...]``.

    With the shares of the training part it is the "average accuracy" of much of the literature on Waterbirds (arXiv
    1911.08731), whose test part has other shares; arXiv 2410.17358's accuracies are unweighted.
    """
    recalls = counts.double().diagonal(dim1=-2, dim2=-1) / counts.double().sum(-1)
    return (recalls * shares / shares.sum()).sum((-2, -1))


def searches(store: Store, profile: str, label: str) -> list[list[tuple[Run, Record | None]]]:
    """The searches behind a label, each a list of candidates with their validation records (None: not run yet)."""
    lookup = store.lookup(STUDY)
    _, found = STUDY.selected(label, profile, lookup)
    return [[(run, lookup(seeded(run, 0))) for run in candidates] for candidates in found]


def search_rows(store: Store, profile: str, labels: Sequence[str]) -> list[list[str]]:
    """The searches behind ``labels`` as rows of text, each candidate once: for what, setting, value, validation
    accuracy and worst group in percent, at the epoch that the rules judge, and the rules that select it (a rate: R1).
    """
    rows = {}

    def judged(record: Record) -> Fields:
        return STUDY.judge(record, STUDY.profiles[profile])

    for label in labels:
        method = "LoRA" if label.split("/")[0].endswith("LoRA") else "FFT"
        for step in searches(store, profile, label):
            of_rate = len({run.learning_rate for run, _ in step}) > 1  # one search for all labels of a method
            rules = RULES[:1] if of_rate else RULES
            there = {seeded(run, 0): record for run, record in step}
            picks = {rule: best([run for run, _ in step], there.get, judged, rule=rule) for rule in rules}
            for run, record in step:
                place = (method, "rate", run.learning_rate) if of_rate else (label, "lambda", run.penalty)
                judgement = judged(record) if record else {}
                scores = [f"{100 * judgement[name]:.2f}" if record else "not run" for name in ("accuracy", "worst")]
                chosen = ", ".join(rule for rule, pick in picks.items() if pick == run)
                rows[place] = [*place[:2], f"{place[2]:g}", *scores, chosen]
    return list(rows.values())


def measures(results: Results | None) -> dict[str, Callable[..., Effect]]:
    """The paper's columns and the worst group (the worst cell of attribute and class), in percent, as functions
    (of, minus=None) -> Effect; none without results."""
    if results is None:
        return {}

    def of_metric(metric: str, factor: float, of: str, *, minus: str | None = None) -> Effect:
        return results.effect(of, metric, minus=minus).times(factor)

    columns = METRIC | {"F1 median": ("median_class_f1", 100.0), "worst group": ("worst_cell_accuracy", 100.0)}
    found = {column: partial(of_metric, *how) for column, how in columns.items()}
    if results.classes == results.groups:
        found["Sensitive Acc"] = partial(count_effect, results, lambda counts: 100 * attribute_agreement(counts))
    return found
