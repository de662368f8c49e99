"""What the book's pages on P3 show: columns as effects, and the searches behind a strength."""

from collections.abc import Callable, Mapping
from functools import partial

import torch

from fairtuning.analysis import Results
from fairtuning.collaboration.leakage import ATTACKS, KNOWN
from fairtuning.plan import seeded
from fairtuning.runs import Record, Store, pack
from fairtuning.statistics import Effect
from fairtuning.studies.kamalaruban2025.configuration import STUDY, Run
from fairtuning.studies.kamalaruban2025.tables import TaskResults

#: title -> (metric, factor)
COLUMNS = {
    "accuracy": ("accuracy", 100.0),
    "F1": ("positive_class_f1", 100.0),
    "AUROC": ("auroc", 100.0),
    "DP difference": ("demographic_parity_difference", 100.0),
    "FPR difference": ("false_positive_rate_difference", 100.0),
    "TPR difference": ("equal_opportunity_difference", 100.0),
    "worst cell": ("worst_cell_accuracy", 100.0),
    "probe": ("probe_accuracy", 100.0),
}
#: The same gaps as ratios, 1 where the groups have equal rates; and the two error rates as one gap, their larger.
RATIOS = {
    "DP ratio": ("demographic_parity_ratio", 1.0),
    "FPR ratio": ("false_positive_rate_ratio", 1.0),
    "TPR ratio": ("true_positive_rate_ratio", 1.0),
    "equalized odds difference, %": ("equalized_odds_difference_max", 100.0),
}


def on_task(label: str, task: str, *, first: str) -> str:
    """The label of the same method on a task; the first task of a profile goes without saying.

    >>> on_task("Orth/weight", "Bald", first="celeba"), on_task("Orth", "celeba", first="celeba")
    ('Orth/weight/Bald', 'Orth')
    """
    return label if task == first else f"{label}/{task}"


def measures(
    results: TaskResults | None, columns: Mapping[str, tuple[str, float]] = COLUMNS
) -> dict[str, Callable[..., Effect]]:
    """COLUMNS (or RATIOS) as functions (of, minus=None) -> Effect; none without results."""
    if results is None:
        return {}
    return {title: partial(scaled, results, *how) for title, how in columns.items()}


def scaled(results: Results, metric: str, factor: float, of: str, *, minus: str | None = None) -> Effect:
    return results.effect(of, metric, minus=minus).times(factor)


def leaks(results: TaskResults | None) -> dict[str, Callable[..., Effect]]:
    """What somebody learns from the adapter of a label, as functions (of, minus=None) -> Effect in percent.

    A label that sends no adapter stands for the same attacks with the backbone alone, by the same images.
    """
    attacked = [label for label, records in results.runs.items() if "membership" in records[0]] if results else []
    if not attacked:
        return {}

    def effect(found: Results, metric: str, sent: str, alone: str, of: str, *, minus: str | None = None) -> Effect:
        of, minus = (
            label and (f"{label}, {sent}" if label in attacked else f"{attacked[0]}, {alone}") for label in (of, minus)
        )
        return scaled(found, metric, 100.0, of, minus=minus)

    rates = {"AUC": "auroc", "TPR at 1 % FPR": "true_positive_rate_at_1%"}
    return {
        f"attribute, {known} known": partial(effect, results.probes, "accuracy", f"sent, {known}", f"frozen, {known}")
        for known in (0, *KNOWN)
    } | {
        f"{title}, {attack}": partial(effect, results.membership, metric, attack, "frozen")
        for title, metric in rates.items()
        for attack in ATTACKS
    }


def at_share_of(results: TaskResults, reference: str) -> Results:
    """Every label with as many test images predicted positive as ``reference`` predicts, seed by seed.

    Those with its highest scores; of equal ones the first in the test set. What remains of a smaller gap is not the
    doing of a model that says yes less often.
    """
    found = {}
    for label, records in results.runs.items():
        if len(records) != len(results.runs[reference]):
            continue
        numbers = results.predictions(reference).sum(-1).tolist()
        found[label] = []
        for record, scores, number in zip(records, results.scores(label), numbers, strict=True):
            predicted = torch.zeros_like(scores)
            predicted[scores.argsort(descending=True, stable=True)[:number]] = 1
            found[label].append(record | {"predictions": {"test": pack(predicted.tolist(), classes=2)}})
    return Results(found, results.examples, resamples=results.resamples)


def searches(store: Store, profile: str, label: str) -> list[list[tuple[Run, Record | None]]]:
    """The searches behind a label, each a list of candidates with their validation records (None: not run yet)."""
    lookup = store.lookup(STUDY)
    _, found = STUDY.selected(label, profile, lookup)
    return [[(run, lookup(seeded(run, 0))) for run in candidates] for candidates in found]


def by_strength(store: Store, profile: str, label: str) -> dict[float, Record]:
    """Validation records of the strengths that were tried for a label, weakest first; 0 stands for Erm."""
    if STUDY.resolve(label)["strength"] is not None:
        return {}
    candidates = searches(store, profile, label)[-1:]
    return {run.strength: record for found in candidates for run, record in found if record is not None}


def chosen(store: Store, profile: str, label: str) -> float:
    """The strength that the rule of a label selects."""
    run, _ = STUDY.selected(label, profile, store.lookup(STUDY))
    return run.strength
