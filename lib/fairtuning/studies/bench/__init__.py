"""One head, many methods, many data sets: the papers' methods beside the baselines of the field, at equal budgets.

``configuration`` holds the methods, what each is told and which runs the tables need, ``work`` what one run does,
``tables`` how records become rows, paired differences and the quantities of claims/bench.yaml.
"""

from fairtuning.plan import seeded
from fairtuning.studies.bench.configuration import (
    LABELS,
    METHODS,
    NAME,
    PROFILES,
    STUDY,
    Run,
    configuration,
    labels_of,
    resolve,
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
    "LABELS", "METHODS", "NAME", "PROFILES", "STUDY", "Run", "adapter_frontier", "adapters", "columns",
    "configuration", "differences", "frontier", "labels_of", "load", "mean_ranks", "quantities", "resolve", "results",
    "seeded", "selected", "units", "work",
]  # fmt: skip
