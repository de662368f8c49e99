"""Multi-layer perceptrons and heads as functions of a dictionary of tensors.

Weights have the papers' layout, ``Z = X W + b`` with ``W [d, k]``. Every tensor may carry a leading run axis ``[R]``:
``inputs [R, n, d]`` then meet ``W [R, d, k]``, and R networks are evaluated at once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Parameters = dict[str, Tensor]


def mlp_parameters(sizes: Sequence[int], *, seed: int, dtype: torch.dtype = torch.float64) -> Parameters:
    """Initial weights of an MLP with layer ``sizes``, e.g. (13, 20, 20, 2): uniform in +-1/sqrt(fan in), as
    ``torch.nn.Linear`` does. Names: ``W0, b0, W1, ...``; the last layer is the head, ``W`` and ``b``.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for layer, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
        name = "" if layer == len(sizes) - 2 else str(layer)
        for kind, shape in (("W", (fan_in, fan_out)), ("b", (1, fan_out))):
            uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
            parameters[kind + name] = ((2 * uniform - 1) / fan_in**0.5).to(dtype)
    return parameters


def features(parameters: Parameters, inputs: Tensor) -> Tensor:
    """What the head sees: ``inputs [..., n, d]`` after every hidden layer and its ReLU, ``[..., n, h]``."""
    layer = 0
    while f"W{layer}" in parameters:
        inputs = _affine(inputs, parameters[f"W{layer}"], parameters[f"b{layer}"]).relu_()
        layer += 1
    return inputs


def head(parameters: Parameters, inputs: Tensor) -> Tensor:
    """Logits ``[..., n, k]`` of a head ``X W + b`` or of a factored one, ``(X A) B + b`` (arXiv 2403.00625, eq. 3)."""
    if "A" in parameters:
        return _affine(inputs @ parameters["A"], parameters["B"], parameters["b"])
    return _affine(inputs, parameters["W"], parameters["b"])


def _affine(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``inputs weight + bias``; with a run axis in one call, for small networks are bound by passes over memory."""
    if inputs.ndim == weight.ndim == 3:
        return torch.baddbmm(bias, inputs, weight)
    return inputs @ weight + bias


def mlp(parameters: Parameters, inputs: Tensor) -> Tensor:
    """Logits ``[..., n, k]`` of the whole network."""
    return head(parameters, features(parameters, inputs))


def stack(runs: Sequence[Parameters]) -> Parameters:
    """R dictionaries of one shape as one with a leading run axis."""
    return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}


def count(parameters: Parameters) -> int:
    """How many numbers one run of ``parameters`` (without run axis) has."""
    return sum(value.numel() for value in parameters.values())
