"""arXiv 2503.05684: LoRA fine-tuning when the developer may not see the sensitive attribute, an auditor may.

``configuration`` holds what a run is and which runs each question needs, ``work`` what one run does, ``tables`` how
records become the quantities that claims are about. The methods themselves are in ``collaboration.parties``.
"""

from fairtuning.plan import seeded
from fairtuning.studies.kamalaruban2025.configuration import (
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
from fairtuning.studies.kamalaruban2025.tables import BACKBONES, COUNTED, METRIC, cell, left_out, quantities, results
from fairtuning.studies.kamalaruban2025.work import work

__all__ = [
    "BACKBONES", "COUNTED", "LABELS", "METRIC", "NAME", "PROFILES", "STUDY", "Run", "cell", "configuration",
    "left_out", "offered", "quantities", "resolve", "results", "seeded", "selected", "units", "work",
]  # fmt: skip
