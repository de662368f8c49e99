"""The order of a study's runs: each search before what it selects for, then the selected runs."""

from collections.abc import Callable, Generator, Sequence
from typing import Any

from fairtuning import FairtuningError


def check(profiles: dict[str, Any], profile: str, seeds: int) -> None:
    """A one-line error for an unknown profile or no seed."""
    if profile not in profiles:
        raise FairtuningError(f"profile is {profile!r}; allowed: {', '.join(profiles)}")
    if seeds < 1:
        raise FairtuningError(f"seeds is {seeds}; allowed: 1 or more")


def phases(
    labels: Sequence[Any],
    select: Callable[[Any], tuple[Any, list[list[Any]]]],
    *,
    seeded: Callable[[Any, int], Any],
    search_seeds: int,
    seeds: Callable[[Any], int],
) -> Generator[list[Any], None, None]:
    """Phases of runs: compute one, ask for the next.

    A label is whatever ``select`` takes. ``select(label)`` gives the run that it names, as far as its settings can be
    selected from the records so far, and the searches behind it, each a list of candidates; ``seeds(label)`` says how
    many seeds the label has.
    """
    depth = 0
    while True:
        searches = [select(label)[1] for label in labels]
        phase = [
            seeded(candidate, seed)
            for found in searches
            if len(found) > depth
            for candidate in found[depth]
            for seed in range(search_seeds)
        ]
        if not phase:
            break
        yield list(dict.fromkeys(phase))
        depth += 1
    yield list(dict.fromkeys(seeded(select(label)[0], seed) for label in labels for seed in range(seeds(label))))
