"""Fair fine-tuning, reproduced: the library behind a companion book to three papers.

The rooms are imported by name (``from fairtuning import metrics``); nothing heavy is imported here, so that
``import fairtuning`` and the command line's help stay fast.
"""

__version__ = "0.1.0"


class FairtuningError(Exception):
    """A mistake that a user can mend: its message is one line naming what was met, what is allowed, what to do."""
