"""Studies: one per paper. Each says which runs its tables need and what one run does.

A study is a module with ``NAME``, ``PROFILES``, ``LABELS`` (item of the paper -> labels of runs), ``plan``, ``key``,
``units``, ``work``, ``cell`` and ``quantities``; ``studies.zhang2024`` is the pattern. A paper's study also says what
its pages need: ``offered``, ``left_out``, ``COUNTED`` and ``BACKBONES``.
"""

from importlib import import_module
from types import ModuleType

from fairtuning import FairtuningError

#: Every paper of the companion, in the book's order; those with a module here can be run.
PAPERS = ("zhang2024", "sukumaran2024", "kamalaruban2025")
STUDIES = ("zhang2024", "sukumaran2024", "kamalaruban2025")
#: Studies of our own, across papers: they run like the others, but have no published numbers beside theirs.
OWN = ("bench",)


def study(name: str) -> ModuleType:
    """The study's module; an unknown name is a one-line error."""
    if name not in (*STUDIES, *OWN):
        raise FairtuningError(f"unknown study {name!r}; allowed: {', '.join((*STUDIES, *OWN))}")
    return import_module(f"fairtuning.studies.{name}")


def check_profile(module: ModuleType, profile: str) -> None:
    """A one-line error unless the study has this profile."""
    if profile not in module.PROFILES:
        raise FairtuningError(f"profile is {profile!r}; allowed: {', '.join(module.PROFILES)}")
