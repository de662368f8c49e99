"""arXiv 2503.05684: LoRA fine-tuning when the developer may not see the sensitive attribute, an auditor may.

``configuration`` holds what a run is and which runs each question needs, ``work`` what one run does, ``tables`` how
records become the quantities that claims are about. The methods themselves are in ``collaboration.parties``.
"""

from fairtuning.studies.kamalaruban2025.configuration import (
    LABELS,
    NAME,
    PROFILES,
    Run,
    configuration,
    key,
    offered,
    plan,
    resolve,
    seeded,
    selected,
    units,
)
from fairtuning.studies.kamalaruban2025.tables import BACKBONES, COUNTED, cell, left_out, quantities, results
from fairtuning.studies.kamalaruban2025.work import work

__all__ = [
    "BACKBONES", "COUNTED", "LABELS", "NAME", "PROFILES", "Run", "cell", "configuration", "key", "left_out", "offered",
    "plan", "quantities", "resolve", "results", "seeded", "selected", "units", "work",
]  # fmt: skip
