"""What a run of P2 is, how a label such as ``FairLoRA/groups=cell`` names one, and which runs each table needs."""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from fairtuning import FairtuningError
from fairtuning.runs import Record, key_of
from fairtuning.studies import planning

NAME = "sukumaran2024"


@dataclass(frozen=True)
class Run:
    """One training, fully resolved; its key is a hash of this, of the data's digest and of the method's version."""

    data: str = "waterbirds"
    size: int | str = 112  # of the images, a side or "height x width"
    edition: str = ""
    label: str = ""  # of data sets that offer several; "": the one it has
    attribute: str = ""  # likewise
    backbone: str = "vit-tiny"  # a timm name or a key of backbones.BACKBONES; "small": see work.small
    weights: str = "pretrained"
    method: str = "lora"  # or full, or lora- and one of STARTS
    layers: str = "qkv"  # that have adapters
    rank: int = 16
    alpha: float = 16.0  # of LoRA: its product of factors is multiplied by alpha / rank
    objective: str = "variance"  # eq. 1, or smoothed: of moving averages; on balanced batches dro, balanced: task loss
    penalty: float | None = 0.0  # lambda of eq. 1; None: to be selected
    groups: str = "class"  # whose losses are compared, of losses.GROUPINGS
    last_layer: str = ""  # or retrained: on the validation part, by balanced cells (last_layer.py)
    learning_rate: float = 0.0  # of AdamW; 0: to be selected
    schedule: str = "constant"  # of the rate; or cosine, half of one from the rate to 0
    batch_size: int = 32
    epochs: int = 5
    keep: str = "last"  # which epoch's parameters: the last, or the best by validation accuracy (the first of equals)
    weight_decay: float = 0.01
    seed: int = 0  # initialisation of adapters and classifier
    order_seed: int = 0  # order of the data
    evaluate: str = "test"  # validation for the runs of a search: they never read the test set
    precision: str = "bfloat16"  # of autocast; the weights that are trained are float32
    threads: int = 1
    device: str = "cpu"


#: Where the factors of LoRA start, other than at B = 0 (`adapters.add`): at the plain SVD of each weight (PiSSA, arXiv
#: 2404.02948), or at one whose rows have an importance, of `factorization.VARIANTS`. That is our extension of arXiv
#: 2403.00625 to inner layers, and its controls.
STARTS = {"pissa": None, "fisher": "neutralised", "pooled": "pooled", "random": "random"}

#: Raised by hand when what a method does changes; part of every key.
VERSIONS = {"lora": 1, "full": 1} | {f"lora-{start}": 1 for start in STARTS}
#: Likewise, for runs on the classroom's backbone, when its pre-training changes.
SMALL = 1

#: One seed tells the settings of a search apart well enough, for they lie a factor of three or more apart.
SEARCH_SEEDS = 1
#: R1: highest validation accuracy. R2: highest validation worst-group accuracy (class x attribute) among the settings
#: within a point of the highest accuracy.
RULES = ("R1", "R2")
MARGIN = 0.01

PROFILES = {
    "compact": {
        "seeds": 5,
        "seconds": 250.0,  # of one run on one core, before there are records to tell
        "backbones": ("vit-tiny",),
        "data": {
            "waterbirds": {"size": 112, "edition": "resized-128", "epochs": 5},
            "celeba": {  # the label of 2403.00625, for the papers' methods to stand side by side
                "size": "80x64",
                "edition": "resized-64-20000",
                "label": "Wavy_Hair",
                "attribute": "Male",
                "epochs": 3,
            },
            "utkface": {
                "size": 80,
                "edition": "resized-112",
                "label": "age>=median",
                "attribute": "gender",
                "epochs": 3,
            },
            "kinds": {  # 70 kinds of bird on the same images: many classes, of which a batch holds few examples
                "data": "waterbirds",
                "size": 112,
                "edition": "resized-128",
                "label": "kind",
                "attribute": "background",
                "epochs": 5,
                "penalties": (0.01, 0.1, 1.0),  # eq. 1 is a sum over groups: of 70 classes it is the larger
            },
        },
        "rank": 16,
        "largest_rank": 128,
        "rank_seeds": 3,
        "rates": {"lora": (0.0003, 0.001, 0.003, 0.01), "full": (0.00003, 0.0001, 0.0003, 0.001)},
        "penalties": (0.1, 1.0, 10.0),
        "rule": "R2",
        "keep": "last",  # the best by validation accuracy is mostly the first here, which leans to the larger class
        "settings": {"schedule": "cosine", "keep": "best"},  # of a search, whose records hold every epoch anyhow
    },
    "paper": {
        "seeds": 3,  # the paper's; a verdict needs five
        "seconds": 600.0,  # on one GPU, a guess
        "backbones": ("vit", "clip", "dino"),
        "data": {
            "waterbirds": {"size": 224, "edition": "official", "epochs": 10},
            "geode": {"size": 224, "edition": "official", "epochs": 10},
            "aircraft": {"size": 224, "edition": "official", "epochs": 30},
            "celeba": {
                "size": 224,
                "edition": "official",
                "label": "Wavy_Hair",
                "attribute": "Male",
                "epochs": 3,
            },
            "utkface": {
                "size": 224,
                "edition": "official",
                "label": "age>=median",
                "attribute": "gender",
                "epochs": 5,
            },
            "kinds": {
                "data": "waterbirds",
                "size": 224,
                "edition": "official",
                "label": "kind",
                "attribute": "background",
                "epochs": 10,
            },
        },
        "rank": 16,
        "largest_rank": 128,
        "rank_seeds": 3,
        "rates": {"lora": (0.0003, 0.001, 0.003), "full": (0.00001, 0.00003, 0.0001)},
        "penalties": (0.01, 0.1, 1.0, 10.0, 100.0),
        "rule": "R1",
        "keep": "best",  # the paper's choice
        "settings": {"device": "cuda", "batch_size": 128, "schedule": "cosine", "keep": "best"},
    },
    "classroom": {
        "seeds": 5,
        "seconds": 3.0,
        "backbones": ("small",),
        "data": {"parity": {"size": 8, "epochs": 20}},
        "rank": 4,
        "largest_rank": 32,
        "rank_seeds": 3,
        # by R1 over seeds 0 to 2 among these and their neighbours, a factor of three below and above
        "rates": {"lora": (0.003,), "full": (0.001,)},
        "penalties": (0.1, 1.0, 10.0),
        "rule": "R2",
        "keep": "last",
        "settings": {"precision": "float32", "batch_size": 128, "schedule": "cosine"},
    },
}
# Between compact and paper: compact's images enlarged to the 224 pixels that the backbones were made for, on one GPU.
PROFILES["gpu"] = PROFILES["compact"] | {
    "seconds": 10.0,  # on one H100
    "data": {"waterbirds": PROFILES["compact"]["data"]["waterbirds"] | {"size": 224}},
    "rank_seeds": 5,
    "settings": PROFILES["compact"]["settings"] | {"device": "cuda", "batch_size": 128},
}

# ------------------------------------------------------------------------------------------------------------- labels
METHODS = {
    "LoRA": {"method": "lora"},
    "FairLoRA": {"method": "lora", "penalty": None},
    "FFT": {"method": "full"},
    "FairFFT": {"method": "full", "penalty": None},
}
CELL = "class x attribute"
#: What the field compares with, all on LoRA; each is told the attribute of the training (DFR: validation) examples.
BASELINES = {
    "GroupDRO": {"method": "lora", "objective": "dro", "groups": CELL},
    "Balanced": {"method": "lora", "objective": "balanced", "groups": CELL},
    "DFR": {"method": "lora", "last_layer": "retrained"},
}
GROUPS = {"class": "class", "background": "attribute", "cell": CELL}
RANKS = (8, 16, 32, 64, 128)
ALLOWED = (
    f"r=N, lambda=X, groups=class|background|cell, smoothed, R1 or R2, {'|'.join(STARTS)}, a data set or a backbone "
    "of the profile"
)


@dataclass(frozen=True)
class Named:
    """What a label says: ``run`` before anything is selected, and what it leaves to the profile as None."""

    run: Run
    rank: int | None = None
    rule: str | None = None
    data: str | None = None
    backbone: str | None = None


@cache
def resolve(label: str) -> Named:
    """``LoRA``, ``FairLoRA``, ``FFT`` or ``FairFFT``, then modifiers: ``/r=8``, ``/lambda=1``, ``/groups=cell``,
    ``/smoothed`` (moving averages of the group losses), ``/R1`` (the rule by which lambda is selected), ``/fisher``
    (where the factors of LoRA start, of STARTS), ``/celeba`` (data set), ``/dino`` (backbone)."""
    method, *modifiers = label.split("/")
    known = METHODS | BASELINES
    if method not in known:
        raise FairtuningError(f"unknown run label {label!r}; allowed: {', '.join(known)}, then /{ALLOWED}")
    named = Named(Run(**known[method]))
    for modifier in modifiers:
        named = _modify(named, modifier, label)
    if named.run.method == "full" and named.rank:
        raise FairtuningError(f"{label!r} has a rank; only LoRA and FairLoRA have one")
    return named


def _modify(named: Named, modifier: str, label: str) -> Named:
    name, _, value = modifier.partition("=")
    fair = label.startswith("Fair")
    try:
        if name == "r" and int(value) >= 1:
            return replace(named, rank=int(value))
        if name == "lambda" and fair and float(value) >= 0:
            return replace(named, run=replace(named.run, penalty=float(value)))
        if name == "groups" and fair and value in GROUPS:
            return replace(named, run=replace(named.run, groups=GROUPS[value]))
    except ValueError:
        pass
    if modifier == "smoothed" and fair:
        return replace(named, run=replace(named.run, objective="smoothed"))
    if modifier in RULES and fair:
        return replace(named, rule=modifier)
    if modifier in STARTS and named.run.method == "lora":
        return replace(named, run=replace(named.run, method=f"lora-{modifier}"))
    if any(modifier in profile["data"] for profile in PROFILES.values()):
        return replace(named, data=modifier)
    if any(modifier in profile["backbones"] for profile in PROFILES.values()):
        return replace(named, backbone=modifier)
    raise FairtuningError(f"unknown modifier {modifier!r} in {label!r}; allowed: {ALLOWED}")


FOUR = list(METHODS)
FAIR = [label for label in FOUR if label.startswith("Fair")]

RANKED = [f"{label}/r={rank}" for rank in RANKS for label in ("LoRA", "FairLoRA")]
TWELVE = [*FOUR, *(f"{label}/{backbone}" for backbone in ("clip", "dino") for label in FOUR)]
GRID = (0.1, 1, 10)  # lambda, at every rank
FACES = ["LoRA", "FairLoRA", "FairLoRA/groups=cell"]  # our question: other data than the paper's

#: Which runs each table and figure needs, by its slug in published/sukumaran2024.yaml; then those of our own questions.
#: A profile leaves out what it does not offer.
LABELS: dict[str, list[str]] = {
    "table1": [f"{label}/geode" for label in TWELVE],
    "table2": TWELVE,
    "table3": TWELVE,
    "groups": [f"FairLoRA/groups={groups}" for groups in ("cell", "background")],
    "rule": [f"{label}/R1" for label in FAIR],
    "baselines": [*BASELINES],
    "figure12": FOUR,
    "figure3-waterbirds": [f"{label}/clip" for label in FOUR],  # radar charts: no number is printed
    "figure6-waterbirds": [f"{label}/dino" for label in FOUR],
    "figure8-waterbirds": FOUR,
    "ranks": RANKED,
    "grid": [f"FairLoRA/r={rank}/lambda={penalty}" for rank in RANKS for penalty in GRID],
    "groups-fft": [f"FairFFT/groups={groups}" for groups in ("cell", "background")],
    "collapse": ["FairLoRA/lambda=10", "FairLoRA/lambda=100"],
    "table6": [f"{label}/aircraft" for label in TWELVE],
    "celeba": [f"{label}/celeba" for label in FACES],
    "utkface": [f"{label}/utkface" for label in FACES],
    "kinds": [f"{label}/kinds" for label in ("LoRA", "FairLoRA", "FairLoRA/smoothed")],  # P2-C14
    "initialisation": [f"{label}/celeba" for label in ("LoRA", "FairLoRA", "LoRA/pissa", "LoRA/fisher")],
    "initialisation-controls": [f"LoRA/{start}/celeba" for start in ("pooled", "random")],
}


def offered(label: str, profile_name: str) -> bool:
    """Whether a profile has the data set, the backbone and the rank that a label names."""
    named, profile = resolve(label), PROFILES[profile_name]
    return (
        (named.data is None or named.data in profile["data"])
        and (named.backbone is None or named.backbone in profile["backbones"])
        and (named.rank or 1) <= profile["largest_rank"]
    )


# --------------------------------------------------------------------------------------------- search and selection
Lookup = Callable[[Run], Record | None]


def best(
    candidates: Sequence[Run],
    lookup: Lookup,
    *,
    rule: str = "R1",
    keep: str = "last",
    seeds: int = SEARCH_SEEDS,
    margin: float = MARGIN,
) -> Run | None:
    """The candidate that a rule (of RULES) selects, on means over seeds; the first of equals. None if runs miss.

    A record has the validation numbers of every epoch; ``keep`` says of which the rule is to judge.
    """
    accuracy, worst = [], []
    for candidate in candidates:
        records = [lookup(seeded(candidate, seed)) for seed in range(seeds)]
        if any(record is None for record in records):
            return None
        found = [judged(record, keep) for record in records]
        accuracy.append(sum(one["accuracy"] for one in found) / seeds)
        worst.append(sum(one["worst"] for one in found) / seeds)
    if rule == "R1":
        return candidates[accuracy.index(max(accuracy))]
    near = [index for index, value in enumerate(accuracy) if value >= max(accuracy) - margin - 1e-9]
    return candidates[max(near, key=lambda index: (worst[index], -index))]


def judged(record: Record, keep: str) -> dict[str, float]:
    """Validation accuracy and worst group at the epoch whose parameters ``keep`` keeps: what a rule looks at.

    The record of a search has its own numbers of its best epoch, whatever the selected runs keep.
    """
    history = record["history"]
    epoch = len(history) - 1 if keep == "last" else history.index(max(history))
    return {"accuracy": history[epoch], "worst": record["curve"]["worst"][epoch]}


def task_of(run: Run) -> str:
    """What tells the label and attribute of a run from others of the same images; "" where the data has one pair."""
    return f"{run.label}-{run.attribute}" if run.label else ""


def seeded(run: Run, seed: int) -> Run:
    return replace(run, seed=seed, order_seed=seed)


def selected(label: str, profile_name: str, lookup: Lookup) -> tuple[Run, list[list[Run]]]:
    """The run that ``label`` names with every setting selected, and the searches (lists of candidates) behind it.

    Where a search is unfinished its first candidate stands in, so that the number of runs can be told beforehand.
    (1) the learning rate of the task loss alone, at the profile's rank, by rule R1; (2) at that rate lambda, by the
    label's rule. Every rank has the settings of the profile's rank.
    """
    named, profile = resolve(label), PROFILES[profile_name]
    if not offered(label, profile_name):
        raise FairtuningError(f"{label!r} is not offered in profile {profile_name}")
    data = named.data or next(iter(profile["data"]))
    options = {"data": data, "penalties": profile["penalties"]} | profile["data"][data]
    penalties = options.pop("penalties")
    run = replace(
        named.run,
        backbone=named.backbone or profile["backbones"][0],
        rank=Run.rank if named.run.method == "full" else profile["rank"],
        evaluate="validation",
        **options,
        **profile["settings"],
    )
    searches = []

    def choose(candidates: list[Run], rule: str) -> Run:
        if len(candidates) > 1:
            searches.append(candidates)
            return best(candidates, lookup, rule=rule, keep=profile["keep"]) or candidates[0]
        return candidates[0]

    plain = replace(run, penalty=0.0, groups=Run.groups, objective=Run.objective, last_layer=Run.last_layer)
    rates = profile["rates"][run.method.partition("-")[0]]  # one grid for every start, a search for each
    rate = choose([replace(plain, learning_rate=rate) for rate in rates], "R1").learning_rate
    run = replace(run, learning_rate=rate)
    if run.penalty is None:
        candidates = [replace(run, penalty=penalty) for penalty in penalties]
        run = choose(candidates, named.rule or profile["rule"])
    return replace(run, rank=named.rank or run.rank, keep=profile["keep"], evaluate="test"), searches


def label_seeds(label: str, profile_name: str, seeds: int) -> int:
    """Ranks are compared on fewer seeds than the rest."""
    return min(seeds, PROFILES[profile_name]["rank_seeds"]) if resolve(label).rank else seeds


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
        seeds=lambda label: label_seeds(label, profile_name, seeds),
    )


@cache
def published_digest(data: str, size: int | str, edition: str) -> str | None:
    """SHA-256 that stands for the images of a run; nothing is read or fetched. None where no digest is published."""
    from fairtuning import datasets
    from fairtuning.datasets import images

    if datasets.source(data).needs == "nothing":
        return datasets.load(data).digest
    return images.digest_of(datasets.source(data).call("RECIPE"), edition, size=size)


@cache
def digest(data: str, size: int | str, edition: str) -> str:
    """The same, read from the data where none is published."""
    from fairtuning import datasets

    return published_digest(data, size, edition) or datasets.load(data, size=size, edition=edition).digest


def version_of(run: Run) -> int:
    return VERSIONS[run.method] + (SMALL if run.backbone == "small" else 0)


def key_with(run: Run, digest: str) -> str:
    return key_of(run, digest=digest, version=version_of(run))


@cache
def key(run: Run) -> str:
    return key_with(run, digest(run.data, run.size, run.edition))


def units(runs: Sequence[Run]) -> list[list[Run]]:
    """Each run by itself: a transformer fills a core alone."""
    return [[run] for run in runs]


def configuration(record: Record) -> Run:
    """The run that a record is of."""
    return Run(**record["configuration"])
