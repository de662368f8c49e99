"""What a run leaves, as the lines of a store: labels and groups of the examples, predictions, accuracy, losses."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from fairtuning.datasets import GroupedData
from fairtuning.losses import cross_entropy
from fairtuning.runs import Record, Store, environment, key_of, pack


def examples_key(digest: str, part: str, task: str = "", *, split_seed: int = 0) -> str:
    """The key of an examples line; ``task`` tells several labels or groups of the same data apart, ``split_seed``
    (0, the default, is left out) other divisions of the same examples into parts."""
    split = f"split{split_seed}" if split_seed else ""
    return "-".join(word for word in (digest[:16], task, split, part) if word)


def examples_line(data: GroupedData, split: str, task: str = "", *, split_seed: int = 0) -> Record:
    """Label and group of the examples of one split, which the predictions of all runs on them refer to."""
    index = data.part(split)
    return {
        "kind": "examples",
        "key": examples_key(data.digest, split, task, split_seed=split_seed),
        "label": pack(data.label[index].tolist(), classes=len(data.label_names)),
        "group": pack(data.group[index].tolist(), classes=len(data.group_names)),
        "label_names": data.label_names,
        "group_names": data.group_names,
    }


def examples_of(store: Store, record: Record, part: str) -> Record | None:
    """The examples line of one part of what a record was made of."""
    of = record["configuration"]
    task = f"{of['label']}-{of['attribute']}" if of.get("label") else ""
    return store.examples.get(examples_key(record["data"]["digest"], part, task, split_seed=of.get("split_seed", 0)))


def frame(
    run: Any, data: GroupedData, *, version: int, history: list[float], parameters: int, seconds: float
) -> Record:
    """What every record says of its run, whatever is kept of what the run predicts."""
    return {
        "kind": "record",
        "key": key_of(run, digest=data.digest, version=version),
        "configuration": asdict(run),
        "version": version,
        "data": {"name": data.name, "edition": data.edition, "digest": data.digest},
        "environment": environment(getattr(run, "device", "cpu"))["key"],
        "history": history,
        "epoch": len(history),
        "parameters": parameters,
        "seconds": round(seconds, 3),
    }


def make_record(
    run: Any,
    data: GroupedData,
    *,
    version: int,
    scores: Mapping[str, Tensor],
    history: list[float],
    parameters: int,
    seconds: float,
) -> Record:
    """The record of ``run``: ``scores`` are its logits ``[n, k]`` by split, of "validation" and of ``run.evaluate``.

    The predictions of the latter are kept. ``history``: validation accuracy by epoch; ``parameters``: how many numbers
    were trained.
    """
    predictions = {split: values.argmax(-1) for split, values in scores.items()}
    labels = {split: data.label[data.part(split)] for split in scores}
    return frame(run, data, version=version, history=history, parameters=parameters, seconds=seconds) | {
        "accuracy": {
            split: round(float((values == labels[split]).double().mean()), 6) for split, values in predictions.items()
        },
        "loss": {
            split: float(f"{cross_entropy(values, labels[split]).mean():.8g}") for split, values in scores.items()
        },
        "predictions": {run.evaluate: pack(predictions[run.evaluate].tolist(), classes=len(data.label_names))},
    }
