"""What a run of P3 is, how a label such as ``Orth/weight`` names one, and which runs each group of questions needs.

The paper's settings could not be had (only its abstract, summaries and five captions): all of these are our reading.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from fairtuning import FairtuningError
from fairtuning.runs import Record, key_of
from fairtuning.studies import planning
from fairtuning.studies.sukumaran2024.configuration import SMALL, digest

NAME = "kamalaruban2025"


@dataclass(frozen=True)
class Run:
    """One training by developer and auditor, fully resolved; its key hashes this, the data and the method's version."""

    data: str = "celeba"
    label: str = "Wavy_Hair"
    attribute: str = "Male"
    size: int | str = "80x64"  # of the images, a side or "height x width"
    edition: str = ""
    backbone: str = "vit-tiny"  # a timm name or a key of backbones.BACKBONES; "small": that of the classroom
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
    learning_rate: float = 0.0  # of AdamW; 0: to be selected
    schedule: str = "cosine"
    keep: str = "last"  # epoch
    batch_size: int = 64
    epochs: int = 4
    rounds: int = 1  # turns of the developer, in Adv and Ent
    weight_decay: float = 0.01
    seed: int = 0  # initialisation of adapters and heads
    order_seed: int = 0  # order of the data
    evaluate: str = "test"  # validation for the runs of a search: they never read the test set
    precision: str = "bfloat16"  # of autocast; the weights that are trained are float32
    threads: int = 1
    device: str = "cpu"


# ------------------------------------------------------------------------------------------------------------- labels
#: Methods, and their variants by a modifier: which of collaboration.parties.METHODS each is.
METHODS = {
    "Erm": {"": "erm"},
    "Unl": {"": "unl", "ascent": "unl-ascent"},
    "Adv": {"": "adv", "central": "adv-central"},
    "Orth": {"": "orth", "cosine": "orth-cosine", "weight": "orth-weight"},
    "Ent": {"": "ent", "uniform": "ent-uniform"},
}
#: Raised by hand when what a method does changes; part of every key.
VERSIONS = dict.fromkeys((method for variants in METHODS.values() for method in variants.values()), 1)
IN_ROUNDS = ("adv", "ent", "ent-uniform")

#: Root mean square of a tensor's numbers above which the auditor clips it, where it adds noise: about that of LoRA's
#: own A as it starts (0.04 for 192 inputs), so that it is public and no image moves it.
CLIP = 0.04

#: One seed tells the settings of a search apart, for they lie a factor of two or more apart.
SEARCH_SEEDS = 1
#: D: the strongest setting within a point of Erm's validation accuracy, which a developer can know. O: of those the one
#: with the smallest gaps on validation images, which takes the attribute: an oracle.
RULES = ("D", "O")
MARGIN = 0.01
#: Tasks that take the settings selected on another task of the same images.
SETTINGS_OF = {"Smiling": "celeba", "Bald": "celeba", "Young": "celeba", "gender": "utkface"}


def _celeba(label: str, **rest: object) -> dict[str, object]:
    return {"data": "celeba", "label": label, "attribute": "Male", **rest}


def _tasks(celeba: dict[str, object], utkface: dict[str, object]) -> dict[str, dict[str, object]]:
    return {
        "celeba": _celeba("Wavy_Hair", **celeba),
        "utkface": {"data": "utkface", "label": "age>=median", "attribute": "gender", **utkface},
        "Smiling": _celeba("Smiling", **celeba),
        "Bald": _celeba("Bald", **celeba),
        "Young": _celeba("Young", **celeba),
        "gender": {"data": "utkface", "label": "gender", "attribute": "white", **utkface},
    }


PROFILES = {
    "compact": {
        "seeds": 5,
        "seconds": 75.0,  # of one run on one core, before there are records to tell
        "data": _tasks(
            {"size": "80x64", "edition": "resized-64-20000", "epochs": 4},
            {"size": 80, "edition": "resized-112", "epochs": 3},
        ),
        "rates": (0.0003, 0.001, 0.003),
        "strengths": {
            "unl": (0.25, 0.5, 1.0),
            "unl-ascent": (0.1, 0.3, 1.0),
            "adv": (0.1, 0.3, 1.0),
            "adv-central": (0.1, 0.3, 1.0),
            "orth": (1.0, 10.0, 100.0),
            "orth-cosine": (0.1, 1.0, 10.0),
            "orth-weight": (0.1, 1.0, 10.0),
            "ent": (0.1, 0.3, 1.0),
            "ent-uniform": (0.1, 0.3, 1.0),
        },
        "rounds": 20,
        "settings": {"backbone": "vit-tiny", "blocks": 4},
    },
    "paper": {
        "seeds": 5,
        "seconds": 1200.0,  # on one GPU, a guess
        "data": _tasks(
            {"size": 224, "edition": "official", "epochs": 3}, {"size": 224, "edition": "official", "epochs": 3}
        ),
        "rates": (0.0003, 0.001),
        "strengths": {
            "unl": (0.25, 0.5, 1.0),
            "unl-ascent": (0.1, 0.3, 1.0),
            "adv": (0.1, 0.3, 1.0),
            "adv-central": (0.1, 0.3, 1.0),
            "orth": (0.1, 1.0, 10.0, 100.0),
            "orth-cosine": (0.1, 1.0, 10.0),
            "orth-weight": (0.1, 1.0, 10.0),
            "ent": (0.1, 0.3, 1.0),
            "ent-uniform": (0.1, 0.3, 1.0),
        },
        "rounds": 50,
        "settings": {"backbone": "vit", "batch_size": 128, "device": "cuda"},
    },
    "classroom": {
        "seeds": 5,
        "seconds": 3.0,
        "data": {"parity": {"data": "parity", "label": "parity", "attribute": "ground", "size": 8, "epochs": 10}},
        "rates": (0.003,),
        "strengths": {
            "unl": (0.5, 1.0),
            "unl-ascent": (0.3, 1.0),
            "adv": (0.3, 1.0),
            "adv-central": (0.3, 1.0),
            "orth": (1.0, 10.0, 100.0),
            "orth-cosine": (1.0, 10.0),
            "orth-weight": (1.0, 10.0),
            "ent": (0.3, 1.0),
            "ent-uniform": (0.3, 1.0),
        },
        "rounds": 10,
        "settings": {"backbone": "small", "blocks": 2, "rank": 4, "batch_size": 32, "precision": "float32"},
    },
}

ALLOWED = (
    "a variant (Unl: ascent; Adv: central; Orth: cosine, weight; Ent: uniform), strength=X (Unl: gamma=X), D or O, "
    "random or shuffled (Unl, Orth), noise=X (Unl, Orth: clipped, and X times as much noise), disjoint, "
    "leaks (Unl, Orth: disjoint, and what leaks is measured), a task of the profile"
)


@dataclass(frozen=True)
class Named:
    """What a label says: ``run`` before anything is selected, and what it leaves to the profile as None."""

    run: Run
    rule: str = "D"
    task: str | None = None


@cache
def resolve(label: str) -> Named:
    """``Erm``, ``Unl``, ``Adv``, ``Orth`` or ``Ent``, then modifiers: ``/weight`` (variant), ``/gamma=0.5`` or
    ``/strength=1``, ``/O`` (rule of selection), ``/shuffled`` (the auditor's labels), ``/disjoint`` (images),
    ``/leaks`` (measured as well), ``/noise=1`` (on the adapter that is sent), ``/Smiling`` (task)."""
    name, *modifiers = label.split("/")
    if name not in METHODS:
        raise FairtuningError(f"unknown run label {label!r}; allowed: {', '.join(METHODS)}, then /{ALLOWED}")
    named = Named(Run(method=METHODS[name][""], strength=0.0 if name == "Erm" else None))
    for modifier in modifiers:
        named = _modify(named, name, modifier, label)
    if named.run.method == "adv-central" and named.run.images == "disjoint":
        raise FairtuningError(f"{label!r}: the central control has label and attribute of the same images")
    return named


def _modify(named: Named, method: str, modifier: str, label: str) -> Named:
    name, _, value = modifier.partition("=")
    if modifier and modifier in METHODS[method]:
        return replace(named, run=replace(named.run, method=METHODS[method][modifier]))
    if name == ("gamma" if method == "Unl" else "strength") and method != "Erm" and _amount(value) is not None:
        return replace(named, run=replace(named.run, strength=_amount(value)))
    if method in ("Unl", "Orth"):
        if modifier in ("random", "shuffled"):
            return replace(named, run=replace(named.run, sensitive=modifier))
        if name == "noise" and _amount(value) is not None:
            return replace(named, run=replace(named.run, clip=CLIP, noise=_amount(value)))
        if modifier == "leaks":
            return replace(named, run=replace(named.run, leaks=True, images="disjoint"))
    if modifier == "disjoint":
        return replace(named, run=replace(named.run, images="disjoint"))
    if modifier in RULES and method != "Erm":
        return replace(named, rule=modifier)
    if any(modifier in profile["data"] for profile in PROFILES.values()):
        return replace(named, task=modifier)
    raise FairtuningError(f"unknown modifier {modifier!r} in {label!r}; allowed: {ALLOWED}")


def _amount(text: str) -> float | None:
    """A finite number of 0 or more, else None."""
    try:
        return float(text) if 0 <= float(text) < float("inf") else None
    except ValueError:
        return None


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


def task_of(label: str, profile_name: str) -> str:
    return resolve(label).task or next(iter(PROFILES[profile_name]["data"]))


def offered(label: str, profile_name: str) -> bool:
    """Whether a profile has the task that a label names."""
    return task_of(label, profile_name) in PROFILES[profile_name]["data"]


# --------------------------------------------------------------------------------------------- search and selection
Lookup = Callable[[Run], Record | None]


def best_rate(candidates: Sequence[Run], lookup: Lookup) -> Run | None:
    """The candidate with the highest validation accuracy; the first of equals. None if runs miss."""
    found = _accuracies(candidates, lookup)
    return candidates[found.index(max(found))] if found else None


def strongest(plain: Run, candidates: Sequence[Run], lookup: Lookup, *, rule: str = "D") -> Run | None:
    """The candidate (in order of strength) that a rule of RULES selects against ``plain``, which is Erm.

    Where none stays within the margin the weakest is taken. None if runs miss.
    """
    found = _accuracies([plain, *candidates], lookup)
    if found is None:
        return None
    near = [run for run, value in zip(candidates, found[1:], strict=True) if value >= found[0] - MARGIN - 1e-9]
    if not near:
        return candidates[0]
    return near[-1] if rule == "D" else min(near, key=lambda run: _oracle_gap(run, lookup))


def _accuracies(candidates: Sequence[Run], lookup: Lookup) -> list[float] | None:
    found = [[lookup(seeded(run, seed)) for seed in range(SEARCH_SEEDS)] for run in candidates]
    if any(record is None for records in found for record in records):
        return None
    return [sum(record["accuracy"]["validation"] for record in records) / SEARCH_SEEDS for records in found]


def _oracle_gap(run: Run, lookup: Lookup) -> float:
    """Demographic parity difference plus false positive rate difference on validation images, the paper's two."""
    return sum(sum(lookup(seeded(run, seed))["oracle"].values()) for seed in range(SEARCH_SEEDS))


def seeded(run: Run, seed: int) -> Run:
    return replace(run, seed=seed, order_seed=seed)


def selected(label: str, profile_name: str, lookup: Lookup) -> tuple[Run, list[list[Run]]]:
    """The run that ``label`` names with every setting selected, and the searches (lists of candidates) behind it.

    Where a search is unfinished its first candidate stands in, so that the number of runs can be told beforehand.
    (1) the learning rate of Erm by validation accuracy, which all methods then have; (2) at that rate the strength, by
    the label's rule. Controls, disjoint images, noise and the tasks of SETTINGS_OF have the settings of what they
    belong to.
    """
    named, profile = resolve(label), PROFILES[profile_name]
    if not offered(label, profile_name):
        raise FairtuningError(f"{label!r} is not offered in profile {profile_name}")
    task, method = task_of(label, profile_name), named.run.method
    run = replace(
        named.run,
        evaluate="validation",
        rounds=profile["rounds"] if method in IN_ROUNDS else 1,
        **profile["data"][task],
        **profile["settings"],
    )
    searched = profile["data"][SETTINGS_OF.get(task, task)]
    searched = replace(run, images="same", sensitive="trained", clip=0.0, noise=0.0, leaks=False, **searched)
    plain = replace(searched, method="erm", strength=0.0, rounds=1)
    searches = []

    def search(candidates: list[Run], choose: Callable[[list[Run]], Run | None]) -> Run:
        searches.append(candidates)
        return choose(candidates) or candidates[-1]

    rates = [replace(plain, learning_rate=rate) for rate in profile["rates"]]
    plain = search(rates, lambda found: best_rate(found, lookup)) if len(rates) > 1 else rates[0]
    run, searched = (replace(one, learning_rate=plain.learning_rate) for one in (run, searched))
    if run.strength is None:
        strengths = [replace(searched, strength=strength) for strength in profile["strengths"][method]]
        chosen = search([plain, *strengths], lambda found: strongest(found[0], found[1:], lookup, rule=named.rule))
        run = replace(run, strength=chosen.strength)
    return replace(run, evaluate="test"), searches


def plan(profile_name: str, labels: Iterable[str], seeds: int, lookup: Lookup) -> Generator[list[Run], None, None]:
    """Phases of runs: each search before what it selects for, then the selected runs. Compute one, ask for the next.

    Labels that the profile does not offer are left out.
    """
    planning.check(PROFILES, profile_name, seeds)
    yield from planning.phases(
        [label for label in labels if offered(label, profile_name)],
        lambda label: selected(label, profile_name, lookup),
        seeded=seeded,
        search_seeds=SEARCH_SEEDS,
        seeds=lambda label: seeds,
    )


def task_key(run: Run) -> str:
    """What tells the label and attribute of a run from others of the same images."""
    return f"{run.label}-{run.attribute}"


def version_of(run: Run) -> int:
    return VERSIONS[run.method] + (SMALL if run.backbone == "small" else 0)


def key_with(run: Run, digest: str) -> str:
    return key_of(run, digest=digest, version=version_of(run))


@cache
def key(run: Run) -> str:
    return key_with(run, digest(run.data, run.size, run.edition))


def units(runs: Sequence[Run]) -> list[list[Run]]:
    """Each run by itself, those of one seed together in order: a process trains a seed's sensitive adapter once."""
    return [[run] for run in sorted(runs, key=lambda run: run.seed)]


def configuration(record: Record) -> Run:
    """The run that a record is of."""
    return Run(**record["configuration"])
