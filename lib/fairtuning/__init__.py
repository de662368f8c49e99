"""Fair fine-tuning, reproduced: the library behind a companion book to three papers.

The rooms are imported by name (``from fairtuning import metrics``); nothing heavy is imported here, so that
``import fairtuning`` and the command line's help stay fast.
"""

import warnings

# tqdm in a notebook without ipywidgets says so at length, with the path of its file; plain bars do here.
warnings.filterwarnings("ignore", message="IProgress not found")

__version__ = "0.1.0"


class FairtuningError(Exception):
    """A mistake that a user can mend: its message is one line naming what was met, what is allowed, what to do."""
