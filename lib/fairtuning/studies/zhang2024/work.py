"""What one unit of P1's runs does: pre-train, build the new head, fine-tune, predict. Called in a worker."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fairtuning import datasets
from fairtuning.factorization import low_rank, neutralise
from fairtuning.fisher import head_fisher
from fairtuning.losses import PENALTIES, cross_entropy
from fairtuning.metrics import demographic_parity_difference, equalized_odds_difference_sum, group_counts
from fairtuning.networks import Parameters, count, features, head, mlp, mlp_parameters, stack
from fairtuning.plan import task_of
from fairtuning.records import examples_line, make_record
from fairtuning.runs import Record, environment
from fairtuning.studies.zhang2024 import attributes
from fairtuning.studies.zhang2024.configuration import VERSIONS, Pretraining, Run, where
from fairtuning.training import Batch, train, train_to_convergence
from fairtuning.vision import features as frozen_features

_data: dict[tuple, datasets.GroupedData] = {}
_pretrained: dict[tuple, tuple[Parameters, list[float], float]] = {}  # _source -> weights, history, seconds
RESAMPLES = 200  # of the Fisher profiles
GAPS = {"equalized_odds": equalized_odds_difference_sum, "demographic_parity": demographic_parity_difference}
PRECISION = "bfloat16"  # in which frozen features are computed


def work(unit: Sequence[Run]) -> list[Record]:
    """The records (and the lines they refer to) of runs that ``units`` put together."""
    first = unit[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(first.threads)
    try:
        data = _load(first)
        sources = [_pretrain(unit, data)[run_key] for run_key in map(_source, unit)]
        parameters = stack([weights for weights, _, _ in sources])
        histories = [history for _, history, _ in sources]
        before, starts = time.perf_counter(), []
        if first.method != "pre-trained":
            starts, parameters, histories = _fine_tune(unit, parameters, data)
        share = (time.perf_counter() - before) / len(unit)
        line = attributes.examples_line if first.label == "all" else examples_line
        lines = [environment()]
        lines += [line(data, part, task_of(first), split_seed=first.split_seed) for part in data.split_names]
        for index, run in enumerate(unit):
            one = {name: value[index] for name, value in parameters.items()}
            record = _record(run, one, histories[index], data, seconds=share + sources[index][2])
            if first.label == "all" and first.method == "factored head" and run.evaluate == "test":
                start = {name: value[index] for name, value in starts.items()}
                record["start"] = attributes.start_of(sources[index][0], start, data, kind=run.fisher)
            lines.append(record)
        return lines
    finally:
        torch.set_num_threads(threads)


def _load(run: Run) -> datasets.GroupedData:
    key = where(run)
    if key not in _data:
        options = {} if run.data == "celeba" else {"split_seed": run.split_seed}  # which has an official split
        if run.data == "adult":
            options["encoding"] = run.encoding
        data = _read_images(run, options) if run.label else datasets.load(run.data, **options)
        inputs = data.inputs.to(run.device, getattr(torch, run.precision))
        label, group, split = (values.to(run.device) for values in (data.label, data.group, data.split))
        _data[key] = replace(data, inputs=inputs, label=label, group=group, split=split)
    return _data[key]


def _read_images(run: Run, options: dict) -> datasets.GroupedData:
    """The frozen features of a backbone, as they are, in the place of images."""
    label = {} if run.label == "all" else {"label": run.label}
    data = datasets.load(run.data, group=run.attribute, size=run.size, edition=run.edition, **label, **options)
    found = frozen_features.load(data, run.backbone, weights=run.weights, precision=PRECISION, device=run.device)
    data = replace(data, inputs=found)
    return attributes.read(data) if run.label == "all" else data


def _part(data: datasets.GroupedData, split: str) -> Batch:
    index = data.part(split)
    return data.inputs[index], data.label[index], data.group[index]


def _objective(penalties: Sequence[Run | Pretraining]):
    """(1 - intensity) CE + intensity penalty per run (our reading); form "additive": CE + intensity penalty."""
    intensity = torch.tensor([one.intensity for one in penalties], dtype=torch.float64)
    task = 1 - intensity * torch.tensor([float(one.form == "convex") for one in penalties], dtype=torch.float64)
    of = {
        name: torch.tensor([float(one.penalty == name) for one in penalties], dtype=torch.float64) for name in PENALTIES
    }

    def objective(logits: Tensor, label: Tensor, group: Tensor) -> Tensor:
        loss = _task_loss(logits, label, group)
        if not intensity.any():
            return loss
        penalty = sum(on.to(loss) * PENALTIES[name](logits, label, group) for name, on in of.items() if on.any())
        return task.to(loss) * loss + intensity.to(loss) * penalty

    return objective


def _task_loss(logits: Tensor, label: Tensor, group: Tensor) -> Tensor:
    if label.ndim == logits.ndim:  # a label for each output
        return attributes.loss(logits, label)
    return cross_entropy(logits, label).mean(-1)


class _Accuracy:
    """Validation accuracy of every run after every epoch."""

    def __init__(self, forward, inputs: Tensor, label: Tensor):
        self.forward, self.inputs, self.label, self.history = forward, inputs, label, []

    def __call__(self, parameters: Parameters) -> None:
        logits = self.forward(parameters, self.inputs)
        right = (logits > 0 if self.label.ndim == 2 else logits.argmax(-1)) == self.label
        self.history.append(right.double().flatten(1).mean(-1))

    def of(self, run: int) -> list[float]:
        return [round(float(epoch[run]), 4) for epoch in self.history]


# ------------------------------------------------------------------------------------------------------- pre-training
def _source(run: Run) -> tuple:
    return (*where(run), run.pretraining, run.seed, run.order_seed)


def _pretrain(unit: Sequence[Run], data: datasets.GroupedData) -> dict[tuple, tuple[Parameters, list[float], float]]:
    """The pre-trained network of every run, trained once per process; those of one rate and shape train together.

    On images it is a linear probe: a head on frozen features, from the training part that is fine-tuned on (our
    reading: the paper does not say where the weights of the new task's head come from).

    With each goes its validation accuracy by epoch and its share of the seconds that this took.
    """
    todo = {_source(run): run for run in unit if _source(run) not in _pretrained}
    alike: dict[tuple, list[Run]] = {}
    for run in todo.values():
        how: Pretraining = run.pretraining
        alike.setdefault((how.hidden, how.learning_rate, how.batch_size, how.epochs), []).append(run)
    inputs, label, group = _part(data, "pretraining" if "pretraining" in data.split_names else "training")
    outputs = label.shape[1] if label.ndim == 2 else len(data.label_names)
    for (hidden, learning_rate, batch_size, epochs), runs in alike.items():
        sizes = (inputs.shape[1], *hidden, outputs)
        start = stack([mlp_parameters(sizes, seed=run.seed, dtype=inputs.dtype) for run in runs])
        accuracy = _Accuracy(mlp, *_part(data, "validation")[:2])
        before = time.perf_counter()
        weights = train(
            {name: value.to(inputs.device) for name, value in start.items()},
            mlp,
            _objective([run.pretraining for run in runs]),
            batch=lambda index: (inputs[index], label[index], group[index]),
            n=len(inputs),
            order_seeds=[run.order_seed for run in runs],
            optimiser_name="adam",
            learning_rate=learning_rate,
            epochs=epochs,
            batch_size=batch_size,
            after_epoch=accuracy,
        )
        share = (time.perf_counter() - before) / len(runs)
        for index, run in enumerate(runs):
            one = {name: value[index] for name, value in weights.items()}
            _pretrained[_source(run)] = (one, accuracy.of(index), share)
    return _pretrained


# -------------------------------------------------------------------------------------------------------- fine-tuning
def _fine_tune(
    unit: Sequence[Run], network: Parameters, data: datasets.GroupedData
) -> tuple[Parameters, Parameters, list]:
    """Algorithm 1 of the paper and its baselines, R runs at once, from pre-trained ``network`` (run axis first).

    What was trained from, all parameters afterwards, and the histories.
    """
    first = unit[0]
    inputs, label, group = _part(data, "training")
    validation, validation_label, _ = _part(data, "validation")
    if first.method == "network":
        start, forward, frozen, run = network, mlp, {}, None
    else:  # everything but the head is frozen, so what it gives is computed once
        frozen = {name: value for name, value in network.items() if name not in ("W", "b")}
        inputs, validation = features(frozen, inputs), features(frozen, validation)  # [R, n, h]; [n, d] of images
        start = {"W": network["W"], "b": network["b"]}
        forward, run = head, torch.arange(len(unit))[:, None] if inputs.ndim == 3 else None
        if first.method == "factored head":
            start = factored(unit, start, inputs, label, group)
    objective = _objective(unit)
    accuracy = _Accuracy(forward, validation, validation_label)
    if first.optimiser == "lbfgs":
        alone = [
            train_to_convergence(
                {name: value[index] for name, value in start.items()},
                forward,
                _task_loss,
                data=(_own(inputs, index), label, group),
            )
            for index in range(len(unit))
        ]
        trained = stack(alone)
        accuracy(trained)
    else:
        trained = train(
            start,
            forward,
            objective,
            batch=lambda index: (inputs[index] if run is None else inputs[run, index], label[index], group[index]),
            n=len(label),
            order_seeds=[run.order_seed for run in unit],
            optimiser_name=first.optimiser,
            learning_rate=first.learning_rate,
            epochs=first.epochs,
            batch_size=first.batch_size,
            after_epoch=accuracy,
        )
    return start, frozen | trained, [accuracy.of(index) for index in range(len(unit))]


def _own(inputs: Tensor, run: int) -> Tensor:
    """One run's inputs: its own ``[R, n, h]``, or those that all runs share ``[n, d]``."""
    return inputs[run] if inputs.ndim == 3 else inputs


def factored(unit: Sequence[Run], start: Parameters, inputs: Tensor, label: Tensor, group: Tensor) -> Parameters:
    """The head's two layers, eqs. 2 to 4: group-wise Fisher on the new task, neutralised, inside a weighted SVD."""
    logits = head(start, inputs)
    sizes = torch.bincount(group, minlength=2)
    fisher_of = attributes.head_fisher if label.ndim == 2 else head_fisher
    parts = []
    for index, run in enumerate(unit):
        weight, rows, own = start["W"][index], None, _own(inputs, index)
        if run.weighting != "none":
            fisher = fisher_of(own, logits[index], label, group=group, groups=2, kind=run.fisher)
            if run.heads == "by group":
                one = {name: value[index] for name, value in start.items()}
                fisher = own_head_fisher(one, own, label, group=group, kind=run.fisher)
            rows = neutralise(
                fisher,
                alpha=run.alpha,
                variant=run.weighting,
                sizes=sizes,
                generator=torch.Generator().manual_seed(run.seed),
            )
        first, second = low_rank(weight, run.rank, rows=rows)
        parts.append({"A": first, "B": second, "b": start["b"][index]})
    return stack(parts)


def own_head_fisher(start: Parameters, inputs: Tensor, label: Tensor, *, group: Tensor, kind: str) -> Tensor:
    """``[2, h, k]``: each group's Fisher at a head that was trained to convergence on that group alone.

    The text of the paper speaks of the model trained on a group; its Algorithm 1 trains none. This is the variant.
    """
    found = []
    for member in (group == 0, group == 1):
        own = train_to_convergence(
            start,
            head,
            _task_loss,
            data=(inputs[member], label[member], group[member]),
        )
        logits = head(own, inputs[member])
        alone = torch.zeros_like(label[member])
        found.append(head_fisher(inputs[member], logits, label[member], group=alone, groups=1, kind=kind)[0])
    return torch.stack(found)


# ----------------------------------------------------------------------------------------------------------- records
def _record(
    run: Run, parameters: Parameters, history: list[float], data: datasets.GroupedData, *, seconds: float
) -> Record:
    with torch.no_grad():
        record = (attributes.make_record if run.label == "all" else make_record)(
            run,
            data,
            version=VERSIONS[run.method],
            scores={split: mlp(parameters, _part(data, split)[0]) for split in ("validation", run.evaluate)},
            history=history,
            parameters=_trainable(run, parameters),
            seconds=seconds,
        )
        if run.pretraining.penalty != "none" and run.evaluate == "validation":  # for the rule of fair pre-training
            record["gap"] = {run.evaluate: _gap(mlp(parameters, _part(data, run.evaluate)[0]), data, run)}
        if run.label:
            digest = frozen_features.weights_digest(run.backbone, run.weights)
            record["backbone"] = {"name": run.backbone, "weights": digest, "precision": PRECISION}
        if run.keep == "fisher":
            record["fisher"] = fisher_profiles(parameters, data, kind=run.fisher)
        if run.keep == "representations":
            record["representations"] = representations(parameters, data)
        return record


def _gap(logits: Tensor, data: datasets.GroupedData, run: Run) -> float:
    """The difference between the groups that the penalty of a run's pre-training is about, of its predictions."""
    _, label, group = _part(data, run.evaluate)
    counts = group_counts(logits.argmax(-1), label, group=group, classes=len(data.label_names), groups=2)
    return round(float(GAPS[run.pretraining.penalty](counts)), 6)


def _trainable(run: Run, parameters: Parameters) -> int:
    if run.method in ("head", "factored head"):
        return count({name: value for name, value in parameters.items() if name in ("A", "B", "W", "b")})
    return count(parameters)


def fisher_profiles(parameters: Parameters, data: datasets.GroupedData, *, kind: str) -> Record:
    """Fig. 3: row scores per group on the new task, and how far the groups' normalised profiles lie apart.

    ``distance`` is the total variation between the profiles (0 to 1); ``permuted`` its mean when group membership is
    shuffled; ``resampled`` the distance under bootstrap resampling of the examples, the same resamples for every seed.
    """
    inputs, label, group = _part(data, "training")
    z = features(parameters, inputs)
    logits = head(parameters, z)
    fisher = head_fisher(z, logits, label, group=group, groups=2, kind=kind).sum(-1)  # [2, h]
    p = logits.softmax(-1)
    square = (
        (p - torch.nn.functional.one_hot(label, p.shape[-1]).to(p)).square() if kind == "empirical" else p * (1 - p)
    )
    example = z.square() * square.sum(-1, keepdim=True)  # [n, h], each example's part in the row scores

    def distance(weights: Tensor, member: Tensor) -> Tensor:
        """weights [B, n], member [B or 1, n] of group 1 -> [B]"""
        profiles = [(weights * m) @ example for m in (1 - member, member)]
        first, second = (profile / profile.sum(-1, keepdim=True) for profile in profiles)
        return (first - second).abs().sum(-1) / 2

    generator = torch.Generator().manual_seed(0)
    member = group.to(z)[None]
    ones = torch.ones_like(member)
    shuffled = torch.stack([group[torch.randperm(len(group), generator=generator)] for _ in range(RESAMPLES)]).to(z)
    draws = torch.stack(
        [
            torch.randint(len(group), (len(group),), generator=generator).bincount(minlength=len(group))
            for _ in range(RESAMPLES)
        ]
    ).to(z)
    return {
        "rows": [[float(f"{value:.5g}") for value in profile] for profile in fisher.tolist()],
        "distance": round(float(distance(ones, member)), 6),
        "permuted": round(float(distance(ones.expand(RESAMPLES, -1), shuffled).mean()), 6),
        "resampled": [round(value, 5) for value in distance(draws, member).tolist()],
    }


def representations(parameters: Parameters, data: datasets.GroupedData, *, most: int = 500) -> Record:
    """Fig. 1: the first two principal components of what the head sees, for test examples predicted positive."""
    inputs, _, group = _part(data, "test")
    z = features(parameters, inputs)
    positive = head(parameters, z).argmax(-1) == 1
    z, group = z[positive], group[positive]
    centred = z - z.mean(0)
    _, spectrum, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions * directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()  # a fixed sign
    points = centred @ directions[:2].T
    return {
        "explained": [round(value, 4) for value in (spectrum.square() / spectrum.square().sum())[:2].tolist()],
        "points": [[round(value, 3) for value in point] for point in points[:most].tolist()],
        "group": group[:most].tolist(),
        "positive": int(positive.sum()),
    }
