"""Where things are kept: the checkout, downloaded data, records."""

import os
from pathlib import Path

_checkout = Path(__file__).resolve().parents[2]
#: The checkout when the package is installed from one (as the README does), else the current folder.
ROOT = _checkout if (_checkout / "pyproject.toml").is_file() else Path.cwd()


def data_folder() -> Path:
    """Downloaded data sets: ``$FAIRTUNING_DATA``, else ``data/`` in the checkout (never committed)."""
    return Path(os.environ.get("FAIRTUNING_DATA") or ROOT / "data")


def results_folder() -> Path:
    """Records: ``$FAIRTUNING_RESULTS``, else ``results/`` in the checkout (committed)."""
    return Path(os.environ.get("FAIRTUNING_RESULTS") or ROOT / "results")


def fresh_folder() -> Path:
    """A new folder for records made again beside the committed ones: ``_build/fresh/<time>``."""
    from datetime import datetime

    return ROOT / "_build" / "fresh" / datetime.now().strftime("%Y%m%d-%H%M%S")
