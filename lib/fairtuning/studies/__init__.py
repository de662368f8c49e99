"""Studies, one per paper: which runs its tables need and what one run does. ``Module`` is what each must have."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

from fairtuning import FairtuningError
from fairtuning.plan import Record, Study

#: Every paper of the companion, in the book's order.
STUDIES = ("zhang2024", "sukumaran2024", "kamalaruban2025")
#: Studies of our own, across papers: they run like the others, but have no published numbers beside theirs.
OWN = ("bench",)


class Runnable(Protocol):
    """What the store and its executors ask of a study."""

    STUDY: Study

    def units(self, runs: Sequence[Any]) -> list[list[Any]]:
        """Lists of runs that train together."""

    def work(self, unit: Sequence[Any]) -> list[Record]:
        """The records (and the lines they refer to) of a unit; called in a worker."""


class Module(Runnable, Protocol):
    """What tables, verdicts and pages ask of the package of a study; nothing else is asked of it."""

    NAME: str
    PROFILES: Mapping[str, Mapping[str, Any]]
    LABELS: Mapping[str, Sequence[str]]  # table or figure -> labels of runs
    COUNTED: Sequence[str]  # items that are counted, and need no runs
    METRIC: Mapping[str, Any]  # the paper's column names, and the metrics behind them
    BACKBONES: Mapping[str, str]  # titles of those that the pages name

    def results(self, store: Any, profile: str, **which: Any) -> Any:
        """What a store holds: ``labels``, ``seeds`` and ``data`` choose; MissingRuns where there is nothing."""

    def cell(self, results: Any, slug: str, row: str, column: str) -> Any:
        """Our value of one published cell."""

    def quantities(self, results: Any) -> Mapping[str, Callable]:
        """The functions that the study's claims name."""

    def left_out(self, slug: str, profile: str) -> str:
        """What of a table a profile has no runs for, in words; "" where it has them all."""


def study(name: str) -> Module:
    """The study's package; an unknown name is a one-line error."""
    if name not in (*STUDIES, *OWN):
        raise FairtuningError(f"unknown study {name!r}; allowed: {', '.join((*STUDIES, *OWN))}")
    return import_module(f"fairtuning.studies.{name}")


def check_profile(module: Module, profile: str) -> None:
    """A one-line error unless the study has this profile."""
    if profile not in module.PROFILES:
        raise FairtuningError(f"profile is {profile!r}; allowed: {', '.join(module.PROFILES)}")
