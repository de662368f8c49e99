"""arXiv 2403.00625: group-wise Fisher information, neutralised, inside a weighted SVD of the head.

``configuration`` holds what a run is and which runs each table needs, ``work`` what one run does, ``tables`` how
records become the paper's cells and the quantities that claims are about.
"""

from fairtuning.plan import seeded
from fairtuning.studies.zhang2024.configuration import (
    LABELS,
    NAME,
    PROFILES,
    STUDY,
    Run,
    configuration,
    offered,
    resolve,
    selected,
    units,
)
from fairtuning.studies.zhang2024.tables import BACKBONES, CELLS, COUNTED, METRIC, cell, left_out, quantities, results
from fairtuning.studies.zhang2024.work import work

__all__ = [
    "BACKBONES", "CELLS", "COUNTED", "LABELS", "METRIC", "NAME", "PROFILES", "STUDY", "Run", "cell", "configuration",
    "left_out", "offered", "quantities", "resolve", "results", "seeded", "selected", "units", "work",
]  # fmt: skip
