"""Which runs a table needs: what a label means, what is searched first, and in which order it all trains.

A study is a declaration (``Study``): its methods, profiles and tables, and one function that makes its choices in their
order. Everything else is here, once: labels, rules of selection, phases, and which record belongs to which run.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from fairtuning import FairtuningError

Record = dict[str, Any]
Fields = Mapping[str, Any]
Lookup = Callable[[Any], Record | None]
MARGIN = 0.01  # of validation accuracy, within which rules R2, D and O look at something else
FAIR_ENOUGH, COST = 0.02, 0.04  # rule F: a gap on validation data, and what it may cost of validation accuracy


@dataclass(frozen=True)
class Run:
    """What every run says, whatever the study; a study adds fields. A field at its default is no part of the key."""

    data: str = ""
    size: int | str = ""  # of images, a side or "height x width"
    edition: str = ""
    label: str = ""  # of data sets that offer several; "": the one it has
    attribute: str = ""  # likewise
    backbone: str = ""
    method: str = ""
    learning_rate: float = 0.0  # 0: to be selected
    batch_size: int = 0
    epochs: int = 0
    seed: int = 0  # initialisation
    order_seed: int = 0  # order of the data
    evaluate: str = "test"  # validation for the runs of a search: they never read the test set
    precision: str = "float64"
    threads: int = 1


def seeded(run: Any, seed: int) -> Any:
    """The same run with another seed, of initialisation and of the order of the data."""
    return replace(run, seed=seed, order_seed=seed)


def task_of(run: Any) -> str:
    """What tells label and attribute of a run from others of the same images; "" where the data has one pair."""
    return f"{run.label}-{run.attribute}" if run.label else ""


# ------------------------------------------------------------------------------------------------- search and selection
def pick(rule: str, found: Sequence[Fields]) -> int:
    """Which candidate a rule selects, of what was measured on validation data; the first of equals.

    R1: the highest accuracy. R2: the best worst group within a point of that. D, O, F: the first is the plain method.
    D, O: of the others within a point of its accuracy the last (the strongest), or the one with the smallest gap (an
    oracle's choice). F: of the others that lose at most COST (all, where all lose more) the most accurate one whose
    gap is at most FAIR_ENOUGH; where there is none, the one with the smallest gap.
    """
    accuracy = [one["accuracy"] for one in found]
    if rule == "R1":
        return accuracy.index(max(accuracy))
    plain = int(rule != "R2")
    bound = accuracy[0] - COST if rule == "F" else (accuracy[0] if plain else max(accuracy)) - MARGIN - 1e-9
    near = [index for index, value in enumerate(accuracy) if value >= bound and index >= plain]
    if rule == "R2":
        return max(near, key=lambda index: (found[index]["worst"], -index))
    if rule == "F":
        near = near or list(range(1, len(found)))
        fair = [index for index in near if found[index]["gap"] <= FAIR_ENOUGH]
        return max(fair, key=accuracy.__getitem__) if fair else min(near, key=lambda index: found[index]["gap"])
    if not near:
        return 1
    return near[-1] if rule == "D" else min(near, key=lambda index: found[index]["gap"])


def best(
    candidates: Sequence[Any], lookup: Lookup, judge: Callable[[Record], Fields], *, rule: str = "R1", seeds: int = 1
) -> Any | None:
    """The candidate that a rule selects, on means over seeds 0 to ``seeds - 1``; None where runs are missing."""
    records = [[lookup(seeded(run, seed)) for seed in range(seeds)] for run in candidates]
    if any(record is None for of_run in records for record in of_run):
        return None
    means = []
    for of_run in records:
        judged = [judge(record) for record in of_run]
        means.append({name: sum(one[name] for one in judged) / seeds for name in judged[0]})
    return candidates[pick(rule, means)]


def accuracy(record: Record) -> Fields:
    """What rule R1 looks at."""
    return {"accuracy": record["accuracy"]["validation"]}


# --------------------------------------------------------------------------------------------------------------- study
@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """One paper's experiments, declared.

    ``methods``: first word of a label -> fields of ``run`` (or of what ``select`` asks for); ``named`` likewise for
    names that cannot be listed. ``modifiers``: later words; ``numbers``: what stands before "=" -> fields from what
    stands behind. ``check(label, asked)`` refuses what does not go together, by FairtuningError. ``profiles``: name ->
    "seeds", "data" (data set -> fields that say where it is; the first goes without saying in a label) and whatever
    ``select`` asks for. ``labels``: table or figure -> labels. ``select(run, asked, profile, choose)`` makes the
    choices in their order; ``choose(candidates, rule)`` has them trained, and picks. ``judge(record, profile)``: what
    rules look at. ``here(run)``: whether its data can be read; labels of data that cannot are left out, unless all are.
    """

    name: str
    run: type
    methods: Mapping[str, Fields]
    labels: Mapping[str, Sequence[str]]
    profiles: Mapping[str, Mapping[str, Any]]
    select: Callable[..., Any]
    named: Callable[[str], Fields | None] = lambda name: None
    modifiers: Mapping[str, Fields] = field(default_factory=dict)
    numbers: Mapping[str, Callable[[str], Fields]] = field(default_factory=dict)
    check: Callable[[str, Fields], None] = lambda label, asked: None
    judge: Callable[[Record, Fields], Fields] = lambda record, profile: accuracy(record)
    seeds_of: Callable[[Fields, Fields, int], int] = lambda asked, profile, seeds: seeds
    search_seeds: Callable[[int], int] = lambda seeds: 1
    version: Callable[[Any], int] = lambda run: 1
    here: Callable[[Any], bool] = lambda run: True

    # ------------------------------------------------------------------------------------------------------- labels
    @cached_property
    def places(self) -> set[str]:
        """Every data set of every profile: the words of a label that say where, not how."""
        return {data for profile in self.profiles.values() for data in profile["data"]}

    def resolve(self, label: str) -> dict[str, Any]:
        """The fields that a label states, ``METHOD/word/name=value``, "place" (the data set) among them.

        The data set may also come first. FairtuningError in one line where it is none.
        """
        method, *words = label.split("/")
        if method in self.places and words:
            method, words = words[0], [*words[1:], method]
        asked = self.methods.get(method, self.named(method))
        if asked is None:
            allowed = f"{', '.join(self.methods)}, then /{self._allowed}"
            raise FairtuningError(f"unknown run label {label!r}; allowed: {allowed}")
        asked = dict(asked)
        for word in words:
            name, equals, value = word.partition("=")
            try:
                if word in self.places:
                    asked["place"] = word
                elif equals:
                    asked |= self.numbers[name](value)
                else:
                    asked |= self.modifiers[word]
            except (KeyError, ValueError):
                raise self.unknown(word, label) from None
        self.check(label, asked)
        return asked

    def unknown(self, word: str, label: str) -> FairtuningError:
        return FairtuningError(f"unknown modifier {word!r} in {label!r}; allowed: {self._allowed}")

    @property
    def _allowed(self) -> str:
        return ", ".join([*self.modifiers, *(f"{name}=…" for name in self.numbers), *sorted(self.places)])

    def place_of(self, label: str, profile: str) -> str:
        """The data set that a label is about in a profile."""
        return self.resolve(label).get("place") or next(iter(self.profiles[profile]["data"]))

    def offered(self, label: str, profile: str) -> bool:
        """Whether a profile has the data set, the backbone and the rank that a label needs."""
        settings, asked = self.profiles[profile], self.resolve(label)
        place = self.place_of(label, profile)
        if place not in settings["data"]:
            return False
        settings = settings | settings["data"][place]
        return asked.get("backbone") in (None, *settings.get("backbones", ())) and asked.get("rank", 1) <= settings.get(
            "largest_rank", math.inf
        )

    def seeds(self, label: str, profile: str, seeds: int | None = None) -> int:
        """How many seeds a label has."""
        settings = self.profiles[profile]
        return self.seeds_of(self.resolve(label), settings, settings["seeds"] if seeds is None else seeds)

    # ---------------------------------------------------------------------------------------------------- selection
    def selected(
        self, label: str, profile: str, lookup: Lookup, seeds: int | None = None, split_seed: int = 0
    ) -> tuple[Any, list[list[Any]]]:
        """The run that a label names with every setting selected, and the searches (lists of candidates) behind it.

        Settings are selected within a split. While a search is unfinished a candidate stands in, so that the number of
        runs can be told beforehand.
        """
        if not self.offered(label, profile):
            raise FairtuningError(f"{label!r} is not offered in profile {profile}")
        asked, settings, searches = self.resolve(label), self.profiles[profile], []
        data = self.place_of(label, profile)
        tried = self.search_seeds(settings["seeds"] if seeds is None else seeds)

        def choose(candidates: Sequence[Any], rule: str = "R1") -> Any:
            if len(candidates) == 1:
                return candidates[0]
            searches.append(list(candidates))
            chosen = best(candidates, lookup, lambda record: self.judge(record, settings), rule=rule, seeds=tried)
            return chosen or candidates[{"D": -1, "O": -1, "F": 1}.get(rule, 0)]

        given = {"evaluate": "validation", "data": data, "split_seed": split_seed}
        given |= {**settings.get("settings", {}), **settings["data"][data], **asked}
        stated = {name: value for name, value in given.items() if name in self.run.__dataclass_fields__}
        return self.select(self.run(**stated), asked, settings | settings["data"][data], choose), searches

    def splits(self, profile: str, split_seed: int | None = None) -> Sequence[int]:
        """The seeds of the divisions into parts: the one asked for, or the profile's (0 where it says nothing)."""
        if split_seed is None:
            return self.profiles[profile].get("splits", (0,))
        if not 0 <= split_seed < 2**31:
            raise FairtuningError(f"split_seed is {split_seed}; allowed: 0 to {2**31 - 1}")
        return (split_seed,)

    def phases(
        self,
        profile: str,
        labels: Iterable[str],
        seeds: int | None,
        lookup: Lookup,
        split_seed: int | None = None,
    ) -> Iterator[list[Any]]:
        """Phases of runs, each search before what it selects for: train one, ask for the next.

        On every split of the profile, or on one. Labels that the profile does not offer are left out.
        """
        if profile not in self.profiles:
            raise FairtuningError(f"profile is {profile!r}; allowed: {', '.join(self.profiles)}")
        seeds = self.profiles[profile]["seeds"] if seeds is None else seeds
        if seeds < 1:
            raise FairtuningError(f"seeds is {seeds}; allowed: 1 or more")
        labels = [label for label in labels if self.offered(label, profile)]
        here = [label for label in labels if self.here(self.selected(label, profile, lambda run: None)[0])]
        wanted = [(label, split) for split in self.splits(profile, split_seed) for label in here or labels]
        depth, tried = 0, range(self.search_seeds(seeds))
        while True:
            found = [self.selected(label, profile, lookup, seeds, split) for label, split in wanted]
            deep = [searches[depth] for _, searches in found if len(searches) > depth]
            phase = [seeded(run, seed) for candidates in deep for run in candidates for seed in tried]
            if not phase:
                break
            yield list(dict.fromkeys(phase))
            depth += 1
        last = [
            seeded(run, seed)
            for (run, _), (label, _) in zip(found, wanted, strict=True)
            for seed in range(self.seeds(label, profile, seeds))
        ]
        yield list(dict.fromkeys(last))

    # ------------------------------------------------------------------------------------------------ what there is
    def restore(self, record: Record) -> Any:
        """The run that a record is of."""
        return self.run(**record["configuration"])

    def by_run(self, records: Iterable[Record]) -> dict[Any, Record]:
        """Records by the run that they are of, those of another version of its method left out. No data is needed."""
        found = {self.restore(record): record for record in records}
        return {run: record for run, record in found.items() if self.version(run) == record["version"]}

    def present(
        self,
        records: Iterable[Record],
        labels: Iterable[str],
        profile: str,
        *,
        seeds: int | None = None,
        split_seed: int = 0,
    ) -> dict[str, list[Record]]:
        """Label -> its records in order of seed, for the labels whose seeds are all there."""
        lookup, found = self.by_run(records).get, {}
        for label in dict.fromkeys(labels):
            if self.offered(label, profile):
                run, _ = self.selected(label, profile, lookup, seeds, split_seed)
                there = [lookup(seeded(run, seed)) for seed in range(self.seeds(label, profile, seeds))]
                if None not in there:
                    found[label] = there
        return found
