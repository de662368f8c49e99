"""What losses, metrics, Fisher information and resampling ask of what they are given; every refusal is a ValueError.

Shapes and dtypes are always checked, which costs next to nothing. Values are looked at only where they are on the host
already: a training step on a GPU waits for no check, and under `torch.compile` or `vmap` there is nothing to look at.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor


def integers(
    name: str,
    values: Tensor,
    *,
    below: int | None,
    shape: Sequence[int] | None = None,
    n: int | None = None,
    wait: bool = False,
) -> Tensor:
    """`values` as given (`.long()` makes int64 of them): any integer type or bool, `[..., n]`, from 0 to `below` - 1.

    Either `shape` `[..., n]` is given, of which leading axes may be left out or be 1, or `n` alone, or neither. The
    last axis has to be n long, for of length 1 it would broadcast, one label for all examples. `below` None: any
    value. `wait`: look at values on a GPU too, in a function that waits for it anyhow.

    >>> integers("label", torch.tensor([0, 2, -100]), below=3, shape=[3])
    Traceback (most recent call last):
    ValueError: label has values from -100 to 2; permitted are 0 to 2
    """
    if not isinstance(values, Tensor):
        raise ValueError(f"{name} is of type {type(values).__name__}; permitted: a tensor")
    if (dtype := values.dtype).is_floating_point or dtype.is_complex:
        raise ValueError(f"{name} has dtype {dtype}; permitted: an integer type or bool")
    if values.shape != shape and not _fits(values.shape, shape, n):
        permitted = list(shape) if shape is not None else f"[..., {'n' if n is None else n}]"
        more = ", leading axes left out or 1" if shape is not None and len(shape) > 1 else ""
        raise ValueError(f"{name} has shape {list(values.shape)}; permitted: {permitted}{more}")
    if below is not None and at_hand(values, wait=wait) and values.numel():
        low, high = values.aminmax()
        low, high = int(low), int(high)
        if low < 0 or high >= below:
            raise ValueError(f"{name} has values from {low} to {high}; permitted are 0 to {below - 1}")
    return values


def _fits(found: Sequence[int], shape: Sequence[int] | None, n: int | None) -> bool:
    if shape is None:
        return len(found) > 0 and n in (None, found[-1])
    leading = zip(reversed(found[:-1]), reversed(shape[:-1]), strict=False)
    return 0 < len(found) <= len(shape) and found[-1] == shape[-1] and all(one in (1, run) for one, run in leading)


def examples(**features: Tensor) -> int:
    """How many examples n there are, from features or logits `[..., n, width]`, all of the same n.

    >>> examples(task=torch.zeros(4, 2), sensitive=torch.zeros(1, 3))
    Traceback (most recent call last):
    ValueError: task, sensitive have shapes [4, 2], [1, 3]; permitted: [..., n, width], one n
    """
    found = {values.shape[-2] if values.ndim > 1 else None for values in features.values()}
    if len(found) > 1 or None in found:
        shapes = ", ".join(str(list(values.shape)) for values in features.values())
        have = "has shape" if len(features) == 1 else "have shapes"
        raise ValueError(f"{', '.join(features)} {have} {shapes}; permitted: [..., n, width], one n")
    return found.pop()


def between(name: str, value: float | Tensor, low: float, high: float = math.inf) -> None:
    """A number, or every number of a tensor, has to be from `low` to `high`; NaN is not.

    >>> between("lam", -1.0, 0)
    Traceback (most recent call last):
    ValueError: lam is -1.0; permitted: 0 or more
    """
    least = most = value
    if isinstance(value, Tensor):
        if not at_hand(value) or not value.numel():
            return
        least, most = (each.item() for each in value.detach().aminmax())
    if not (low <= least and most <= high):
        permitted = f"{low} or more" if high == math.inf else f"{low} to {high}"
        raise ValueError(f"{name} is {most if low <= least else least}; permitted: {permitted}")


def at_hand(values: Tensor, *, wait: bool = False) -> bool:
    """Whether there are values to look at, and on the host (`wait`: or wherever they are)."""
    if torch.compiler.is_compiling():
        return False
    return (wait or values.is_cpu) and type(values) is Tensor and not is_functorch_wrapped_tensor(values)
