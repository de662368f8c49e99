"""What a run of P2 is, how a label such as ``FairLoRA/groups=cell`` names one, and which runs each table needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fairtuning import FairtuningError, plan

NAME = "sukumaran2024"


@dataclass(frozen=True)
class Run(plan.Run):
    """One training, fully resolved. ``backbone``: a timm name or a key of backbones.BACKBONES; "small": that of the
    classroom. ``precision``: of autocast; the weights that are trained are float32."""

    data: str = "waterbirds"
    size: int | str = 112
    backbone: str = "vit-tiny"
    weights: str = "pretrained"
    method: str = "lora"  # or full, or lora- and one of STARTS
    layers: str = "qkv"  # that have adapters
    rank: int = 16
    alpha: float = 16.0  # of LoRA: its product of factors is multiplied by alpha / rank
    objective: str = "variance"  # eq. 1, or smoothed: of moving averages; on balanced batches dro, balanced: task loss
    penalty: float | None = 0.0  # lambda of eq. 1; None: to be selected
    groups: str = "class"  # whose losses are compared, of losses.GROUPINGS
    last_layer: str = ""  # or retrained: on the validation part, by balanced cells (last_layer.py)
    schedule: str = "constant"  # of the rate; or cosine, half of one from the rate to 0
    batch_size: int = 32
    epochs: int = 5
    keep: str = "last"  # which epoch's parameters: the last, or the best by validation accuracy (the first of equals)
    weight_decay: float = 0.01
    precision: str = "bfloat16"
    device: str = "cpu"


#: Where the factors of LoRA start, other than at B = 0 (`adapters.add`): at the plain SVD of each weight (PiSSA, arXiv
#: 2404.02948), or at one whose rows have an importance, of `factorization.VARIANTS`. That is our extension of arXiv
#: 2403.00625 to inner layers, and its controls.
STARTS = {"pissa": None, "fisher": "neutralised", "pooled": "pooled", "random": "random"}

#: Raised by hand when what a method does changes; part of every key.
VERSIONS = {"lora": 1, "full": 1} | {f"lora-{start}": 1 for start in STARTS}
#: Likewise, for runs on the classroom's backbone, when its pre-training changes.
SMALL = 1

RULES = ("R1", "R2")  # by which lambda may be selected (``plan.pick``), on one seed

# ----------------------------------------------------------------------------------------------------------- at a scale
HAIR = {"data": "celeba", "label": "Wavy_Hair", "attribute": "Male", "epochs": 3}  # the label of 2403.00625
AGE = {"data": "utkface", "label": "age>=median", "attribute": "gender"}
KINDS = {"data": "waterbirds", "label": "kind", "attribute": "background"}  # 70 classes: a batch holds few of each
OFFICIAL = {"size": 224, "edition": "official"}
COMPACT = {
    "seeds": 5,
    "seconds": 250.0,  # of one run on one core, before there are records to tell
    "backbones": ("vit-tiny",),
    "data": {
        "waterbirds": {"size": 112, "edition": "resized-128", "epochs": 5},
        "celeba": {**HAIR, "size": "80x64", "edition": "resized-64-20000"},
        "utkface": {**AGE, "size": 80, "edition": "resized-112", "epochs": 3},
        # eq. 1 is a sum over groups: of 70 classes it is the larger
        "kinds": {**KINDS, "size": 112, "edition": "resized-128", "epochs": 5, "penalties": (0.01, 0.1, 1.0)},
    },
    "rank": 16,
    "largest_rank": 128,
    "rank_seeds": 3,
    "rates": {"lora": (0.0003, 0.001, 0.003, 0.01), "full": (0.00003, 0.0001, 0.0003, 0.001)},
    "penalties": (0.1, 1.0, 10.0),
    "rule": "R2",
    "keep": "last",  # the best by validation accuracy is mostly the first here, which leans to the larger class
    "settings": {"schedule": "cosine", "keep": "best"},  # of a search, whose records hold every epoch anyhow
}
PROFILES = {
    "compact": COMPACT,
    # Between compact and paper: the 224 pixels that the backbones were made for, on one H100.
    "gpu": COMPACT | {
        "seconds": 10.0,
        "data": {"waterbirds": COMPACT["data"]["waterbirds"] | {"size": 224}},
        "rank_seeds": 5,
        "settings": COMPACT["settings"] | {"device": "cuda", "batch_size": 128},
    },
    "paper": COMPACT | {
        "seeds": 3,  # the paper's; a verdict needs five
        "seconds": 600.0,  # on one GPU, a guess
        "backbones": ("vit", "clip", "dino"),
        "data": {
            "waterbirds": {**OFFICIAL, "epochs": 10},
            "geode": {"data": "geode", **OFFICIAL, "epochs": 10},
            "aircraft": {"data": "aircraft", **OFFICIAL, "epochs": 30},
            "celeba": {**HAIR, **OFFICIAL},
            "utkface": {**AGE, **OFFICIAL, "epochs": 5},
            "kinds": {**KINDS, **OFFICIAL, "epochs": 10},
        },
        "rates": {"lora": (0.0003, 0.001, 0.003), "full": (0.00001, 0.00003, 0.0001)},
        "penalties": (0.01, 0.1, 1.0, 10.0, 100.0),
        "rule": "R1",
        "keep": "best",  # the paper's choice
        "settings": {"device": "cuda", "batch_size": 128, "schedule": "cosine", "keep": "best"},
    },
    "classroom": COMPACT | {
        "seconds": 3.0,
        "backbones": ("small",),
        "data": {"parity": {"size": 8, "epochs": 20}},
        "rank": 4,
        "largest_rank": 32,
        # by R1 over seeds 0 to 2 among these and their neighbours, a factor of three below and above
        "rates": {"lora": (0.003,), "full": (0.001,)},
        "settings": {"precision": "float32", "batch_size": 128, "schedule": "cosine"},
    },
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------------- labels
CELL = "class x attribute"
METHODS = {
    "LoRA": {"method": "lora"},
    "FairLoRA": {"method": "lora", "penalty": None},
    "FFT": {"method": "full"},
    "FairFFT": {"method": "full", "penalty": None},
}
#: What the field compares with, all on LoRA; each is told the attribute of the training (DFR: validation) examples.
BASELINES = {
    "GroupDRO": {"method": "lora", "objective": "dro", "groups": CELL},
    "Balanced": {"method": "lora", "objective": "balanced", "groups": CELL},
    "DFR": {"method": "lora", "last_layer": "retrained"},
}
GROUPS = {"class": "class", "background": "attribute", "cell": CELL}
RANKS = (8, 16, 32, 64, 128)
OF_PENALTIES = ("lambda", "groups", "smoothed", *RULES)  # words for Fair- alone
MODIFIERS = {
    "smoothed": {"objective": "smoothed"},
    **{rule: {"rule": rule} for rule in RULES},
    **{start: {"method": f"lora-{start}"} for start in STARTS},
    **{name: {"backbone": name} for name in ("vit-tiny", "vit", "clip", "dino", "small")},
}


def _at_least(number: type, least: float, text: str) -> float:
    if not number(text) >= least:
        raise ValueError
    return number(text)


NUMBERS = {
    "r": lambda text: {"rank": _at_least(int, 1, text)},
    "lambda": lambda text: {"penalty": _at_least(float, 0, text)},
    "groups": lambda text: {"groups": GROUPS[text]},
}


def check(label: str, asked: plan.Fields) -> None:
    """What of a label does not go together."""
    name, *words = label.split("/")
    starts = [word for word in words if word in STARTS]
    wrong = [word for word in words if word.partition("=")[0] in OF_PENALTIES and not name.startswith("Fair")]
    wrong += starts if name.endswith("FFT") else starts[1:]
    if wrong:
        raise STUDY.unknown(wrong[0], label)
    if name.endswith("FFT") and "rank" in asked:
        raise FairtuningError(f"{label!r} has a rank; only LoRA and FairLoRA have one")


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


# -------------------------------------------------------------------------------------------------------------- choices
def select(run: Run, asked: plan.Fields, profile: plan.Fields, choose: Callable) -> Run:
    """(1) the rate of the task loss alone, at the profile's rank, by R1; (2) at that rate lambda, by the label's rule.
    Every rank has the settings of the profile's rank."""
    full = run.method == "full"
    backbone, rank = asked.get("backbone") or profile["backbones"][0], Run.rank if full else profile["rank"]
    run = replace(run, backbone=backbone, rank=rank)
    plain = replace(run, penalty=0.0, groups=Run.groups, objective=Run.objective, last_layer=Run.last_layer)
    rates = profile["rates"]["full" if full else "lora"]  # one grid for every start, a search for each
    run = replace(run, learning_rate=choose([replace(plain, learning_rate=rate) for rate in rates]).learning_rate)
    if run.penalty is None:
        candidates = [replace(run, penalty=penalty) for penalty in profile["penalties"]]
        run = choose(candidates, asked.get("rule", profile["rule"]))
    return replace(run, rank=asked.get("rank", run.rank), keep=profile["keep"], evaluate="test")


def judged(record: plan.Record, keep: str) -> plan.Fields:
    """Validation accuracy and worst group at the epoch that the selected runs keep, whatever the search kept."""
    history = record["history"]
    epoch = len(history) - 1 if keep == "last" else history.index(max(history))
    return {"accuracy": history[epoch], "worst": record["curve"]["worst"][epoch]}


def units(runs: Sequence[Run]) -> list[list[Run]]:
    """Each run by itself: a transformer fills a core alone."""
    return [[run] for run in runs]


STUDY = plan.Study(
    name=NAME,
    run=Run,
    methods=METHODS | BASELINES,
    modifiers=MODIFIERS,
    numbers=NUMBERS,
    check=check,
    labels=LABELS,
    profiles=PROFILES,
    select=select,
    judge=lambda record, profile: judged(record, profile["keep"]),
    seeds_of=lambda asked, profile, seeds: min(seeds, profile["rank_seeds"]) if "rank" in asked else seeds,
    version=lambda run: VERSIONS[run.method] + (SMALL if run.backbone == "small" else 0),
)
selected, offered, resolve, configuration = STUDY.selected, STUDY.offered, STUDY.resolve, STUDY.restore
