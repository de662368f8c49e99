"""The one training loop, in one go (``train``) or in pieces (``Learner``)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

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


class Learner:
    """R runs in training at once along a leading axis, each as if alone; as many steps at a time as are asked for.

    ``order_seeds``: one per run, and the index of a batch is ``[R, m]``; or a single number for parameters without a
    run axis: ``[m]``. ``steps`` is what the rate's schedule counts on. What training has come to is ``state``, which
    can be saved between two calls of ``advance`` and given to ``restore`` of a new Learner.
    """

    def __init__(
        self,
        parameters: Parameters,
        *,
        n: int,
        steps: int,
        order_seeds: int | Sequence[int],
        batch_size: int,
        learning_rate: float,
        optimiser_name: str = "adamw",
        schedule: str = "constant",
        weight_decay: float = 0.0,
    ):
        self.parameters = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
        self.learning_rate, self.schedule, self.batch_size = learning_rate, schedule, batch_size
        self.n, self.order_seeds, self.epoch_steps = n, order_seeds, math.ceil(n / batch_size)
        self.optimiser = optimiser(
            optimiser_name, self.parameters, learning_rate=learning_rate, weight_decay=weight_decay
        )
        self.steps, self.step = steps, 0
        self._orders = self._all_orders()

    def advance(
        self,
        steps: int,
        objective: Callable[[Parameters, Tensor], Tensor],
        *,
        after_epoch: Callable[[Parameters], None] | None = None,
    ) -> None:
        """So many steps further. ``objective(parameters, index)`` is one loss per run, ``[R]`` (one run: a number).

        ``after_epoch(parameters)`` is called wherever an epoch ends, without gradient.
        """
        for _ in range(steps):
            number = self.step % self.epoch_steps
            if number == 0:
                self._order = next(self._orders)
            index = self._order[..., number * self.batch_size : (number + 1) * self.batch_size]
            factor = rate_factor(self.schedule, self.step, self.steps)
            self.optimiser.param_groups[0]["lr"] = self.learning_rate * factor
            loss = objective(self.parameters, index)
            self.optimiser.zero_grad()
            loss.sum().backward()
            self.optimiser.step()
            self.step += 1
            if after_epoch is not None and self.step % self.epoch_steps == 0:
                with torch.no_grad():
                    after_epoch(self.parameters)

    @torch.no_grad()
    def set(self, values: Parameters) -> None:
        """New values for some parameters; the optimiser's state stays."""
        for name, value in values.items():
            self.parameters[name].copy_(value)

    def state(self) -> Parameters:
        """Everything but the data and the settings, as tensors by name."""
        found = {"step": torch.tensor(self.step)}
        for name, value in self.parameters.items():
            found[f"value/{name}"] = value.detach().clone()
            for kind, moment in self.optimiser.state[value].items():
                found[f"{kind}/{name}"] = moment.clone()
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a ``state`` of the same settings."""
        self.step = int(state["step"])
        self.set({name: state[f"value/{name}"] for name in self.parameters})
        for kind_and_name, moment in state.items():
            kind, _, name = kind_and_name.partition("/")
            if name in self.parameters and kind != "value":
                self.optimiser.state[self.parameters[name]][kind] = moment.clone()
        self._orders = self._all_orders()
        for _ in range(math.ceil(self.step / self.epoch_steps)):
            self._order = next(self._orders)

    def _all_orders(self) -> Iterator[Tensor]:
        alone = isinstance(self.order_seeds, int)
        seeds = [self.order_seeds] if alone else self.order_seeds
        for order in data_order(self.n, seeds, math.ceil(self.steps / self.epoch_steps)):
            yield order[0] if alone else order


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
    """Trains and returns ``parameters`` (new tensors; the given ones stay as they are): a Learner in one go.

    ``batch(index [R, m])`` gives inputs ``[R, m, ...]``, label ``[R, m]`` and group ``[R, m]``; ``forward`` gives
    logits ``[R, m, k]`` and ``objective(logits, label, group)`` one loss per run, ``[R]``. Because the losses are
    summed and the optimisers act entry by entry, each run follows the path it would follow alone (equal to rounding).
    """
    if epochs < 0 or batch_size < 1 or not learning_rate > 0:
        raise ValueError(
            f"epochs {epochs}, batch size {batch_size}, learning rate {learning_rate}: allowed are >= 0, >= 1, > 0"
        )
    learner = Learner(
        parameters,
        n=n,
        steps=epochs * math.ceil(n / batch_size),
        order_seeds=order_seeds,
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimiser_name=optimiser_name,
        schedule=schedule,
        weight_decay=weight_decay,
    )

    def loss(values: Parameters, index: Tensor) -> Tensor:
        inputs, label, group = batch(index)
        return objective(forward(values, inputs), label, group)

    learner.advance(learner.steps, loss, after_epoch=after_epoch)
    return {name: value.detach() for name, value in learner.parameters.items()}


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
