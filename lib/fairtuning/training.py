"""The one training loop. Parameters may carry a leading run axis: R runs then train at once, each as if alone."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fairtuning.networks import Parameters

Batch = tuple[Tensor, Tensor, Tensor]  # inputs, label, group


def optimiser(
    name: str, parameters: Parameters, *, learning_rate: float, momentum: float = 0.9, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Adam, AdamW (the only one with ``weight_decay``), or SGD with momentum.

    They act entry by entry, so stacked runs never mix.
    """
    values = list(parameters.values())
    if name == "adam":
        return torch.optim.Adam(values, lr=learning_rate, fused=True)
    if name == "adamw":
        return torch.optim.AdamW(values, lr=learning_rate, weight_decay=weight_decay, fused=True)
    if name == "sgd":
        return torch.optim.SGD(values, lr=learning_rate, momentum=momentum)
    raise ValueError(f"optimiser is {name!r}; allowed here: adam, adamw, sgd")


def data_order(n: int, seeds: Sequence[int], epochs: int) -> Iterator[Tensor]:
    """For each epoch a permutation of the n examples per run, ``[R, n]``; a run's order depends on its seed alone."""
    generators = {seed: torch.Generator().manual_seed(seed) for seed in sorted(set(seeds))}
    for _ in range(epochs):
        orders = {seed: torch.randperm(n, generator=generator) for seed, generator in generators.items()}
        yield torch.stack([orders[seed] for seed in seeds])


def rate_factor(schedule: str, step: int, steps: int) -> float:
    """What the learning rate is multiplied by at ``step`` (0, 1, ...) of ``steps``: 1, or half a cosine from 1 to 0."""
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / steps))
    raise ValueError(f"schedule is {schedule!r}; allowed: constant, cosine")


def train(
    parameters: Parameters,
    forward: Callable[[Parameters, Tensor], Tensor],
    objective: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    batch: Callable[[Tensor], Batch],
    n: int,
    order_seeds: Sequence[int],
    optimiser_name: str,
    learning_rate: float,
    epochs: int,
    batch_size: int,
    weight_decay: float = 0.0,
    schedule: str = "constant",
    after_epoch: Callable[[Parameters], None] | None = None,
) -> Parameters:
    """Trains and returns ``parameters`` (new tensors; the given ones stay as they are).

    ``batch(index [R, m])`` gives inputs ``[R, m, ...]``, label ``[R, m]`` and group ``[R, m]``; ``forward`` gives
    logits ``[R, m, k]`` and ``objective(logits, label, group)`` one loss per run, ``[R]``. Because the losses are
    summed and the optimisers act entry by entry, each run follows the path it would follow alone (equal to rounding).
    """
    if epochs < 0 or batch_size < 1 or not learning_rate > 0:
        raise ValueError(
            f"epochs {epochs}, batch size {batch_size}, learning rate {learning_rate}: allowed are >= 0, >= 1, > 0"
        )
    parameters = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    steps = optimiser(optimiser_name, parameters, learning_rate=learning_rate, weight_decay=weight_decay)
    total, step = epochs * math.ceil(n / batch_size), 0
    for order in data_order(n, order_seeds, epochs):
        for index in order.split(batch_size, dim=1):
            steps.param_groups[0]["lr"] = learning_rate * rate_factor(schedule, step, total)
            step += 1
            inputs, label, group = batch(index)
            loss = objective(forward(parameters, inputs), label, group)
            steps.zero_grad()
            loss.sum().backward()
            steps.step()
        if after_epoch is not None:
            with torch.no_grad():
                after_epoch(parameters)
    return {name: value.detach() for name, value in parameters.items()}


def train_to_convergence(
    parameters: Parameters,
    forward: Callable[[Parameters, Tensor], Tensor],
    objective: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    data: Batch,
    iterations: int = 2000,
    tolerance: float = 1e-9,
) -> Parameters:
    """Full-batch L-BFGS until the gradient is below ``tolerance``: one run (no run axis), no learning rate, no seed."""
    parameters = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    inputs, label, group = data
    steps = torch.optim.LBFGS(
        list(parameters.values()),
        max_iter=iterations,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
        history_size=50,
    )

    def closure() -> Tensor:
        steps.zero_grad()
        loss = objective(forward(parameters, inputs), label, group)
        loss.backward()
        return loss

    steps.step(closure)
    return {name: value.detach() for name, value in parameters.items()}
