"""What a run of P1 is, how a label such as ``OURS/sgd`` names one, and which runs each table and figure needs."""

import math
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby, product

from fairtuning import FairtuningError
from fairtuning.datasets import DataError
from fairtuning.runs import Record, key_of
from fairtuning.studies import planning
from fairtuning.vision.features import STAGES

NAME = "zhang2024"
SECONDS = 0.2  # of one run on one core, roughly: what `run --dry-run` says before there are records


@dataclass(frozen=True)
class Pretraining:
    """How the network that is fine-tuned came about (the paper is silent on optimiser, rate, batch and epochs)."""

    hidden: tuple[int, ...] = (20, 20)  # 13 -> 20 -> 20 -> 2: the paper's 742 parameters; (): a head alone, a probe
    penalty: str = "none"  # none, equalized_odds or demographic_parity
    intensity: float = 0.0  # 0 with a penalty: to be selected, so that the network is fair
    form: str = "convex"  # (1 - intensity) CE + intensity penalty, our reading; "additive": CE + intensity penalty
    learning_rate: float = 0.0  # 0: to be selected
    batch_size: int = 0
    epochs: int = 0


@dataclass(frozen=True)
class Run:
    """One training, fully resolved; its key is a hash of this, of the data's digest and of the method's version."""

    data: str = "adult"
    encoding: str = "integer"
    size: str = ""  # of images, a side or "height x width"; likewise the next four
    edition: str = ""
    label: str = ""  # what the head predicts; "all": every attribute at once
    attribute: str = ""  # whose values are the groups
    backbone: str = ""  # whose frozen features the head sees, in timm's words (or features.STAGES)
    weights: str = "pretrained"  # of the backbone
    split_seed: int = 0
    pretraining: Pretraining = Pretraining()
    method: str = "head"  # pre-trained (nothing more), head (TL), factored head, network (Retrain)
    weighting: str = "none"  # of the factored head's rows: none (f+SVD), neutralised (OURS) or a control
    alpha: float = 0.5  # weight of group 0 (female) in the neutralised importance; 1 - alpha is group 1's
    fisher: str = "empirical"
    heads: str = "shared"  # whose gradients: the one pre-trained head's; "by group": those of a head per group
    rank: int = 2
    penalty: str = "none"
    intensity: float = 0.0
    form: str = "convex"  # as in Pretraining
    optimiser: str = "adam"  # adam, sgd (momentum 0.9), lbfgs (full batch, to convergence)
    learning_rate: float = 0.0  # 0: to be selected (nothing to select where the method has no such setting)
    batch_size: int = 0  # 0: that of pre-training, likewise epochs
    epochs: int = 0
    seed: int = 0  # initialisation
    order_seed: int = 0  # order of the data
    evaluate: str = "test"  # validation for the runs of a search: they never read the test set
    keep: str = "predictions"  # or "fisher", "representations": what Figs 3 and 1 are drawn from
    precision: str = "float64"
    threads: int = 1
    device: str = "cpu"


#: Raised by hand when what a method does changes; part of every key.
VERSIONS = {"pre-trained": 1, "head": 1, "factored head": 1, "network": 1}

#: Optimiser and rate of every search; the same four settings for every method that is compared.
RATES = {"adam": (0.0003, 0.001, 0.003, 0.01), "sgd": (0.001, 0.003, 0.01, 0.03)}
SEARCH_SEEDS = 5

#: Fair pre-training: of the settings in FAIR (additive penalty, batches in which a gap is more than noise) that lose at
#: most COST of validation accuracy against the network without penalty, the most accurate one whose own gap on the
#: validation data is at most FAIR_ENOUGH; where there is none, the one with the smallest gap. (Where all of them lose
#: more, all are candidates.)
FAIR = [
    {"intensity": intensity, "learning_rate": rate, "batch_size": 2048, "epochs": 100}
    for intensity, rate in product((0.25, 0.5, 1.0, 2.0, 4.0), (0.003, 0.01))
]
FAIR_ENOUGH, COST = 0.02, 0.04

#: Tasks on images: what the head predicts from frozen features, and the groups. The first two are the paper's.
IMAGES = {
    "celeba": {"data": "celeba", "label": "Wavy_Hair", "attribute": "Male"},
    "lfw": {"data": "lfw", "label": "gender", "attribute": "Heavy_Makeup"},
    "40 attributes": {"data": "celeba", "label": "all", "attribute": "Male"},
}
#: Modifiers that name a backbone: those with weights of the compact profile, then the paper's.
BACKBONES = {
    "vit-tiny": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "mobilenetv2": "mobilenetv2_100.onnxzoo_in1k",
    "resnet18 stages 1-3": STAGES,
    "resnet18": "resnet18.tv_in1k",
    "resnet50": "resnet50.tv_in1k",
    "densenet121": "densenet121.tv_in1k",
}


def _images(backbones: Sequence[str], celeba: dict, lfw: dict) -> dict[str, dict]:
    """The tasks on images of a profile. The probe's and the heads' settings are searched (the paper is silent)."""
    heads = {
        "backbones": backbones,
        "pretraining": [{"learning_rate": rate, "batch_size": 512, "epochs": 10} for rate in RATES["adam"]],
        "rates": RATES,
    }
    return {name: {"place": lfw if name == "lfw" else celeba} | heads for name in IMAGES}


#: "data": its data sets, each with what it has of its own. The first is the one of labels that name none.
PROFILES = {
    "paper": {
        "data": {"adult": {}}
        | _images(
            ("resnet18", "resnet50", "densenet121"),
            {"size": "224", "edition": "official"},
            {"size": "224", "edition": "official"},
        ),
        "seeds": 10,
        "pretraining": [
            {"learning_rate": rate, "batch_size": batch, "epochs": epochs}
            for rate, batch, epochs in product(RATES["adam"], (128, 512), (10, 30))
        ],
        "rates": RATES,
        "fair": FAIR,
    },
    "classroom": {
        "data": {"census": {}},
        "seeds": 5,
        "pretraining": [{"learning_rate": 0.003, "batch_size": 128, "epochs": 10}],
        "rates": {"adam": (0.003,), "sgd": (0.01,)},
        "fair": [{"intensity": 0.5, "learning_rate": 0.01, "batch_size": 512, "epochs": 10}],
    },
}
# Adult needs no reduced size; compact is the paper's data with one setting each, and images at reduced size.
PROFILES["compact"] = PROFILES["paper"] | {
    "data": {"adult": {}}
    | _images(
        ("vit-tiny", "mobilenetv2", "resnet18 stages 1-3"),
        {"size": "80x64", "edition": "resized-64-20000"},
        {"size": "80", "edition": "resized-80-boolean"},
    ),
    "pretraining": [{"learning_rate": 0.003, "batch_size": 128, "epochs": 30}],
    "rates": {"adam": (0.003,), "sgd": (0.01,)},
}

# Ten divisions of the same people into the four parts, three seeds each: what the first division's luck decides shows.
PROFILES["splits"] = PROFILES["paper"] | {"data": {"adult": {}}, "seeds": 3, "splits": range(10)}

# ------------------------------------------------------------------------------------------------------------- labels
CRITERIA = {"EO": "equalized_odds", "DP": "demographic_parity"}
INTENSITIES = (0.1, 0.5, 0.9)
METHODS = {
    "pre-trained": {"method": "pre-trained"},
    "TL": {"method": "head"},
    "f+SVD": {"method": "factored head", "weighting": "none"},
    "OURS": {"method": "factored head", "weighting": "neutralised"},
    "average first": {"method": "factored head", "weighting": "average_first"},
    "normalised": {"method": "factored head", "weighting": "normalised"},
    "female only": {"method": "factored head", "weighting": "group_0"},
    "male only": {"method": "factored head", "weighting": "group_1"},
    "first group only": {"method": "factored head", "weighting": "group_0"},
    "second group only": {"method": "factored head", "weighting": "group_1"},
    "pooled": {"method": "factored head", "weighting": "pooled"},
    "random": {"method": "factored head", "weighting": "random"},
    "Retrain": {"method": "network"},
}
MODIFIERS = {
    "sgd": {"optimiser": "sgd"},
    "converged": {"optimiser": "lbfgs"},
    "true Fisher": {"fisher": "true"},
    "own heads": {"heads": "by group"},
    "one-hot": {"encoding": "one-hot"},
    "fisher": {"keep": "fisher"},
    "representations": {"keep": "representations"},
    "additive": {"form": "additive"},
}
PATTERN = re.compile(
    rf"(?P<method>{'|'.join(re.escape(name) for name in METHODS)})"
    r"(?:(?P<how> after |\+| )(?P<criterion>EO|DP) (?P<intensity>\d+(?:\.\d+)?|fair))?(?P<modifiers>(?:/[^/]+)*)"
)


@cache
def resolve(label: str) -> Run:
    """The run that a label names, before its learning rate is selected and its seed and data are set.

    ``METHOD``, then ``+EO 0.5`` (penalty during fine-tuning) or `` after DP 0.1`` (during pre-training; ``pre-trained
    DP 0.1`` for that network itself; ``after DP fair``: as strong as it takes), then modifiers: ``/sgd``, ``/r=1``,
    ``/alpha=0.7``, ``/MLP-4``, ``/epochs=10``;
    ``/celeba``, ``/lfw`` or ``/40 attributes`` for images, and ``/resnet50`` for the backbone that makes features of
    them; ``pre-trained`` is then the linear probe that the others start from.
    """
    match = PATTERN.fullmatch(label)
    if match is None:
        raise FairtuningError(
            f"unknown run label {label!r}; allowed: one of {', '.join(METHODS)}, then e.g. '+EO 0.5', ' after DP 0.1', "
            "'/sgd', '/r=1', '/alpha=0.7', '/MLP-4'"
        )
    run = Run(**METHODS[match["method"]])
    if match["intensity"] == "fair":
        if match["how"] == "+":
            raise FairtuningError(f"{label!r}: 'fair' is a strength of pre-training: allowed after ' after '")
        chosen = {"penalty": CRITERIA[match["criterion"]], "form": "additive"}
        run = replace(run, pretraining=replace(run.pretraining, **chosen))
    elif match["criterion"]:
        penalty = {"penalty": CRITERIA[match["criterion"]], "intensity": float(match["intensity"])}
        if not 0 < penalty["intensity"] < 1:
            raise FairtuningError(f"intensity is {match['intensity']} in {label!r}; allowed: above 0, below 1")
        if match["how"] == "+":
            run = replace(run, **penalty)
        else:
            run = replace(run, pretraining=replace(run.pretraining, **penalty))
    for modifier in match["modifiers"].split("/")[1:]:
        run = _modify(run, modifier)
    outputs = 40 if run.label == "all" else 2
    if not 1 <= run.rank <= outputs:
        raise FairtuningError(f"rank is {run.rank} in {label!r}; a head with {outputs} outputs allows 1 to {outputs}")
    if run.label and (run.pretraining.hidden or run.encoding != Run.encoding or run.keep != Run.keep):
        raise FairtuningError(f"{label!r}: images have no hidden layers, encoding, stored Fisher or representations")
    if run.label == "all" and (run.penalty != "none" or run.pretraining.penalty != "none" or run.heads != "shared"):
        raise FairtuningError(f"{label!r}: a head of 40 attributes has no penalty and no own heads")
    if run.backbone and not run.label:
        raise FairtuningError(f"{label!r} names a backbone; only images ({', '.join(IMAGES)}) have one")
    return run


def _modify(run: Run, modifier: str) -> Run:
    if modifier == "additive":  # of whichever penalty the label has
        form = MODIFIERS["additive"]
        if run.penalty != "none":
            return replace(run, **form)
        return replace(run, pretraining=replace(run.pretraining, **form))
    if modifier in MODIFIERS:
        return replace(run, **MODIFIERS[modifier])
    if modifier in IMAGES:
        return replace(run, **IMAGES[modifier], pretraining=replace(run.pretraining, hidden=()))
    if modifier in BACKBONES:
        return replace(run, backbone=modifier)
    name, _, value = modifier.partition("=")
    try:
        if name == "alpha" and 0 <= float(value) <= 1:
            return replace(run, alpha=float(value))
        if name == "r":
            return replace(run, rank=int(value))
        if name in ("epochs", "batch_size") and int(value) >= 1:
            return replace(run, **{name: int(value)})
        if modifier.startswith("MLP-") and 1 <= int(modifier[4:]) <= 9:
            return replace(run, pretraining=replace(run.pretraining, hidden=(20,) * int(modifier[4:])))
    except ValueError:
        pass
    raise FairtuningError(
        f"unknown modifier {modifier!r}; allowed: {', '.join([*MODIFIERS, *IMAGES, *BACKBONES])}, r=N, alpha=0..1, "
        "epochs=N, batch_size=N, MLP-N"
    )


ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9)
PENALISED = [f"{criterion} {intensity}" for criterion in CRITERIA for intensity in INTENSITIES]
CONTROLS = [
    "average first",
    "normalised",
    "female only",
    "male only",
    "pooled",
    "random",
    "OURS/true Fisher",
    "OURS/own heads",
]
SENSITIVITY = [f"{m}/epochs={e}/batch_size={b}" for m in ("TL", "f+SVD", "OURS") for e in (5, 30) for b in (64, 512)]


def alpha_label(alpha: float, orientation: str = "female") -> str:
    """The run whose named group has weight alpha (the paper names both groups as S = 1, in different places)."""
    weight = alpha if orientation == "female" else 1 - alpha
    return "OURS" if weight == 0.5 else f"OURS/alpha={weight:.4g}"


#: With 40 outputs truncation leaves something out, so that weights can matter.
RANKS = (1, 2, 4, 8, 16)
WEIGHTINGS = ("f+SVD", "pooled", "OURS")
IMAGE_CONTROLS = ("first group only", "second group only", "pooled", "random")
IMAGE_FACTORS = ("f+SVD/sgd", "OURS/sgd", "f+SVD/r=1", "OURS/r=1")

#: Which runs each table and figure needs, by its slug in published/zhang2024.yaml; on images with the data's name.
LABELS: dict[str, list[str]] = {
    "table1": ["pre-trained"],
    "table2": [f"{m} {p}" for p in PENALISED for m in ("pre-trained", "TL after", "OURS after")],
    "table3": ["pre-trained", "Retrain", "OURS", *(f"Retrain+{p}" for p in PENALISED)],
    "table4": [
        f"{m}/MLP-{depth}" for depth in (3, 4, 5) for m in ("pre-trained", "TL", "f+SVD", "OURS")
    ] + ["OURS"],
    "figure1": ["TL/representations", "TL after DP 0.9/representations"],
    "figure2": [],
    "figure3": ["pre-trained/fisher", "pre-trained/fisher/true Fisher"],
    "figure4": ["pre-trained", "TL", "f+SVD", "OURS"],
    "figure5": sorted({alpha_label(a, o) for a in ALPHAS for o in ("female", "male")}),
    "parameters": ["pre-trained", "TL", "OURS", "Retrain"],
    "additive": [
        f"{label}/additive"
        for p in PENALISED
        for label in (f"pre-trained {p}", f"TL after {p}", f"OURS after {p}", f"Retrain+{p}")
    ],
    "fair": [f"{m} {criterion} fair" for criterion in CRITERIA for m in ("pre-trained", "TL after", "OURS after")],
    "controls": ["TL", "f+SVD", "OURS", *CONTROLS],
    "factors": [
        f"{m}{modifier}" for modifier in ("/sgd", "/r=1", "/sgd/r=1", "/converged") for m in ("TL", "f+SVD", "OURS")
        if not (m == "TL" and "r=1" in modifier)
    ] + ["random/sgd", "random/r=1", "pooled/r=1", "random/sgd/r=1", "TL/one-hot", "f+SVD/one-hot", "OURS/one-hot"],
    "sensitivity": SENSITIVITY,
}  # fmt: skip
for _data in ("celeba", "lfw"):
    LABELS[f"figure4-{_data}"] = [f"{m}/{_data}" for m in LABELS["figure4"]]
    LABELS[f"table4-{_data}"] = [f"{m}/{_data}/{b}" for b in list(BACKBONES)[1:] for m in ("TL", "OURS")]
    LABELS[f"controls-{_data}"] = [f"{m}/{_data}" for m in (*IMAGE_CONTROLS, *IMAGE_FACTORS)]
LABELS["attributes"] = [
    *(f"{m}/40 attributes" for m in ("pre-trained", "TL")),
    *(f"{m}/40 attributes/r={rank}" for rank in RANKS for m in WEIGHTINGS),
]


# --------------------------------------------------------------------------------------------- search and selection
Lookup = Callable[[Run], Record | None]


def place_of(run: Run) -> str | None:
    """The key of a run's data among a profile's; None for the profile's first."""
    return next((name for name, task in IMAGES.items() if run.label and task["label"] == run.label), None)


def task_of(run: Run) -> str:
    """What tells label and group of a run from others of the same images; "" where the data has one pair."""
    return f"{run.label}-{run.attribute}" if run.label else ""


def where(run: Run) -> tuple:
    """All that says which inputs, labels, groups and splits a run sees, and as what numbers."""
    return (
        run.data, run.encoding, run.size, run.edition, run.label, run.attribute, run.backbone, run.weights,
        run.split_seed, run.precision, run.device,
    )  # fmt: skip


def offered(label: str, profile_name: str) -> bool:
    """Whether a profile has the data set and the backbone that a label names."""
    run, data = resolve(label), PROFILES[profile_name]["data"]
    place = place_of(run)
    return place is None or (place in data and run.backbone in ("", *data[place]["backbones"]))


def splits(profile_name: str, split_seed: int | None = None) -> Sequence[int]:
    """The seeds of the divisions into parts: the one asked for, or the profile's (0 alone where it says nothing)."""
    if split_seed is None:
        return PROFILES[profile_name].get("splits", (0,))
    if not 0 <= split_seed < 2**31:
        raise FairtuningError(f"split_seed is {split_seed}; allowed: 0 to {2**31 - 1}")
    return (split_seed,)


def _settings(run: Run, profile: dict, split_seed: int = 0) -> dict:
    """A profile with what the run's data set has of its own, and the run's fields that say where its data is."""
    name = place_of(run)
    split = {} if run.data == "celeba" else {"split_seed": split_seed}  # which has an official one
    if name is None:
        return profile | {"place": {"data": next(iter(profile["data"]))} | split}
    own = profile["data"][name]
    place = own["place"] | split | {"backbone": BACKBONES[run.backbone or own["backbones"][0]]}
    return profile | own | {"place": place}


def _rated(run: Run, profile: dict) -> tuple[float, ...]:
    """Learning rates to choose from; a converged or untrained head has none."""
    return () if run.method == "pre-trained" else profile["rates"].get(run.optimiser, ())


def _searched(run: Run, profile: dict) -> Run:
    """What a search varies nothing of: method, weighting and penalties stay, alpha shares the setting of 1/2."""
    return replace(run, **profile["place"], alpha=0.5, keep="predictions", evaluate="validation")


def _best(candidates: Sequence[Run], lookup: Lookup, seeds: int) -> Run | None:
    """Rule R1: the highest validation accuracy, averaged over seeds; the first of equals. None if runs are missing."""
    scores = []
    for candidate in candidates:
        records = [lookup(seeded(candidate, seed)) for seed in range(seeds)]
        if any(record is None for record in records):
            return None
        scores.append(sum(record["accuracy"]["validation"] for record in records) / seeds)
    return candidates[scores.index(max(scores))]


def _fairest(candidates: Sequence[Run], plain: Run, lookup: Lookup, seeds: int) -> Run | None:
    """The rule of FAIR: None if runs are missing."""

    def mean(run: Run, value: Callable[[Record], float]) -> float:
        records = [lookup(seeded(run, seed)) for seed in range(seeds)]
        return sum(value(record) for record in records) / seeds if all(records) else math.nan

    accuracies, gaps = (
        [mean(run, value) for run in candidates]
        for value in (lambda record: record["accuracy"]["validation"], lambda record: record["gap"]["validation"])
    )
    least = mean(plain, lambda record: record["accuracy"]["validation"]) - COST
    if math.isnan(sum(accuracies) + least):
        return None
    close = [index for index, accuracy in enumerate(accuracies) if accuracy >= least] or list(range(len(candidates)))
    fair = [index for index in close if gaps[index] <= FAIR_ENOUGH]
    best = max(fair, key=accuracies.__getitem__) if fair else min(close, key=gaps.__getitem__)
    return candidates[best]


def seeded(run: Run, seed: int) -> Run:
    return replace(run, seed=seed, order_seed=seed)


def _plain_pretraining(run: Run, profile: dict) -> Run:
    """The network on which batch and epochs are selected: the same depth and encoding, no penalty."""
    plain = Run(method="pre-trained", encoding=run.encoding)
    if run.label:
        task = {"data": run.data, "label": run.label, "attribute": run.attribute}
        plain = replace(plain, **task, pretraining=Pretraining(hidden=()))
    return _searched(plain, profile)


def selected(
    label: str, profile_name: str, lookup: Lookup, seeds: int, split_seed: int = 0
) -> tuple[Run, list[list[Run]]]:
    """The run that ``label`` names with every setting selected, and the searches (lists of candidates) behind it.

    Settings are selected within the split, those of fair pre-training by the rule of FAIR. Where a search is unfinished
    its first candidate stands in, so that the number of runs can be told beforehand.
    (1) batch, epochs and rate of plain pre-training from the profile's grid; (2) with that batch and these epochs, the
    rate of the label's own pre-training where it differs (penalty, depth); (3) the rate of fine-tuning. Always rule R1.
    With 40 attributes (3) is one search for all.
    """
    if not offered(label, profile_name):
        raise FairtuningError(f"{label!r} is not offered in profile {profile_name}")
    profile = _settings(resolve(label), PROFILES[profile_name], split_seed)
    seeds = min(seeds, SEARCH_SEEDS)
    run = _searched(resolve(label), profile)
    searches = []

    def choose(candidates: list[Run]) -> Run:
        if len(candidates) > 1:
            searches.append(candidates)
            return _best(candidates, lookup, seeds) or candidates[0]
        return candidates[0]

    plain = _plain_pretraining(run, profile)
    chosen = choose([replace(plain, pretraining=replace(plain.pretraining, **s)) for s in profile["pretraining"]])
    pretraining = replace(
        run.pretraining,
        learning_rate=chosen.pretraining.learning_rate,
        batch_size=chosen.pretraining.batch_size,
        epochs=chosen.pretraining.epochs,
    )
    fair = pretraining.penalty != "none" and not pretraining.intensity
    own = (pretraining.penalty, pretraining.hidden) != (plain.pretraining.penalty, plain.pretraining.hidden)
    rates = profile["rates"]["adam"]
    if fair:
        candidates = [replace(plain, pretraining=replace(pretraining, **settings)) for settings in profile["fair"]]
        found = candidates[0]
        if len(candidates) > 1:
            searches.append([chosen, *candidates])
            found = _fairest(candidates, chosen, lookup, seeds) or found
        pretraining = found.pretraining
    elif own and len(rates) > 1:
        pretraining = choose(
            [replace(plain, pretraining=replace(pretraining, learning_rate=rate)) for rate in rates]
        ).pretraining
    run = replace(run, pretraining=pretraining)
    rates = _rated(run, profile)
    if rates:
        usual = chosen.pretraining
        run = replace(run, batch_size=run.batch_size or usual.batch_size, epochs=run.epochs or usual.epochs)
        tried = run
        if run.label == "all":  # factored heads of every rank and weighting share the rate of the ordinary head
            tried = replace(run, method="head", weighting="none", rank=Run.rank)
        run = replace(run, learning_rate=choose([replace(tried, learning_rate=rate) for rate in rates]).learning_rate)
    named = resolve(label)
    return replace(run, alpha=named.alpha, keep=named.keep, evaluate=_evaluated(label)), searches


def _evaluated(label: str) -> str:
    """Settings that were not selected are shown on the validation data only."""
    return "validation" if label in SENSITIVITY else "test"


def label_seeds(label: str, seeds: int) -> int:
    """Fig. 1 shows one network; everything else every seed."""
    return 1 if resolve(label).keep == "representations" else seeds


def plan(
    profile_name: str, labels: Iterable[str], seeds: int, lookup: Lookup, split_seed: int | None = None
) -> Generator[list[Run], None, None]:
    """Phases of runs: each search before what it selects for, then the selected runs. Compute one, ask for the next.

    On every split of the profile, or on one.

    Labels that the profile does not offer are left out, and those whose images are not here, unless all are.
    """
    planning.check(PROFILES, profile_name, seeds)
    wanted = [label for label in labels if offered(label, profile_name)]
    here = [label for label in wanted if _is_here(label, profile_name)]
    yield from planning.phases(
        [(label, split) for split in splits(profile_name, split_seed) for label in here or wanted],
        lambda named: selected(named[0], profile_name, lookup, seeds, named[1]),
        seeded=seeded,
        search_seeds=min(seeds, SEARCH_SEEDS),
        seeds=lambda named: label_seeds(named[0], seeds),
    )


def _is_here(label: str, profile_name: str) -> bool:
    run = resolve(label)
    place = _settings(run, PROFILES[profile_name])["place"]
    return not run.label or _can_be_read(run.data, place["size"], place["edition"])


@cache  # or every label would look for the archive anew
def _can_be_read(data: str, size: str, edition: str) -> bool:
    try:
        return bool(digest(data, size, edition))
    except DataError:
        return False


@cache
def published_digest(data: str, size: str = "", edition: str = "", split_seed: int = 0) -> str | None:
    """SHA-256 that stands for the data of a run; nothing is read or fetched. None where no digest is published.

    That of files knows no split; that of generated data does.
    """
    if data == "adult":
        import hashlib

        from fairtuning.datasets.adult import FILES

        return hashlib.sha256("".join(FILES.values()).encode()).hexdigest()
    from fairtuning import datasets
    from fairtuning.datasets import images

    if datasets.source(data).needs == "nothing":
        return datasets.load(data, split_seed=split_seed).digest
    return images.digest_of(datasets.source(data).call("RECIPE"), edition, size=size)


@cache
def digest(data: str, size: str = "", edition: str = "") -> str:
    """The same, read from the data where none is published."""
    from fairtuning import datasets

    return published_digest(data, size, edition) or datasets.load(data, size=size, edition=edition).digest


def key_with(run: Run, digest: str) -> str:
    return key_of(run, digest=digest, version=VERSIONS[run.method])


@cache
def key(run: Run) -> str:
    found = published_digest(run.data, run.size, run.edition, run.split_seed)
    return key_with(run, found or digest(run.data, run.size, run.edition))


# -------------------------------------------------------------------------------------------------------------- units
def shape(run: Run) -> tuple:
    """Runs of equal shape train together: all but seeds, source network, weighting and penalties is the same."""
    return (
        *where(run), run.pretraining.hidden, run.method,
        run.rank if "factored" in run.method else 0,
        run.optimiser, run.learning_rate, run.batch_size, run.epochs, run.threads,
    )  # fmt: skip


def units(runs: Sequence[Run], *, size: int = 40) -> list[list[Run]]:
    """Runs of equal shape in lists of at most ``size``, those on the same pre-trained networks side by side."""
    ordered = sorted(runs, key=lambda run: (str(shape(run)), str(run.pretraining), run.seed))
    grouped = groupby(ordered, key=shape)
    found = [list(group) for _, group in grouped]
    return [group[start : start + size] for group in found for start in range(0, len(group), size)]


def configuration(record: Record) -> Run:
    """The run that a record is of."""
    fields = dict(record["configuration"])
    pretraining = dict(fields.pop("pretraining"))
    return Run(pretraining=Pretraining(**pretraining | {"hidden": tuple(pretraining["hidden"])}), **fields)
