"""What one unit of heads does: load the frozen inputs, train (R heads at once), perhaps post-process, predict."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from fairtuning import FairtuningError, datasets
from fairtuning.datasets import DataError, GroupedData
from fairtuning.factorization import low_rank, neutralise
from fairtuning.fisher import head_fisher
from fairtuning.last_layer import retrain_last_layer
from fairtuning.losses import (
    PENALTIES,
    balanced_weights,
    cross_entropy,
    group_dro_loss,
    penalised_loss,
    penalty_groups,
    variance_penalised_loss,
)
from fairtuning.metrics import group_counts
from fairtuning.networks import Parameters, count, head, mlp, mlp_parameters, stack
from fairtuning.plan import task_of
from fairtuning.records import examples_line, make_record
from fairtuning.runs import Record, environment
from fairtuning.studies.bench.configuration import HIDDEN, METHODS, RANK, Run, place
from fairtuning.training import train

CRITERIA = {"DP": "demographic_parity", "EO": "equalized_odds"}
#: Of DFR: four strengths, as every other method has four settings; it chooses by itself on half of validation.
DFR_STRENGTHS = (1.0, 0.3, 0.1, 0.03)

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]


@cache
def load(run: Run) -> GroupedData:
    """The data of a run (``configuration.place`` of it) with float64 inputs ``[N, d]`` that every method shares:
    one-hot columns, or features of a frozen backbone; standardised by the training part.

    DataError where your own data is not the edition that the run is of.
    """
    if run.data == "own":
        from fairtuning.datasets import own

        data = own.read(run.source)
        if data.edition != run.edition:
            raise DataError(
                f"{run.source} or its data is another edition ({data.edition[:16]}) than the run's "
                f"({run.edition[:16] or 'none'}): it was changed meanwhile; start again"
            )
    elif not run.backbone:
        data = datasets.load(run.data, **({"encoding": "one-hot"} if run.data == "adult" else {}))
    else:
        task = {"label": run.label, "group": run.attribute} if run.label else {}
        data = datasets.load(run.data, size=run.size, edition=run.edition, **task)
    if not run.backbone:
        return data
    from fairtuning.vision import features

    inputs = features.load(data, run.backbone).double()
    seen = inputs[data.part("training")]
    spread = seen.std(0, correction=0)
    return replace(data, inputs=(inputs - seen.mean(0)) / torch.where(spread > 0, spread, 1.0))


def work(unit: Sequence[Run]) -> list[Record]:
    """The records (and the lines they refer to) of runs that ``units`` put together."""
    first = unit[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(first.threads)
    try:
        data = load(place(first))
        before = time.process_time()  # of the processor: a stack has one thread, and other work may share the core
        scores, histories, sizes = _heads(unit, data)
        share = (time.process_time() - before) / len(unit)
        lines = [environment(), *(examples_line(data, split, task_of(first)) for split in ("validation", "test"))]
        for index, run in enumerate(unit):
            run = replace(run, source="")  # a record is of its data, wherever that lies
            found = {split: values[index] for split, values in scores.items()}
            lines.append(_record(run, data, found, histories[index], parameters=sizes[index], seconds=share))
        return lines
    finally:
        torch.set_num_threads(threads)


def _record(
    run: Run, data: GroupedData, scores: dict[str, Tensor], history: list[float], *, parameters: int, seconds: float
) -> Record:
    record = make_record(
        run,
        data,
        version=METHODS[run.method].version,
        scores=scores,
        history=history,
        parameters=parameters,
        seconds=seconds,
    )
    if run.method.startswith("threshold"):
        record["loss"] = {}  # decisions have none
    return record | {"worst": {split: round(_worst(values, data, split), 6) for split, values in scores.items()}}


def _worst(scores: Tensor, data: GroupedData, split: str) -> float:
    """Smallest accuracy over the cells label x group that have an example."""
    index = data.part(split)
    counts = group_counts(
        scores.argmax(-1),
        data.label[index],
        group=data.group[index],
        classes=len(data.label_names),
        groups=len(data.group_names),
    )
    size = counts.sum(-1)
    return float((counts.diagonal(dim1=-2, dim2=-1) / size)[size > 0].min())


# --------------------------------------------------------------------------------------------------------------- heads
def _heads(unit: Sequence[Run], data: GroupedData) -> tuple[dict[str, Tensor], list[list[float]], list[int]]:
    """Scores ``[R, n, k]`` by split, validation accuracy by epoch, and numbers trained, of each run."""
    first = unit[0]
    splits = dict.fromkeys(("validation", first.evaluate))
    if first.method == "DFR":
        heads = [_refit(run, data) for run in unit]
        histories = [[] for _ in unit]
    else:
        heads, histories = _train(unit, data)
    with torch.no_grad():
        scores = {
            split: torch.stack([mlp(parameters, data.inputs[data.part(split)]) for parameters in heads])
            for split in splits
        }
    if first.method.startswith("threshold"):
        decided = [_thresholds(run, data, {split: scores[split][i] for split in splits}) for i, run in enumerate(unit)]
        scores = {split: torch.stack([one[split] for one in decided]) for split in splits}
    extra = 2 * len(data.group_names) if first.method.startswith("threshold") else 0  # two mixed thresholds per group
    return scores, histories, [count(parameters) + extra for parameters in heads]


def _train(unit: Sequence[Run], data: GroupedData) -> tuple[list[Parameters], list[list[float]]]:
    first = unit[0]
    sizes = (data.inputs.shape[1], *([HIDDEN] if first.method == "MLP" else []), len(data.label_names))
    start = stack([mlp_parameters(sizes, seed=run.seed) for run in unit])
    parameters, history = _descend(unit, data, start, rate=first.learning_rate)
    if first.method == "P1":  # ERM's head first, split, then trained as long again
        parameters, more = _descend(unit, data, _factored(parameters, data), rate=first.strength)
        history += more
    heads = [{name: value[index] for name, value in parameters.items()} for index in range(len(unit))]
    return heads, [[round(float(epoch[index]), 4) for epoch in history] for index in range(len(unit))]


def _descend(
    unit: Sequence[Run], data: GroupedData, start: Parameters, *, rate: float
) -> tuple[Parameters, list[Tensor]]:
    first, rows = unit[0], data.part("training")
    inputs, label = data.inputs[rows], data.label[rows]
    compared, objective = _objective(unit, data, rows)
    pool = _balanced(unit, compared) if first.method == "group DRO" else None
    held = data.part("validation")
    history: list[Tensor] = []

    def batch(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = index if pool is None else pool.gather(1, index)
        return inputs[index], label[index], compared[index]

    parameters = train(
        start,
        mlp,
        objective,
        batch=batch,
        n=len(rows),
        order_seeds=[run.order_seed for run in unit],
        optimiser_name="adam",
        learning_rate=rate,
        epochs=first.epochs,
        batch_size=first.batch_size,
        after_epoch=lambda now: history.append(
            (mlp(now, data.inputs[held]).argmax(-1) == data.label[held]).double().mean(-1)
        ),
    )
    return parameters, history


def _objective(unit: Sequence[Run], data: GroupedData, rows: Tensor) -> tuple[Tensor, Objective]:
    """The group of each training row as the method compares them, ``[n]``, and one loss per run."""
    method = unit[0].method
    label, attribute = data.label[rows], data.group[rows]
    strength = torch.tensor([run.strength for run in unit], dtype=data.inputs.dtype)
    by = {"variance by class": "class", "variance by attribute": "attribute", "DP": "attribute", "EO": "attribute"}
    compared, groups = penalty_groups(
        label,
        attribute,
        by=by.get(method, "class x attribute"),
        classes=len(data.label_names),
        attributes=len(data.group_names),
    )
    if method.startswith("variance"):
        return compared, lambda logits, label, group: variance_penalised_loss(
            logits, label, group=group, groups=groups, lam=strength
        )
    if CRITERIA.get(method) in PENALTIES:
        return compared, lambda logits, label, group: penalised_loss(
            logits, label, group=group, penalty=CRITERIA[method], lam=strength, groups=groups
        )
    if method == "group DRO":
        return compared, _GroupDRO(strength, groups)
    if method == "reweighting":
        weights = torch.zeros(groups, dtype=torch.float64)
        weights[compared] = balanced_weights(compared, groups=groups)
        return compared, lambda logits, label, group: (cross_entropy(logits, label) * weights[group]).mean(-1)
    return compared, lambda logits, label, group: cross_entropy(logits, label).mean(-1)


class _GroupDRO:
    """Group DRO with a step size per run; the weights of the groups are carried from step to step."""

    def __init__(self, step: Tensor, groups: int):
        self.step, self.weights = step[:, None], torch.full((len(step), groups), 1 / groups, dtype=torch.float64)

    def __call__(self, logits: Tensor, label: Tensor, group: Tensor) -> Tensor:
        loss, self.weights = group_dro_loss(cross_entropy(logits, label), group, weights=self.weights, step=self.step)
        return loss


def _balanced(unit: Sequence[Run], cell: Tensor) -> Tensor:
    """Rows drawn with replacement, every cell as often, ``[R, n]``; a run's rows depend on its seed alone."""
    weights = balanced_weights(cell, groups=int(cell.max()) + 1)
    return torch.stack(
        [
            torch.multinomial(
                weights, len(cell), replacement=True, generator=torch.Generator().manual_seed(run.order_seed)
            )
            for run in unit
        ]
    )


def _factored(start: Parameters, data: GroupedData) -> Parameters:
    """The heads ``start`` in two layers of rank 2 (arXiv 2403.00625, eqs. 2 to 4), equal weight for each group."""
    rows = data.part("training")
    inputs = data.inputs[rows]
    fisher = head_fisher(
        inputs, head(start, inputs), data.label[rows], group=data.group[rows], groups=len(data.group_names)
    )
    first, second = low_rank(start["W"], RANK, rows=neutralise(fisher))
    return {"A": first, "B": second, "b": start["b"]}


def _refit(run: Run, data: GroupedData) -> Parameters:
    """DFR: a head of its own from balanced validation rows alone; the frozen inputs are ERM's."""
    rows = data.part("validation")
    label, classes, attributes = data.label[rows], len(data.label_names), len(data.group_names)
    cell, cells = penalty_groups(
        label, data.group[rows], by="class x attribute", classes=classes, attributes=attributes
    )
    weight, bias, _ = retrain_last_layer(
        data.inputs[rows],
        label,
        group=cell,
        groups=cells,
        classes=classes,
        strengths=DFR_STRENGTHS,
        refits=10,
        seed=run.seed,
    )
    return {"W": weight.T, "b": bias[None]}


def _thresholds(run: Run, data: GroupedData, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Decisions as 0-1 scores ``[n, 2]``: per group a mixture of two thresholds on ERM's score, which equalises the
    criterion on the validation rows at the highest accuracy there (Hardt et al. 2016, by fairlearn)."""
    try:
        from fairlearn.postprocessing import ThresholdOptimizer
    except ImportError:
        raise FairtuningError("thresholds per group need fairlearn: pip install fairlearn") from None
    fitted = ThresholdOptimizer(
        estimator=_scores_as_estimator(),
        constraints=CRITERIA[run.method.split()[1]],
        prefit=True,
        predict_method="predict_proba",
    )
    score = {split: values.softmax(-1).numpy() for split, values in scores.items()}
    label, group = (
        {split: values[data.part(split)].numpy() for split in scores} for values in (data.label, data.group)
    )
    fitted.fit(score["validation"], label["validation"], sensitive_features=group["validation"])
    decided = {
        split: fitted.predict(score[split], sensitive_features=group[split], random_state=run.seed) for split in scores
    }
    return {
        split: torch.nn.functional.one_hot(torch.from_numpy(values).long(), 2).double()
        for split, values in decided.items()
    }


def _scores_as_estimator() -> object:
    """An estimator whose inputs are its probabilities: the head is trained already."""
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Scores(ClassifierMixin, BaseEstimator):
        classes_ = (0, 1)

        def fit(self, inputs: object, label: object) -> "Scores":
            return self

        def predict_proba(self, inputs: object) -> object:
            return inputs

        def __sklearn_is_fitted__(self) -> bool:
            return True

    return Scores()
