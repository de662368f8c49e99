"""Which methods are compared, what each is told, and which runs the tables need.

Every method trains one linear head on the same frozen inputs: one-hot and standardised columns of a table, or the
features of a backbone. Only what the loss, the sampling or the step after training does with the groups differs. The
one exception is a whole network on a table, which shows what a head leaves to be had.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Any

from fairtuning import FairtuningError
from fairtuning.runs import Record, key_of
from fairtuning.studies import planning
from fairtuning.studies.sukumaran2024.configuration import MARGIN, RULES, published_digest, seeded
from fairtuning.studies.zhang2024.configuration import digest as table_digest

NAME = "bench"


@dataclass(frozen=True)
class Run:
    """One head, fully resolved; its key is a hash of this, of the data's digest and of the method's version."""

    data: str = "adult"
    source: str = ""  # of data of your own: the path of its YAML file
    label: str = ""  # of data sets that offer several; "": the one it has
    attribute: str = ""  # likewise
    size: int | str = ""  # of the images; "" for a table
    edition: str = ""
    backbone: str = ""
    method: str = "ERM"
    strength: float = 0.0  # of the method: see Method.strength; 0 where it has none
    learning_rate: float = 0.0  # of Adam; 0: to be selected
    batch_size: int = 512
    epochs: int = 15
    seed: int = 0  # initialisation
    order_seed: int = 0  # order of the data
    evaluate: str = "test"  # validation for the runs of a search: they never read the test set
    precision: str = "float64"
    threads: int = 1


@dataclass(frozen=True)
class Method:
    """``told``: the parts in whose rows the attribute (the group) is needed. ``strengths``: the settings to select
    from, of what ``strength`` says; none where nothing is selected."""

    title: str
    told: tuple[str, ...] = ()
    strength: str = ""
    strengths: tuple[float, ...] = ()
    version: int = 1  # raised by hand when what the method does changes; part of every key


RATES = (0.001, 0.003, 0.01, 0.03)
LAMBDAS = (0.1, 1.0, 10.0, 100.0)  # of the paper's five; its smallest changes nothing
INTENSITIES = (0.1, 0.5, 0.7, 0.9)
TRAINING = ("training",)

#: Four settings each where there is one to choose. All but the first three and reweighting train at ERM's rate.
METHODS: dict[str, Method] = {
    "ERM": Method("cross-entropy alone", (), "learning rate", RATES),
    "MLP": Method("cross-entropy alone, a hidden layer of 64 trained with the head", (), "learning rate", RATES),
    "P1": Method("head split by a weighted SVD, groups' Fisher neutralised", TRAINING, "learning rate", RATES),
    "variance by class": Method("variance penalty on the head, groups by class", (), "lambda", LAMBDAS),
    "variance by attribute": Method("variance penalty on the head, by attribute", TRAINING, "lambda", LAMBDAS),
    "variance by cell": Method("variance penalty on the head, by class and attribute", TRAINING, "lambda", LAMBDAS),
    "DP": Method("demographic parity penalty", TRAINING, "intensity", INTENSITIES),
    "EO": Method("equalized odds penalty", TRAINING, "intensity", INTENSITIES),
    "group DRO": Method("largest group loss, balanced batches", TRAINING, "step", (0.003, 0.01, 0.03, 0.1)),
    "reweighting": Method("cells weigh the same", TRAINING, "learning rate", RATES),
    "DFR": Method("head fitted anew on balanced validation rows", ("validation",)),
    "threshold DP": Method("ERM, a threshold per group, demographic parity", ("validation", "test")),
    "threshold EO": Method("ERM, a threshold per group, equalized odds", ("validation", "test")),
}
#: Methods that act after training or on other rows: their validation rows are spent, they have no setting to select.
UNTUNED = tuple(name for name, method in METHODS.items() if not method.strengths)
#: Whose strengths may stand in one stack, being numbers in a loss rather than in the optimiser.
STACKED = ("variance by class", "variance by attribute", "variance by cell", "DP", "EO", "group DRO")

#: On tables alone: their frozen inputs are the columns themselves.
OF_TABLES = ("MLP",)
HIDDEN = 64

SEARCH_SEEDS = 3
FEWEST_FOR_DFR = 20  # validation rows of each label in each group: half of them choose the penalty, half fit

IMAGES = {"backbone": "vit-tiny", "batch_size": 256, "epochs": 15}
PROFILES: dict[str, dict[str, Any]] = {
    "compact": {
        "seeds": 10,
        "seconds": 0.3,  # of one run on one core, before there are records to tell
        "data": {
            "adult": {},
            "waterbirds": IMAGES | {"size": 112, "edition": "resized-128", "epochs": 30},
            "celeba": IMAGES
            | {"size": "80x64", "edition": "resized-64-20000", "label": "Wavy_Hair", "attribute": "Male"},
            "utkface": IMAGES | {"size": 80, "edition": "resized-112", "label": "age>=median", "attribute": "gender"},
            # The pair of 2403.00625, gender and Heavy_Makeup, has seven test images of one kind: too few for any gap.
            "lfw": IMAGES | {"size": 80, "edition": "resized-80-boolean", "label": "Smiling", "attribute": "gender"},
        },
    },
    "classroom": {"seeds": 5, "seconds": 0.1, "data": {"census": {"batch_size": 256}}},
}


# ------------------------------------------------------------------------------------------------------------- labels
@dataclass(frozen=True)
class Named:
    """What a label says: a data set, a method, and the rule that selects its strength or that strength itself."""

    data: str
    method: str
    rule: str = "R1"
    strength: float | None = None


@cache
def resolve(label: str) -> Named:
    """``adult/ERM/R2`` (selected by rule R1 or R2), ``adult/DFR`` (nothing to select), ``adult/DP=0.9`` (given)."""
    data, _, rest = label.partition("/")
    method, slash, rule = rest.partition("/")
    method, equals, strength = method.partition("=")
    if method not in METHODS:
        raise FairtuningError(f"unknown method {method!r} in {label!r}; allowed: DATA/METHOD, {', '.join(METHODS)}")
    strengths = METHODS[method].strengths
    if equals:
        try:
            given = float(strength)
        except ValueError:
            given = None
        if slash or given not in strengths:
            allowed = ", ".join(f"{value:g}" for value in strengths) or "none"
            raise FairtuningError(f"strength is {strength!r} in {label!r}; allowed: {allowed}, without a rule")
        return Named(data, method, strength=given)
    if rule not in (RULES if strengths else ("",)):
        raise FairtuningError(f"rule is {rule!r} in {label!r}; allowed: {', '.join(RULES if strengths else ['none'])}")
    return Named(data, method, rule or "R1")


def labels_of(data: str, *, without: Sequence[str] = ()) -> list[str]:
    """The rows of one data set: every method by both rules, and the strongest parity penalties.

    >>> labels_of("lfw", without=OF_TABLES)[:3]
    ['lfw/ERM/R1', 'lfw/ERM/R2', 'lfw/P1/R1']
    """
    found = [
        f"{data}/{name}" + (f"/{rule}" if rule else "")
        for name, method in METHODS.items()
        if name not in without
        for rule in (RULES if method.strengths else ("",))
    ]
    return [*found, f"{data}/DP=0.9", f"{data}/EO=0.9"]


#: Which runs each column needs; a column is a data set.
LABELS: dict[str, list[str]] = {
    data: labels_of(data, without=OF_TABLES if "backbone" in settings else ())
    for profile in PROFILES.values()
    for data, settings in profile["data"].items()
}


# --------------------------------------------------------------------------------------------- search and selection
Lookup = Callable[[Run], Record | None]


def best(candidates: Sequence[Run], lookup: Lookup, *, rule: str) -> Run | None:
    """The candidate that a rule selects, on means over the search's seeds; the first of equals. None if runs miss.

    R1: highest validation accuracy. R2: highest validation worst-group accuracy (label x group) among those within a
    point of R1's.
    """
    accuracy, worst = [], []
    for candidate in candidates:
        records = [lookup(seeded(candidate, seed)) for seed in range(SEARCH_SEEDS)]
        if any(record is None for record in records):
            return None
        accuracy.append(sum(record["accuracy"]["validation"] for record in records) / SEARCH_SEEDS)
        worst.append(sum(record["worst"]["validation"] for record in records) / SEARCH_SEEDS)
    if rule == "R1":
        return candidates[accuracy.index(max(accuracy))]
    near = [index for index, value in enumerate(accuracy) if value >= max(accuracy) - MARGIN - 1e-9]
    return candidates[max(near, key=lambda index: (worst[index], -index))]


def selected(label: str, profile: dict[str, Any], lookup: Lookup) -> tuple[Run, list[list[Run]]]:
    """The run that ``label`` names with every setting selected, and the searches (lists of candidates) behind it.

    (1) ERM's learning rate, by R1 but for ERM's own row by R2; (2) at that rate the method's strength, by the label's
    rule. Where a search is unfinished its first candidate stands in.
    """
    named = resolve(label)
    run = Run(data=named.data, evaluate="validation", **profile["data"][named.data])
    searches: list[list[Run]] = []

    def choose(candidates: list[Run], rule: str) -> Run:
        searches.append(candidates)
        return best(candidates, lookup, rule=rule) or candidates[0]

    run = choose(_candidates(run, "ERM"), named.rule if named.method == "ERM" else "R1")
    if named.method != "ERM":
        candidates = _candidates(run, named.method)
        if named.strength is not None:
            run = candidates[METHODS[named.method].strengths.index(named.strength)]
        else:
            run = choose(candidates, named.rule) if len(candidates) > 1 else candidates[0]
    return replace(run, evaluate="test"), searches


def _candidates(run: Run, method: str) -> list[Run]:
    run = replace(run, method=method)
    if method in ("ERM", "MLP", "reweighting"):
        return [replace(run, learning_rate=rate) for rate in METHODS[method].strengths]
    return [replace(run, strength=strength) for strength in METHODS[method].strengths] or [run]


def plan(profile_name: str, labels: Iterable[str], seeds: int, lookup: Lookup) -> Generator[list[Run], None, None]:
    """Phases of runs: each search before what it selects for, then the selected runs.

    Labels of data sets that the profile does not have are left out.
    """
    planning.check(PROFILES, profile_name, seeds)
    profile = PROFILES[profile_name]
    yield from planned(profile, [label for label in labels if resolve(label).data in profile["data"]], seeds, lookup)


def planned(profile: dict[str, Any], labels: list[str], seeds: int, lookup: Lookup) -> Generator[list[Run], None, None]:
    yield from planning.phases(
        labels,
        lambda label: selected(label, profile, lookup),
        seeded=seeded,
        search_seeds=SEARCH_SEEDS,
        seeds=lambda label: seeds,
    )


@cache
def digest(run: Run) -> str:
    """SHA-256 that stands for the data of a run, as ``place`` gives it."""
    if run.source:
        from fairtuning.datasets import own

        return own.read(run.source).digest
    if not run.backbone:
        return table_digest(run.data)
    if found := published_digest(run.data, run.size, run.edition):
        return found
    from fairtuning.studies.bench.work import load

    return load(place(run)).digest


def place(run: Run) -> Run:
    """What of a run says which inputs, labels and groups it has; the rest at its default."""
    names = ("data", "source", "label", "attribute", "size", "edition", "backbone")
    return Run(**{name: getattr(run, name) for name in names})


def task_of(run: Run) -> str:
    """What tells the label and attribute of a run from others of the same images; "" where the data has one pair."""
    return f"{run.label}-{run.attribute}" if run.label else ""


@cache
def key(run: Run) -> str:
    return key_of(run, digest=digest(place(run)), version=METHODS[run.method].version)


def units(runs: Sequence[Run], *, size: int = 40) -> list[list[Run]]:
    """Runs that train together: the same but for seeds and, in a loss, the strength; at most ``size`` of them."""

    def shape(run: Run) -> str:
        return str(replace(run, seed=0, order_seed=0, strength=0.0 if run.method in STACKED else run.strength))

    ordered = sorted(runs, key=lambda run: (shape(run), run.strength, run.seed))
    found = [list(group) for _, group in groupby(ordered, key=shape)]
    return [group[start : start + size] for group in found for start in range(0, len(group), size)]


def configuration(record: Record) -> Run:
    """The run that a record is of."""
    return Run(**record["configuration"])
