"""What one of P2's runs does: adapters on a pretrained transformer (or all of it), trained, evaluated. In a worker."""

import math
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from importlib import metadata

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fairtuning import adapters, backbones, datasets, prefix
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
from fairtuning.records import examples_line, make_record
from fairtuning.runs import Record, RunError, environment
from fairtuning.studies.sukumaran2024.configuration import STARTS, Run, task_of, version_of
from fairtuning.training import Batch, train

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
    network = Network(run, data)
    training = Training(network, run, data)
    try:
        parameters = training.train()
        scores = {"validation": training.kept.scores}
        with torch.no_grad():
            if run.last_layer == "retrained":
                parameters = network.retrain_last_layer(parameters, data, seed=run.seed)
                scores = {"validation": network.scores(parameters, data, "validation")}
            if run.evaluate not in scores:
                scores[run.evaluate] = network.scores(parameters, data, run.evaluate)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if "memory" not in str(error):
            raise
        raise RunError(f"out of memory at batch_size {run.batch_size}, size {run.size}; lower one of them") from None
    cells = {split: Cells.of(values, data, split) for split, values in scores.items()}
    record = make_record(
        run,
        data,
        version=version_of(run),
        scores=scores,
        history=[round(epoch.accuracy, 4) for epoch in training.curve],
        parameters=count(parameters),
        seconds=time.perf_counter() - before + network.seconds,
    )
    return record | {
        "worst": {split: round(found.worst, 6) for split, found in cells.items()},
        "cell_loss": {split: found.cell_loss for split, found in cells.items()},
        "curve": {
            "kept": training.curve.index(training.kept) + 1,
            "worst": [round(epoch.worst, 4) for epoch in training.curve],
            "loss": [_five_digits(epoch.loss) for epoch in training.curve],
        },
        "penalty": {"batch_sizes": training.batch_sizes, "and_signal": training.penalties},
        "backbone": {
            "name": network.backbone.name,
            "weights": network.backbone.digest,
            "attention": network.attention,
            "packages": {name: metadata.version(name) for name in ("timm", "peft")},
        },
    }


# ----------------------------------------------------------------------------------------------------------- networks
class Network:
    """A backbone with what is trained of it as a dictionary, and its logits as a function of that dictionary.

    It stays in evaluation mode: no dropout, and where a backbone has batch normalisation, its statistics stay.
    """

    def __init__(self, run: Run, data: datasets.GroupedData):
        classes, size, self.seconds = len(data.label_names), images.parse_size(run.size), 0.0
        if run.backbone == "small":
            self.backbone, self.seconds = small(classes=classes, seed=run.seed)
        else:
            self.backbone = backbones.load(run.backbone, classes=classes, size=size, weights=run.weights, seed=run.seed)
        model = self.backbone.model
        kind, _, start = run.method.partition("-")
        if kind == "lora":
            given = importance(self.backbone, run, data) if STARTS.get(start) else start or "zero"
            model = adapters.add(model, rank=run.rank, alpha=run.alpha, layers=run.layers, start=given, seed=run.seed)
        self.attention = "fused"
        if run.device == "cpu":
            model, self.attention = backbones.write_out_attention(model), "written out"
        self.module = _Prefixed(model).to(run.device).eval()
        self.device, self.precision = torch.device(run.device), getattr(torch, run.precision)
        self.trained = {name: value for name, value in self.module.named_parameters() if value.requires_grad}

    def prepare(self, pixels: Tensor) -> Tensor:
        return self.backbone.prepare(pixels.to(self.device))

    def forward(self, parameters: Parameters, inputs: Tensor) -> Tensor:
        """Logits ``[1, n, k]`` float32 of inputs ``[1, n, 3, height, width]``: the run axis of one run."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            return functional_call(self.module, parameters, (inputs[0],)).float()[None]

    def scores(self, parameters: Parameters, data: datasets.GroupedData, split: str) -> Tensor:
        """Logits ``[n, k]`` of a split, on the CPU."""
        parts = [
            self.forward(parameters, self.prepare(data.inputs[index])[None])[0].cpu()
            for index in data.part(split).split(EVALUATED)
        ]
        return torch.cat(parts)

    def retrain_last_layer(self, parameters: Parameters, data: datasets.GroupedData, *, seed: int) -> Parameters:
        """The same with a head fitted to balanced cells of the validation part (``last_layer``)."""
        names = [name for name in parameters if name.endswith(("head.modules_to_save.default.weight", "head.weight"))]
        weight = parameters[names[0]]
        identity = {names[0]: torch.eye(weight.shape[1], device=self.device)}
        zero = {names[0].replace("weight", "bias"): torch.zeros(weight.shape[1], device=self.device)}
        features = self.scores(parameters | identity | zero, data, "validation")
        index = data.part("validation")
        label, attribute = data.label[index], data.group[index]
        classes = len(data.label_names)
        group, groups = penalty_groups(
            label, attribute, by="class x attribute", classes=classes, attributes=len(data.group_names)
        )
        new, bias, _ = retrain_last_layer(features, label, group=group, groups=groups, classes=classes, seed=seed)
        fitted = {names[0]: new, names[0].replace("weight", "bias"): bias}
        return parameters | {name: value.float().to(self.device) for name, value in fitted.items()}


class _Prefixed(nn.Module):
    """The same model, its last block computed for the class token alone where that gives the same."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return prefix.forward(self.model, inputs)


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


def small(*, classes: int, seed: int) -> tuple[backbones.Backbone, float]:
    """A transformer for the classroom (8 x 8 images, patches of 2, 4 blocks of width 48), pre-trained on the spot.

    It has learnt the ten digits from images of `datasets.parity` that lie on either ground, so no shortcut. Its head is
    new, drawn by ``seed``. With it the seconds that pre-training took, once per process.
    """
    model, seconds = _small()
    model = deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.reset_classifier(classes)
    half = (0.5, 0.5, 0.5)
    return backbones.Backbone("small", model, (8, 8), (8, 8), half, half, "pre-trained on the spot"), seconds


@cache
def _small() -> tuple[nn.Module, float]:
    from timm.models.vision_transformer import VisionTransformer

    before = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(
            img_size=8, patch_size=2, embed_dim=48, depth=4, num_heads=4, mlp_ratio=2, num_classes=10
        )
    # Training multiplies what rounds differently on another processor into another network: it starts from numbers that
    # are the same everywhere, in float64.
    model = backbones.write_out_attention(model.double().eval())
    with torch.no_grad():
        for value in model.parameters():
            value.copy_((value * 2**16).round() / 2**16)
    data = datasets.load("parity", label="digit")
    rows = data.part("pretraining")
    inputs = (data.inputs[rows].double() - 127.5) / 127.5
    trained = train(
        dict(model.named_parameters()),
        lambda parameters, batch: functional_call(model, parameters, (batch[0],))[None],
        lambda logits, label, group: cross_entropy(logits, label).mean(-1),
        batch=lambda index: (inputs[index], data.label[rows][index], data.group[rows][index]),
        n=len(rows),
        order_seeds=[0],
        optimiser_name="adam",
        learning_rate=0.001,
        epochs=20,
        batch_size=32,
    )
    model.load_state_dict(trained)
    return model.float(), time.perf_counter() - before


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
        """Of ``index [1, m]``; its group is the one whose losses are compared."""
        if self.run.objective in ("dro", "balanced"):  # as many examples, drawn so that the groups are balanced
            index = torch.multinomial(self.weights, index.numel(), replacement=True, generator=self.draw)[None]
        inputs = self.network.prepare(self.data.inputs[self.rows[index[0]]])[None]
        index = index.to(self.network.device)
        return inputs, self.label[index], self.group[index]

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
        self.curve.append(Cells.of(self.network.scores(parameters, self.data, "validation"), self.data, "validation"))
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
            self.network.forward,
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
