"""A store of P2's compact runs with planted predictions: what the pages show when every run has its record."""

import numpy as np

from fairtuning.plan import task_of
from fairtuning.records import examples_key
from fairtuning.runs import Store, key_of, pack
from fairtuning.studies.sukumaran2024.configuration import STUDY, Run
from fairtuning.studies.sukumaran2024.tables import vit_parameters
from fairtuning.studies.sukumaran2024.work import BATCHES

NAMES = (("landbird", "waterbird"), ("land", "water"))
SIZES = {"validation": (40, 40, 12, 12), "test": (200, 200, 60, 60)}  # (label, group): 00, 01, 10, 11
HERE = {"kind": "environment", "key": "planted", "processor": "none", "python": "3", "packages": {}, "commit": "none"}


def cells(split):
    label, group = np.repeat([0, 0, 1, 1], SIZES[split]), np.repeat([0, 1, 0, 1], SIZES[split])
    return label, group


def rates(run: Run) -> np.ndarray:
    """Share right in each cell: the penalty helps a little, by cell a lot, full training a little less."""
    right = np.array([0.97, 0.75, 0.45, 0.92])
    right += {"class": 0.02, "attribute": 0.0, "class x attribute": 0.15}[run.groups] * bool(run.penalty)
    right -= 0.05 * (run.method == "full") + 0.01 * abs(np.log10(run.learning_rate) + 3)
    return right.clip(0.05, 0.98)


def lines_of(run: Run) -> list[dict]:
    """The lines that a run would leave, its predictions drawn at ``rates``."""
    stands_for = "0" * 64
    rng = np.random.default_rng([run.seed, int(run.rank), int(10 * (run.penalty or 0))])
    found, predictions, losses = [HERE], {}, {}
    accuracy, worst = {}, {}
    for split in dict.fromkeys(("validation", run.evaluate)):
        label, group = cells(split)
        right = rng.random(len(label)) < rates(run)[2 * label + group]
        predictions[split] = np.where(right, label, 1 - label)
        by_cell = [[float(right[(label == y) & (group == g)].mean()) for y in (0, 1)] for g in (0, 1)]
        losses[split] = [[round(1.05 - value, 4) for value in row] for row in by_cell]
        accuracy[split], worst[split] = round(float(right.mean()), 6), round(float(np.min(by_cell)), 6)
        entry = {"kind": "examples", "key": examples_key(stands_for, split, task_of(run))}
        entry |= {"label": pack(label, classes=2), "group": pack(group, classes=2)}
        found.append(entry | {"label_names": NAMES[0], "group_names": NAMES[1]})
    grown = [round(accuracy["validation"] * (1 - 0.3 / epoch**2), 4) for epoch in range(1, run.epochs + 1)]
    record = {
        "kind": "record", "key": key_of(run, digest=stands_for, version=1), "configuration": vars(run), "version": 1,
        "environment": "planted",
        "data": {"name": run.data, "edition": run.edition, "digest": stands_for},
        "accuracy": accuracy, "worst": worst, "loss": dict.fromkeys(accuracy, 0.5), "cell_loss": losses,
        "history": grown, "epoch": run.epochs, "seconds": 1.0,
        "parameters": vit_parameters(rank=run.rank, classes=2, width=192)[0],
        "curve": {"kept": run.epochs, "worst": [value / 2 for value in grown], "loss": [1 - value for value in grown]},
        "penalty": {
            "batch_sizes": [int(run.batch_size * factor) for factor in BATCHES],
            "and_signal": [[(1.0 / size, 0.01) for size in (8, 32, 128, 512)]] * run.epochs,
        },
        "predictions": {run.evaluate: pack(predictions[run.evaluate], classes=2)},
        "backbone": {"name": run.backbone, "weights": "none", "packages": {}},
    }  # fmt: skip
    return [*found, record]


def fill(labels, *, seeds: int = 5, profile: str = "compact") -> Store:
    """Appends every run that ``labels`` need to the store in FAIRTUNING_RESULTS."""
    store = Store.of("sukumaran2024", profile)
    with store.writing():
        lookup = store.lookup(STUDY)
        for phase in STUDY.phases(profile, labels, seeds, lookup):
            for run in phase:
                if lookup(run) is None:
                    for line in lines_of(run):
                        store.append(line)
    return store
