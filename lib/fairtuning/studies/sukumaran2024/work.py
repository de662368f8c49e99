"""What one of P2's runs does: adapters on a pretrained transformer (or all of it), trained, evaluated. In a worker."""

import math
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from importlib import metadata

import torch
from torch import Tensor

from fairtuning import datasets
from fairtuning.datasets import images
from fairtuning.factorization import neutralise
from fairtuning.fisher import group_fisher
from fairtuning.last_layer import retrain_last_layer
from fairtuning.losses import (
    balanced_weights,
    cross_entropy,
    group_dro_loss,
    penalty_and_signal,
    penalty_groups,
    smoothed_group_loss_variance,
    variance_penalised_loss,
)
from fairtuning.metrics import group_counts
from fairtuning.networks import Parameters, count, head
from fairtuning.plan import task_of
from fairtuning.records import examples_line, make_record
from fairtuning.runs import Record, RunError, environment
from fairtuning.studies.sukumaran2024.configuration import STARTS, STUDY, Run
from fairtuning.training import Batch, train
from fairtuning.vision import adapters, backbones, small
from fairtuning.vision.network import Network

EVALUATED = 128  # images at a time
BATCHES = (1 / 4, 1, 4, 16)  # of the run's batch size: in batches of which the penalty's noise is measured
INFORMING = 1024  # training images from which the information of the inner layers is computed


def work(unit: Sequence[Run]) -> list[Record]:
    """The records (and the lines they refer to) of the runs of a unit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(unit[0].threads)
    try:
        lines = [environment(unit[0].device)]
        for run in unit:
            data = _load(run.data, run.size, run.edition, run.label, run.attribute)
            lines += [examples_line(data, split, task_of(run)) for split in ("validation", "test")]
            lines.append(_record(run, data))
        return lines
    finally:
        torch.set_num_threads(threads)


@cache
def _load(name: str, size: int | str, edition: str, label: str = "", attribute: str = "") -> datasets.GroupedData:
    if datasets.source(name).needs == "nothing":
        return datasets.load(name)
    task = {"label": label, "group": attribute} if label else {}
    return datasets.load(name, size=size, edition=edition, **task)


def _record(run: Run, data: datasets.GroupedData) -> Record:
    before = time.perf_counter()
    network = network_of(run, data)
    training = Training(network, run, data)
    try:
        parameters = training.train()
        found = {"validation": training.kept.scores}
        if run.last_layer == "retrained":
            parameters = with_new_head(network, parameters, data, seed=run.seed)
            found = {"validation": scores(network, parameters, data, "validation")}
        if run.evaluate not in found:
            found[run.evaluate] = scores(network, parameters, data, run.evaluate)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if "memory" not in str(error):
            raise
        raise RunError(f"out of memory at batch_size {run.batch_size}, size {run.size}; lower one of them") from None
    cells = {split: Cells.of(values, data, split) for split, values in found.items()}
    record = make_record(
        run,
        data,
        version=STUDY.version(run),
        scores=found,
        history=[round(epoch.accuracy, 4) for epoch in training.curve],
        parameters=count(parameters),
        seconds=time.perf_counter() - before + (small.pretrained()[1] if run.backbone == "small" else 0.0),
    )
    return record | {
        "worst": {split: round(one.worst, 6) for split, one in cells.items()},
        "cell_loss": {split: one.cell_loss for split, one in cells.items()},
        "curve": {
            "kept": training.curve.index(training.kept) + 1,
            "worst": [round(epoch.worst, 4) for epoch in training.curve],
            "loss": [_five_digits(epoch.loss) for epoch in training.curve],
        },
        "penalty": {"batch_sizes": training.batch_sizes, "and_signal": training.penalties},
        "backbone": {
            "name": network.backbone.name,
            "weights": network.backbone.digest,
            "attention": "written out" if run.device == "cpu" else "fused",
            "packages": {name: metadata.version(name) for name in ("timm", "peft")},
        },
    }


# ----------------------------------------------------------------------------------------------------------- networks
def network_of(run: Run, data: datasets.GroupedData) -> Network:
    """The backbone of a run with what is trained of it: all, or adapters and the classifier."""
    classes, size = len(data.label_names), images.parse_size(run.size)
    if run.backbone == "small":
        backbone = small.load(classes=classes, seed=run.seed)
    else:
        backbone = backbones.load(run.backbone, classes=classes, size=size, weights=run.weights, seed=run.seed)
    kind, _, start = run.method.partition("-")
    given = importance(backbone, run, data) if STARTS.get(start) else start or "zero"
    if run.device == "cpu":
        backbones.write_out_attention(backbone.model)
    how = {name: getattr(run, name) for name in ("alpha", "layers", "seed", "precision", "device")}
    return Network(backbone, data.inputs, rank=run.rank if kind == "lora" else None, start=given, **how)


def scores(network: Network, parameters: Parameters, data: datasets.GroupedData, split: str) -> Tensor:
    """Logits ``[n, k]`` of a split, on the CPU."""
    return network.forward_all(parameters, data.part(split), at_once=EVALUATED).cpu()


def with_new_head(network: Network, parameters: Parameters, data: datasets.GroupedData, *, seed: int) -> Parameters:
    """The same with a head fitted to balanced cells of the validation part (``last_layer``)."""
    name = next(name for name in parameters if name.endswith(("head.modules_to_save.weight", "head.weight")))
    bias_name, width = name.replace("weight", "bias"), parameters[name].shape[1]
    as_they_are = {name: torch.eye(width, device=network.device), bias_name: torch.zeros(width, device=network.device)}
    features = scores(network, parameters | as_they_are, data, "validation")
    index, classes = data.part("validation"), len(data.label_names)
    label, attribute = data.label[index], data.group[index]
    group, groups = penalty_groups(
        label, attribute, by="class x attribute", classes=classes, attributes=len(data.group_names)
    )
    weight, bias, _ = retrain_last_layer(features, label, group=group, groups=groups, classes=classes, seed=seed)
    return parameters | {name: weight.float().to(network.device), bias_name: bias.float().to(network.device)}


def importance(backbone: backbones.Backbone, run: Run, data: datasets.GroupedData) -> dict[str, Tensor]:
    """Importance of the input features ``[in]`` of every layer to adapt, by its name, under ``run``'s start.

    The information of each group (of the attribute) at the pre-trained backbone, on the same INFORMING images in every
    run. The backbone has no head for the task: one is fitted to their features, and serves this purpose alone.
    """
    model = deepcopy(backbone.model).to(run.device)
    index = data.part("training")
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))[:INFORMING]]
    inputs, label, group = backbone.prepare(data.inputs[index]), data.label[index], data.group[index]
    with torch.no_grad():
        parts = [model.forward_features(part.to(run.device)) for part in inputs.split(EVALUATED)]
        features = torch.cat([model.forward_head(part, pre_logits=True).cpu() for part in parts])
    fitted = _fitted_head(features, label, classes=len(data.label_names))
    for name, value in fitted.items():
        getattr(model.get_classifier(), name).data.copy_(value)
    groups, names = len(data.group_names), list(adapters.adapted(model, layers=run.layers))
    fisher = group_fisher(model, inputs, label, group=group, groups=groups, layers=names)
    generator = torch.Generator().manual_seed(run.seed)
    variant, sizes = STARTS[run.method.partition("-")[2]], group.bincount(minlength=groups)
    return {
        name: neutralise(found.mT.cpu(), variant=variant, sizes=sizes, generator=generator)
        for name, found in fisher.items()
    }


def _fitted_head(features: Tensor, label: Tensor, *, classes: int) -> Parameters:
    """A linear head after 20 epochs of Adam on ``features [n, d]``, from zero: weight ``[classes, d]`` and bias."""
    fitted = train(
        {"W": features.new_zeros(1, features.shape[1], classes), "b": features.new_zeros(1, 1, classes)},
        head,
        lambda logits, label, group: cross_entropy(logits, label).mean(-1),
        batch=lambda index: (features[index], label[index], label[index]),
        n=len(label),
        order_seeds=[0],
        optimiser_name="adam",
        learning_rate=0.01,
        epochs=20,
        batch_size=128,
    )
    return {"weight": fitted["W"][0].mT, "bias": fitted["b"][0, 0]}


# ----------------------------------------------------------------------------------------------------------- training
class Training:
    """Minimises eq. 1, and evaluates on the validation part after every epoch."""

    def __init__(self, network: Network, run: Run, data: datasets.GroupedData):
        self.network, self.run, self.data = network, run, data
        self.rows = data.part("training")
        label, attribute = data.label[self.rows], data.group[self.rows]
        if len(label.unique()) < 2:
            only = data.label_names[label[0]]
            raise RunError(f"{data.name}: every training example has label {only!r}; allowed: two labels or more")
        group, self.groups = penalty_groups(
            label, attribute, by=run.groups, classes=len(data.label_names), attributes=len(data.group_names)
        )
        self.label, self.group = label.to(network.device), group.to(network.device)
        self.weights = balanced_weights(group, groups=self.groups)
        self.draw = torch.Generator().manual_seed(run.order_seed)
        self.dro_weights = torch.full((self.groups,), 1 / self.groups, device=network.device)
        self.average = torch.full((self.groups,), torch.nan, device=network.device)
        self.curve: list[Cells] = []
        self.seen: list[tuple[Tensor, Tensor]] = []  # losses and groups of an epoch's batches
        self.batch_sizes = [max(2, round(run.batch_size * factor)) for factor in BATCHES]
        self.penalties: list[list[tuple[float, float]]] = []  # after each epoch: by batch size, penalty_and_signal
        self.best: Parameters = network.trained

    def batch(self, index: Tensor) -> Batch:
        """Of ``index [1, m]``: the images' rows, label, and the group whose losses are compared."""
        if self.run.objective in ("dro", "balanced"):  # as many examples, drawn so that the groups are balanced
            index = torch.multinomial(self.weights, index.numel(), replacement=True, generator=self.draw)[None]
        rows, index = self.rows[index], index.to(self.network.device)
        return rows, self.label[index], self.group[index]

    def forward(self, parameters: Parameters, rows: Tensor) -> Tensor:
        """Logits ``[1, m, k]`` of the images ``rows [1, m]``: the run axis of one run."""
        return self.network.forward(parameters, rows[0])[None]

    def objective(self, logits: Tensor, label: Tensor, group: Tensor) -> Tensor:
        """``[1]``, of logits ``[1, m, k]``."""
        kind = self.run.objective
        self.seen.append((cross_entropy(logits.detach(), label)[0], group[0]))
        if kind == "smoothed":
            loss = cross_entropy(logits, label)
            spread, self.average = smoothed_group_loss_variance(loss, group, average=self.average)
            return loss.mean(-1) + self.run.penalty * spread
        if kind == "dro":
            loss, self.dro_weights = group_dro_loss(cross_entropy(logits, label), group, weights=self.dro_weights)
            return loss
        if kind == "balanced":
            return cross_entropy(logits, label).mean(-1)
        return variance_penalised_loss(logits, label, group=group, groups=self.groups, lam=self.run.penalty)

    def after_epoch(self, parameters: Parameters) -> None:
        loss, group = (torch.cat(parts).cpu() for parts in zip(*self.seen, strict=True))
        self.seen.clear()
        found = [penalty_and_signal(loss, group, groups=self.groups, batch_size=size) for size in self.batch_sizes]
        self.penalties.append([tuple(_five_digits(value) for value in pair) for pair in found])
        logits = scores(self.network, parameters, self.data, "validation")
        self.curve.append(Cells.of(logits, self.data, "validation"))
        if self.kept is self.curve[-1]:
            self.best = {name: value.detach().clone() for name, value in parameters.items()}

    @property
    def kept(self) -> "Cells":
        """The epoch whose parameters are kept."""
        if self.run.keep == "last":
            return self.curve[-1]
        return max(self.curve, key=lambda epoch: epoch.accuracy)  # the first of equals

    def train(self) -> Parameters:
        train(
            self.network.trained,
            self.forward,
            self.objective,
            batch=self.batch,
            n=len(self.rows),
            order_seeds=[self.run.order_seed],
            optimiser_name="adamw",
            learning_rate=self.run.learning_rate,
            epochs=self.run.epochs,
            batch_size=self.run.batch_size,
            weight_decay=self.run.weight_decay,
            schedule=self.run.schedule,
            after_epoch=self.after_epoch,
        )
        return self.best


def _five_digits(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.5g}")


@dataclass(frozen=True, eq=False)
class Cells:
    """How a classifier does on one split and on its cells group x class."""

    scores: Tensor  # [n, k]
    accuracy: float
    loss: float  # mean, and by cell:
    cell_loss: list[list[float | None]]  # [groups][classes], None for an empty cell
    worst: float  # smallest accuracy over the cells that have an example

    @classmethod
    def of(cls, scores: Tensor, data: datasets.GroupedData, split: str) -> "Cells":
        index = data.part(split)
        label, group = data.label[index], data.group[index]
        classes, groups = len(data.label_names), len(data.group_names)
        loss = cross_entropy(scores, label).double()
        counts = group_counts(scores.argmax(-1), label, group=group, classes=classes, groups=groups)
        size, right = counts.sum(-1), counts.diagonal(dim1=-2, dim2=-1)
        total = torch.zeros(groups * classes, dtype=torch.float64).scatter_add(0, group * classes + label, loss)
        means = (total.reshape(groups, classes) / size).tolist()
        return cls(
            scores=scores,
            accuracy=float(right.sum() / size.sum()),
            loss=float(loss.mean()),
            cell_loss=[[None if math.isnan(value) else float(f"{value:.6g}") for value in row] for row in means],
            worst=float((right / size)[size > 0].min()),
        )
