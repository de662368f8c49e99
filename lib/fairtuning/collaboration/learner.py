"""Training in turns: what a party's optimiser does, in pieces that can be saved between two messages."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fairtuning.networks import Parameters
from fairtuning.training import data_order, optimiser, rate_factor


class Learner:
    """AdamW on a dictionary of tensors, as many steps at a time as a turn has; ``training.train`` in pieces.

    ``steps`` is what the rate's schedule counts on. What it has come to can be saved between turns.
    """

    def __init__(
        self,
        parameters: Parameters,
        *,
        n: int,
        steps: int,
        order_seed: int,
        batch_size: int,
        learning_rate: float,
        schedule: str = "constant",
        weight_decay: float = 0.0,
    ):
        self.parameters = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
        self.learning_rate, self.schedule, self.batch_size = learning_rate, schedule, batch_size
        self.epoch_steps, self.steps, self.step = math.ceil(n / batch_size), steps, 0
        self._optimiser = optimiser("adamw", self.parameters, learning_rate=learning_rate, weight_decay=weight_decay)
        self._orders = [order[0] for order in data_order(n, [order_seed], math.ceil(steps / self.epoch_steps))]

    def advance(
        self,
        steps: int,
        objective: Callable[[Parameters, Tensor], Tensor],
        *,
        after_epoch: Callable[[], None] = lambda: None,
    ) -> None:
        """``objective(parameters, index [m])`` is a number; ``after_epoch`` is called wherever an epoch ends."""
        for _ in range(steps):
            epoch, number = divmod(self.step, self.epoch_steps)
            index = self._orders[epoch][number * self.batch_size : (number + 1) * self.batch_size]
            factor = rate_factor(self.schedule, self.step, self.steps)
            self._optimiser.param_groups[0]["lr"] = self.learning_rate * factor
            self._optimiser.zero_grad()
            objective(self.parameters, index).backward()
            self._optimiser.step()
            self.step += 1
            if self.step % self.epoch_steps == 0:
                after_epoch()

    @torch.no_grad()
    def set(self, values: Parameters) -> None:
        """New values for some parameters; the optimiser's state stays."""
        for name, value in values.items():
            self.parameters[name].copy_(value)

    def state(self) -> Parameters:
        """Everything but the data, as tensors by name."""
        found = {"step": torch.tensor(self.step)}
        for name, value in self.parameters.items():
            found[f"value/{name}"] = value.detach().clone()
            for kind, moment in self._optimiser.state[value].items():
                found[f"{kind}/{name}"] = moment.clone()
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.step = int(state["step"])
        self.set({name: state[f"value/{name}"] for name in self.parameters})
        for kind_and_name, moment in state.items():
            kind, _, name = kind_and_name.partition("/")
            if name in self.parameters and kind != "value":
                self._optimiser.state[self.parameters[name]][kind] = moment.clone()
