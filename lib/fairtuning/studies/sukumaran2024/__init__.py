"""arXiv 2410.17358: LoRA and full fine-tuning of vision transformers, with a penalty on the spread of group losses.

``configuration`` holds what a run is and which runs each table needs, ``work`` what one run does, ``tables`` how
records become the paper's cells and the quantities that claims are about.
"""

from fairtuning.studies.sukumaran2024.configuration import (
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
from fairtuning.studies.sukumaran2024.tables import (
    BACKBONES,
    CELLS,
    COUNTED,
    METRIC,
    cell,
    left_out,
    lookup_in,
    quantities,
    results,
)
from fairtuning.studies.sukumaran2024.work import work

__all__ = [
    "BACKBONES", "CELLS", "COUNTED", "LABELS", "METRIC", "NAME", "PROFILES", "Run", "cell", "configuration", "key",
    "left_out", "lookup_in", "offered", "plan", "quantities", "resolve", "results", "seeded", "selected", "units",
    "work",
]  # fmt: skip
