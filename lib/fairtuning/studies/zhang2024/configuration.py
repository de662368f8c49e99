"""What a run of P1 is, how a label such as ``OURS/sgd`` names one, and which runs each table and figure needs."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby, product

from fairtuning import FairtuningError, plan
from fairtuning.datasets import DataError
from fairtuning.vision.features import STAGES

NAME = "zhang2024"


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
class Run(plan.Run):
    """One training, fully resolved. ``backbone``: whose frozen features a head on images sees, in timm's words (or
    features.STAGES); ``label`` "all": every attribute at once; ``batch_size`` 0: that of pre-training, likewise epochs.
    """

    data: str = "adult"
    encoding: str = "integer"
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
    keep: str = "predictions"  # or "fisher", "representations": what Figs 3 and 1 are drawn from
    device: str = "cpu"

    def __post_init__(self):
        if isinstance(self.pretraining, dict):  # of a record
            how = self.pretraining | {"hidden": tuple(self.pretraining["hidden"])}
            object.__setattr__(self, "pretraining", Pretraining(**how))


#: Raised by hand when what a method does changes; part of every key.
VERSIONS = {"pre-trained": 1, "head": 1, "factored head": 1, "network": 1}

#: Optimiser and rate of every search; the same four settings for every method that is compared.
RATES = {"adam": (0.0003, 0.001, 0.003, 0.01), "sgd": (0.001, 0.003, 0.01, 0.03)}
SEARCH_SEEDS = 5

#: Fair pre-training: one of these by rule F, with an additive penalty, in batches in which a gap is more than noise.
#: Set after a look at other batches, strengths and rates on the pre-training and validation rows of split 0; no test
#: row was read.
FAIR = [
    {"intensity": intensity, "learning_rate": rate, "batch_size": 2048, "epochs": 100}
    for intensity, rate in product((0.25, 0.5, 1.0, 2.0, 4.0), (0.003, 0.01))
]

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


OFFICIAL_SPLIT = {"split_seed": 0}  # CelebA's own, whatever split is asked for


def _images(backbones: Sequence[str], celeba: dict, lfw: dict) -> dict[str, dict]:
    """The tasks on images of a profile. The probe's and the heads' settings are searched (the paper is silent)."""
    heads = {
        "backbones": backbones,
        "pretraining": [{"learning_rate": rate, "batch_size": 512, "epochs": 10} for rate in RATES["adam"]],
        "rates": RATES,
    }
    places = {"celeba": celeba, "lfw": lfw, "40 attributes": celeba}
    return {name: {**IMAGES[name], **place, **heads} for name, place in places.items()}


#: "data": its data sets, each with what it has of its own. The first is the one of labels that name none.
PROFILES = {
    "paper": {
        "data": {"adult": {}}
        | _images(
            ("resnet18", "resnet50", "densenet121"),
            {"size": "224", "edition": "official"} | OFFICIAL_SPLIT,
            {"size": "224", "edition": "official"},
        ),
        "seeds": 10,
        "seconds": 0.2,  # of one run on one core, before there are records to tell
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
        "seconds": 0.2,
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
        {"size": "80x64", "edition": "resized-64-20000"} | OFFICIAL_SPLIT,
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
FACTORED = {
    "f+SVD": "none",
    "OURS": "neutralised",
    "average first": "average_first",
    "normalised": "normalised",
    "female only": "group_0",
    "male only": "group_1",
    "first group only": "group_0",
    "second group only": "group_1",
    "pooled": "pooled",
    "random": "random",
}
METHODS = {
    "pre-trained": {"method": "pre-trained"},
    "TL": {"method": "head"},
    **{name: {"method": "factored head", "weighting": weighting} for name, weighting in FACTORED.items()},
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
    **{f"MLP-{depth}": {"hidden": (20,) * depth} for depth in range(1, 10)},
    **{name: {"backbone": name} for name in BACKBONES},
}
PENALISED_NAME = re.compile(
    r"(?P<method>.+?)(?P<how> after |\+| )(?P<criterion>EO|DP) (?P<intensity>\d+(?:\.\d+)?|fair)"
)


def _share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise ValueError
    return float(text)


def _whole(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


NUMBERS = {
    "alpha": lambda text: {"alpha": _share(text)},
    "r": lambda text: {"rank": int(text)},
    "epochs": lambda text: {"epochs": _whole(text)},
    "batch_size": lambda text: {"batch_size": _whole(text)},
}


def penalised(name: str) -> plan.Fields | None:
    """``METHOD+EO 0.5`` (penalty during fine-tuning), ``METHOD after DP 0.1`` (during pre-training; ``pre-trained DP
    0.1`` for that network itself), ``METHOD after DP fair`` (as strong as it takes)."""
    match = PENALISED_NAME.fullmatch(name)
    if match is None or match["method"] not in METHODS:
        return None
    how, intensity = {"penalty": CRITERIA[match["criterion"]]}, match["intensity"]
    if intensity == "fair":
        if match["how"] == "+":
            raise FairtuningError(f"{name!r}: 'fair' is a strength of pre-training: allowed after ' after '")
        how |= {"form": "additive"}
    else:
        how |= {"intensity": float(intensity)}
        if not 0 < how["intensity"] < 1:
            raise FairtuningError(f"intensity is {intensity} in {name!r}; allowed: above 0, below 1")
    return METHODS[match["method"]] | (how if match["how"] == "+" else {"pretrained_with": how})


def check(label: str, asked: plan.Fields) -> None:
    """What of a label does not go together."""
    place, rank = asked.get("place"), asked.get("rank", Run.rank)
    outputs = 40 if place == "40 attributes" else 2
    if not 1 <= rank <= outputs:
        raise FairtuningError(f"rank is {rank} in {label!r}; a head with {outputs} outputs allows 1 to {outputs}")
    if place in IMAGES and {"hidden", "encoding", "keep"} & set(asked):
        raise FairtuningError(f"{label!r}: images have no hidden layers, encoding, stored Fisher or representations")
    if place == "40 attributes" and {"penalty", "pretrained_with", "heads"} & set(asked):
        raise FairtuningError(f"{label!r}: a head of 40 attributes has no penalty and no own heads")
    if "backbone" in asked and place not in IMAGES:
        raise FairtuningError(f"{label!r} names a backbone; only images ({', '.join(IMAGES)}) have one")


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


# -------------------------------------------------------------------------------------------------------------- choices
def select(run: Run, asked: plan.Fields, profile: plan.Fields, choose: Callable) -> Run:
    """(1) batch, epochs and rate of plain pre-training from the profile's grid; (2) with that batch and these epochs,
    the rate of the label's own pre-training where it differs (penalty, depth), or by rule F all of fair pre-training;
    (3) the rate of fine-tuning. Rule R1 but for F. Alpha shares the setting of 1/2, and with 40 attributes all heads
    one.
    """
    backbone = BACKBONES[asked.get("backbone") or profile["backbones"][0]] if run.label else ""
    hidden = () if run.label else Pretraining.hidden
    run = replace(run, alpha=0.5, keep=Run.keep, backbone=backbone)
    own = {"hidden": asked.get("hidden", hidden)} | asked.get("pretrained_with", {})
    if run.form != Run.form and run.penalty == "none":  # "additive" is of whichever penalty the label has
        own, run = own | {"form": run.form}, replace(run, form=Run.form)
    same = ("data", "size", "edition", "label", "attribute", "encoding", "backbone", "split_seed", "evaluate")
    plain = Run(method="pre-trained", **{name: getattr(run, name) for name in same})
    first = choose([replace(plain, pretraining=Pretraining(hidden=hidden, **how)) for how in profile["pretraining"]])
    usual, rates = first.pretraining, profile["rates"]["adam"]
    ours = replace(usual, **own)
    if ours.penalty != "none" and not ours.intensity:
        fair = [replace(plain, pretraining=replace(ours, **how)) for how in profile["fair"]]
        ours = choose([first, *fair], "F").pretraining if len(fair) > 1 else fair[0].pretraining
    elif (ours.penalty, ours.hidden) != ("none", hidden) and len(rates) > 1:
        ours = choose([replace(plain, pretraining=replace(ours, learning_rate=rate)) for rate in rates]).pretraining
    run = replace(run, pretraining=ours)
    rates = () if run.method == "pre-trained" else profile["rates"].get(run.optimiser, ())
    if rates:  # a converged or untrained head has none
        run = replace(run, batch_size=run.batch_size or usual.batch_size, epochs=run.epochs or usual.epochs)
        tried = replace(run, method="head", weighting="none", rank=Run.rank) if run.label == "all" else run
        run = replace(run, learning_rate=choose([replace(tried, learning_rate=rate) for rate in rates]).learning_rate)
    kept = {name: asked[name] for name in ("alpha", "keep") if name in asked}
    given = {"epochs", "batch_size"} <= set(asked)  # settings that were not selected: on the validation data only
    return replace(run, **kept, evaluate="validation" if given else "test")


def judge(record: plan.Record, profile: plan.Fields) -> plan.Fields:
    """The gap is that of the penalty of pre-training; without one, the yardstick of rule F, nothing asks for it."""
    return plan.accuracy(record) | {"gap": record.get("gap", {}).get("validation", math.nan)}


def where(run: Run) -> tuple:
    """All that says which inputs, labels, groups and splits a run sees, and as what numbers."""
    return (
        run.data, run.encoding, run.size, run.edition, run.label, run.attribute, run.backbone, run.weights,
        run.split_seed, run.precision, run.device,
    )  # fmt: skip


def is_here(run: Run) -> bool:
    """Whether the images of a run can be read."""
    return not run.label or _can_be_read(run.data, run.size, run.edition)


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

STUDY = plan.Study(
    name=NAME,
    run=Run,
    methods=METHODS,
    named=penalised,
    modifiers=MODIFIERS,
    numbers=NUMBERS,
    check=check,
    labels=LABELS,
    profiles=PROFILES,
    select=select,
    judge=judge,
    seeds_of=lambda asked, profile, seeds: 1 if asked.get("keep") == "representations" else seeds,
    search_seeds=lambda seeds: min(seeds, SEARCH_SEEDS),
    version=lambda run: VERSIONS[run.method],
    here=is_here,
)
selected, offered, resolve, configuration = STUDY.selected, STUDY.offered, STUDY.resolve, STUDY.restore
