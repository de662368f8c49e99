"""What a run of P3 is, how a label such as ``Orth/weight`` names one, and which runs each group of questions needs.

The paper's settings could not be had (only its abstract, summaries and five captions): all of these are our reading.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fairtuning import FairtuningError, plan
from fairtuning.studies.sukumaran2024.configuration import AGE, HAIR, OFFICIAL, SMALL

NAME = "kamalaruban2025"


@dataclass(frozen=True)
class Run(plan.Run):
    """One training by developer and auditor, fully resolved."""

    data: str = "celeba"
    label: str = "Wavy_Hair"
    attribute: str = "Male"
    size: int | str = "80x64"
    backbone: str = "vit-tiny"
    weights: str = "pretrained"
    layers: str = "qkv"  # that have adapters
    blocks: int | None = None  # the last so many have adapters; None: all
    rank: int = 16
    alpha: float = 16.0
    method: str = "erm"  # of collaboration.parties.METHODS
    strength: float | None = 0.0  # lambda, gamma, or the auditor's rate over the developer's; None: to be selected
    images: str = "same"  # of developer and auditor; or disjoint
    sensitive: str = "trained"  # the auditor's adapter; random and shuffled are controls
    clip: float = 0.0  # of its tensors before it is sent, a root mean square; 0: none
    noise: float = 0.0  # added to them, in units of clip
    leaks: bool = False  # what the adapter that was sent gives away is measured as well
    schedule: str = "cosine"
    keep: str = "last"  # epoch
    batch_size: int = 64
    epochs: int = 4
    rounds: int = 1  # turns of the developer, in Adv and Ent
    weight_decay: float = 0.01
    precision: str = "bfloat16"
    device: str = "cpu"


# ------------------------------------------------------------------------------------------------------------- labels
#: Methods, and their variants by a modifier: which of collaboration.parties.METHODS each is.
VARIANTS = {
    "Erm": {"": "erm"},
    "Unl": {"": "unl", "ascent": "unl-ascent"},
    "Adv": {"": "adv", "central": "adv-central"},
    "Orth": {"": "orth", "cosine": "orth-cosine", "weight": "orth-weight"},
    "Ent": {"": "ent", "uniform": "ent-uniform"},
}
METHODS = {
    name: {"method": found[""], "strength": 0.0 if name == "Erm" else None} for name, found in VARIANTS.items()
}
#: Raised by hand when what a method does changes; part of every key.
VERSIONS = dict.fromkeys((method for variants in VARIANTS.values() for method in variants.values()), 1)
IN_ROUNDS = ("adv", "ent", "ent-uniform")
RULES = ("D", "O")  # by which a strength may be selected (``plan.pick``), on one seed

#: Root mean square of a tensor's numbers above which the auditor clips it, where it adds noise: about that of LoRA's
#: own A as it starts (0.04 for 192 inputs), so that it is public and no image moves it.
CLIP = 0.04
MODIFIERS = {
    **{word: {"method": method} for found in VARIANTS.values() for word, method in found.items() if word},
    "random": {"sensitive": "random"},
    "shuffled": {"sensitive": "shuffled"},
    "disjoint": {"images": "disjoint"},
    "leaks": {"leaks": True, "images": "disjoint"},
    **{rule: {"rule": rule} for rule in RULES},
}


def _amount(text: str) -> float:
    """A finite number of 0 or more."""
    if not 0 <= float(text) < float("inf"):
        raise ValueError
    return float(text)


NUMBERS = {
    "strength": lambda text: {"strength": _amount(text)},
    "gamma": lambda text: {"strength": _amount(text)},
    "noise": lambda text: {"clip": CLIP, "noise": _amount(text)},
}


def check(label: str, asked: plan.Fields) -> None:
    """What of a label does not go together."""
    name, *words = label.split("/")
    sends = name in ("Unl", "Orth")  # an adapter once, which the auditor may make otherwise
    allowed = {"disjoint", *VARIANTS[name], *STUDY.places}
    allowed |= {"random", "shuffled", "leaks", "noise"} if sends else set()
    allowed |= {"gamma" if name == "Unl" else "strength", *RULES} if name != "Erm" else set()
    wrong = [word for word in words if word.partition("=")[0] not in allowed]
    if wrong:
        raise STUDY.unknown(wrong[0], label)
    if asked["method"] == "adv-central" and asked.get("images") == "disjoint":
        raise FairtuningError(f"{label!r}: the central control has label and attribute of the same images")


# ----------------------------------------------------------------------------------------------------------- at a scale
SETTINGS_OF = {"Smiling": "celeba", "Bald": "celeba", "Young": "celeba", "gender": "utkface"}  # have no search


def _tasks(faces: dict, ages: dict) -> dict[str, dict]:
    hair, age = HAIR | faces, AGE | ages
    other = {task: hair | {"label": task, "searched": hair} for task in ("Smiling", "Bald", "Young")}
    other["gender"] = age | {"label": "gender", "attribute": "white", "searched": age}
    return {"celeba": hair, "utkface": age} | other


TENTHS, ONES = (0.1, 0.3, 1.0), (0.1, 1.0, 10.0)
COMPACT = {
    "seeds": 5,
    "seconds": 75.0,  # of one run on one core, before there are records to tell
    "data": _tasks(
        {"size": "80x64", "edition": "resized-64-20000", "epochs": 4},
        {"size": 80, "edition": "resized-112", "epochs": 3},
    ),
    "rates": (0.0003, 0.001, 0.003),
    "strengths": {
        "unl": (0.25, 0.5, 1.0), "unl-ascent": TENTHS, "adv": TENTHS, "adv-central": TENTHS, "ent": TENTHS,
        "ent-uniform": TENTHS, "orth": (1.0, 10.0, 100.0), "orth-cosine": ONES, "orth-weight": ONES,
    },
    "rounds": 20,
    "settings": {"backbone": "vit-tiny", "blocks": 4},
}  # fmt: skip
PROFILES = {
    "compact": COMPACT,
    "paper": COMPACT | {
        "seconds": 1200.0,  # on one GPU, a guess
        "data": _tasks(OFFICIAL | {"epochs": 3}, OFFICIAL | {"epochs": 3}),
        "rates": (0.0003, 0.001),
        "strengths": COMPACT["strengths"] | {"orth": (0.1, 1.0, 10.0, 100.0)},
        "rounds": 50,
        "settings": {"backbone": "vit", "batch_size": 128, "device": "cuda"},
    },
    "classroom": COMPACT | {
        "seconds": 3.0,
        "data": {"parity": {"label": "parity", "attribute": "ground", "size": 8, "epochs": 10}},
        "rates": (0.003,),
        "strengths": COMPACT["strengths"] | {"unl": (0.5, 1.0)}
        | dict.fromkeys(("unl-ascent", "adv", "adv-central", "ent", "ent-uniform"), (0.3, 1.0))
        | dict.fromkeys(("orth-cosine", "orth-weight"), (1.0, 10.0)),
        "rounds": 10,
        "settings": {"backbone": "small", "blocks": 2, "rank": 4, "batch_size": 32, "precision": "float32"},
    },
}  # fmt: skip

# --------------------------------------------------------------------------------------------------------- questions
FIVE = ["Erm", "Unl", "Adv", "Orth", "Ent"]
MAIN = [*FIVE[:4], "Orth/weight", "Ent"]

#: Which runs each group of questions needs. A label without a task is of the profile's first: CelebA's Wavy_Hair, in
#: the classroom digits. A profile leaves out what it does not offer.
LABELS: dict[str, list[str]] = {
    "celeba": MAIN,
    "utkface": [f"{label}/utkface" for label in MAIN],
    "controls": ["Orth/random", "Orth/shuffled", "Orth/weight/shuffled", "Adv/central"],
    "disjoint": ["Erm/disjoint", "Orth/disjoint"],
    "leaks": ["Erm/disjoint", "Orth/leaks", *(f"Orth/leaks/noise={noise}" for noise in ("0", "1", "4", "16"))],
    "tasks": [f"{label}/{task}" for task in SETTINGS_OF for label in FIVE[:4]],
    "variants": ["Orth/cosine", "Unl/ascent", "Ent/uniform"],
    "oracle": [f"{label}/O" for label in MAIN if label != "Erm"],
}


# -------------------------------------------------------------------------------------------------------------- choices
def select(run: Run, asked: plan.Fields, profile: plan.Fields, choose: Callable) -> Run:
    """(1) the rate of Erm by R1, which all methods then have; (2) at that rate the strength, by the label's rule (D
    against Erm). Controls, disjoint images, noise and the tasks of SETTINGS_OF have the settings of what they belong
    to."""
    run = replace(run, rounds=profile["rounds"] if run.method in IN_ROUNDS else 1)
    searched = replace(run, images="same", sensitive="trained", clip=0.0, noise=0.0, leaks=False)
    if "searched" in profile:
        pair = {name: profile["searched"][name] for name in ("label", "attribute")}
        searched = replace(searched, **pair)
    plain = replace(searched, method="erm", strength=0.0, rounds=1)
    plain = choose([replace(plain, learning_rate=rate) for rate in profile["rates"]])
    run, searched = (replace(one, learning_rate=plain.learning_rate) for one in (run, searched))
    if run.strength is None:
        strengths = [replace(searched, strength=strength) for strength in profile["strengths"][run.method]]
        run = replace(run, strength=choose([plain, *strengths], asked.get("rule", "D")).strength)
    return replace(run, evaluate="test")


def judge(record: plan.Record, profile: plan.Fields) -> plan.Fields:
    """The oracle's gap is the paper's two, on validation images."""
    return plan.accuracy(record) | {"gap": sum(record.get("oracle", {}).values())}


def units(runs: Sequence[Run]) -> list[list[Run]]:
    """Each run by itself, those of one seed together in order: a process trains a seed's sensitive adapter once."""
    return [[run] for run in sorted(runs, key=lambda run: run.seed)]


STUDY = plan.Study(
    name=NAME,
    run=Run,
    methods=METHODS,
    modifiers=MODIFIERS,
    numbers=NUMBERS,
    check=check,
    labels=LABELS,
    profiles=PROFILES,
    select=select,
    judge=judge,
    version=lambda run: VERSIONS[run.method] + (SMALL if run.backbone == "small" else 0),
)
selected, offered, resolve, configuration = STUDY.selected, STUDY.offered, STUDY.resolve, STUDY.restore
