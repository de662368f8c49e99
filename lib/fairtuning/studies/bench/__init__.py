"""One head, many methods, many data sets: the papers' methods beside the baselines of the field, at equal budgets.

``configuration`` holds the methods, what each is told and which runs the tables need, ``work`` what one run does,
``tables`` how records become rows, paired differences and the quantities of claims/bench.yaml.
"""

from fairtuning.studies.bench.configuration import (
    LABELS,
    METHODS,
    NAME,
    PROFILES,
    Run,
    configuration,
    key,
    labels_of,
    plan,
    planned,
    resolve,
    seeded,
    selected,
    units,
)
from fairtuning.studies.bench.tables import (
    adapter_frontier,
    adapters,
    columns,
    differences,
    frontier,
    mean_ranks,
    quantities,
    results,
)
from fairtuning.studies.bench.work import load, work

__all__ = [
    "LABELS", "METHODS", "NAME", "PROFILES", "Run", "adapter_frontier", "adapters", "columns", "configuration",
    "differences", "frontier", "key", "labels_of", "load", "mean_ranks", "plan", "planned", "quantities", "resolve",
    "results", "seeded", "selected", "units", "work",
]  # fmt: skip
