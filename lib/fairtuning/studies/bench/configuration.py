"""Which methods are compared, what each is told, and which runs the tables need.

Every method trains one linear head on the same frozen inputs: one-hot and standardised columns of a table, or the
features of a backbone. Only what the loss, the sampling or the step after training does with the groups differs. The
one exception is a whole network on a table, which shows what a head leaves to be had.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from fairtuning import FairtuningError, plan
from fairtuning.studies.sukumaran2024.configuration import AGE, HAIR, RULES

NAME = "bench"


@dataclass(frozen=True)
class Run(plan.Run):
    """One head, fully resolved. ``label``, ``attribute``, ``size``, ``edition``, ``backbone``: of images, "" for a
    table."""

    data: str = "adult"
    source: str = field(default="", compare=False)  # of data of your own: its YAML file; ``edition`` is its digest
    method: str = "ERM"
    strength: float = 0.0  # of the method: see Method.strength; 0 where it has none
    batch_size: int = 512
    epochs: int = 15


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
RANK = 2  # at which P1 splits the head: that of a head of two outputs, which needs as many inputs

SEARCH_SEEDS = 3
FEWEST_FOR_DFR = 20  # validation rows of each label in each group: half of them choose the penalty, half fit

VIT = {"backbone": "vit-tiny", "batch_size": 256, "epochs": 15}
PROFILES: dict[str, dict[str, Any]] = {
    "compact": {
        "seeds": 10,
        "seconds": 0.3,  # of one run on one core, before there are records to tell
        "data": {
            "adult": {},
            "waterbirds": VIT | {"size": 112, "edition": "resized-128", "epochs": 30},
            "celeba": HAIR | VIT | {"size": "80x64", "edition": "resized-64-20000"},
            "utkface": AGE | VIT | {"size": 80, "edition": "resized-112"},
            # The pair of 2403.00625, gender and Heavy_Makeup, has seven test images of one kind: too few for any gap.
            "lfw": VIT | {"size": 80, "edition": "resized-80-boolean", "label": "Smiling", "attribute": "gender"},
        },
    },
    "classroom": {"seeds": 5, "seconds": 0.1, "data": {"census": {"batch_size": 256}}},
}


# ------------------------------------------------------------------------------------------------------------- labels
def given(name: str) -> plan.Fields | None:
    """``DP=0.9``: a method and its strength, which is then not selected."""
    method, equals, strength = name.partition("=")
    if not equals or method not in METHODS:
        return None
    strengths = METHODS[method].strengths
    if strength not in [f"{value:g}" for value in strengths]:
        allowed = ", ".join(f"{value:g}" for value in strengths) or "none"
        raise FairtuningError(f"strength is {strength!r} in {name!r}; allowed: {allowed}")
    return {"method": method, "given": float(strength)}


def check(label: str, asked: plan.Fields) -> None:
    """A rule selects a strength, where there is one to select."""
    strengths = METHODS[asked["method"]].strengths
    if "rule" in asked and ("given" in asked or not strengths):
        raise FairtuningError(f"rule is {asked['rule']!r} in {label!r}; allowed: none, for nothing is selected")


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

# -------------------------------------------------------------------------------------------------------------- choices
def select(run: Run, asked: plan.Fields, profile: plan.Fields, choose: Callable) -> Run:
    """(1) ERM's learning rate, by R1 but for ERM's own row; (2) at that rate the method's strength, by the label's."""
    rule, method = asked.get("rule", "R1"), run.method
    found = choose(_candidates(replace(run, method="ERM")), rule if method == "ERM" else "R1")
    if method != "ERM":
        candidates = _candidates(replace(found, method=method))
        if "given" in asked:
            found = candidates[METHODS[method].strengths.index(asked["given"])]
        else:
            found = choose(candidates, rule)
    return replace(found, evaluate="test")


def _candidates(run: Run) -> list[Run]:
    setting = "learning_rate" if run.method in ("ERM", "MLP", "reweighting") else "strength"
    return [replace(run, **{setting: value}) for value in METHODS[run.method].strengths] or [run]


def judge(record: plan.Record, profile: plan.Fields) -> plan.Fields:
    return plan.accuracy(record) | {"worst": record["worst"]["validation"]}


def place(run: Run) -> Run:
    """What of a run says which inputs, labels and groups it has; the rest at its default."""
    names = ("data", "source", "label", "attribute", "size", "edition", "backbone")
    return Run(**{name: getattr(run, name) for name in names})


def units(runs: Sequence[Run], *, size: int = 40) -> list[list[Run]]:
    """Runs that train together: the same but for seeds and, in a loss, the strength; at most ``size`` of them."""

    def shape(run: Run) -> str:
        return str(replace(run, seed=0, order_seed=0, strength=0.0 if run.method in STACKED else run.strength))

    ordered = sorted(runs, key=lambda run: (shape(run), run.strength, run.seed))
    found = [list(group) for _, group in groupby(ordered, key=shape)]
    return [group[start : start + size] for group in found for start in range(0, len(group), size)]


STUDY = plan.Study(
    name=NAME,
    run=Run,
    methods={name: {"method": name} for name in METHODS},
    named=given,
    modifiers={rule: {"rule": rule} for rule in RULES},
    check=check,
    labels=LABELS,
    profiles=PROFILES,
    select=select,
    judge=judge,
    search_seeds=lambda seeds: SEARCH_SEEDS,
    version=lambda run: METHODS[run.method].version,
)
selected, resolve, configuration = STUDY.selected, STUDY.resolve, STUDY.restore
