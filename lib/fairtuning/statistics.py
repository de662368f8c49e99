"""How sure a number is: resampled examples, intervals of seed-paired effects, tests and their correction.

All seeds and methods of a study share one test set, so a mean over seeds has two sources of variance: the
seeds, and the examples that the test set happens to hold. The second does not shrink with more seeds and is
missed when each seed is resampled on its own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import checks
from .metrics import true_cell

_CHUNK = 2**23  # elements of one block: 32 MiB in float32, 64 MiB in int64


def resampled_counts(
    prediction: Tensor,
    label: Tensor,
    *,
    group: Tensor,
    classes: int,
    groups: int,
    resamples: int = 1000,
    seed: int = 0,
) -> Tensor:
    """Counts under resampling of the examples with replacement, one resampling shared by all leading axes.

    Shapes: prediction `[..., N]`, label and group `[N]`; result `[resamples, ..., groups, classes, classes]`,
    whole numbers in float32 (exact: N < 2**24 is checked), on the device of `prediction`. The resampling
    depends on N, `resamples` and `seed` alone, so that calls for other runs on the same test set pair up.
    Raises ValueError as `group_counts` does.
    """
    cell = true_cell(prediction, label, group=group, classes=classes, groups=groups)
    n, device = len(label), prediction.device
    if not 0 < n < 2**24:
        raise ValueError(f"there are {n} examples; permitted are 1 to {2**24 - 1}")
    cell, order = cell.sort(stable=True)
    sizes = torch.bincount(cell, minlength=groups * classes).tolist()
    runs = prediction.reshape(prediction.shape[:-1].numel(), n)[:, order]
    out = torch.zeros(resamples, len(runs), groups * classes, classes, dtype=torch.float32, device=device)
    for rows, weights in _weights(n, resamples=resamples, seed=seed):
        weights = weights.to(device)[:, order]
        blocks = zip(weights.split(sizes, dim=1), runs.split(sizes, dim=1), strict=True)
        for index, (weight, predicted) in enumerate(blocks):
            if predicted.numel():
                _count_cell(out[rows, :, index], weight, predicted)
    return out.reshape(resamples, *prediction.shape[:-1], groups, classes, classes)


def resampled_score_counts(
    scores: Tensor, label: Tensor, *, classes: int, levels: int, resamples: int = 1000, seed: int = 0
) -> Tensor:
    """Counts of class by score under the resampling that `resampled_counts` draws for as many examples.

    Shapes: integer scores `[runs, N]`, 0 to `levels` - 1, and label `[N]`; result `[resamples, runs, classes, levels]`
    float32. Raises ValueError for other shapes, types and values.
    """
    n = checks.integers("scores", scores, below=levels, wait=True).shape[-1]
    checks.integers("label", label, below=classes, shape=[n], wait=True)
    if scores.ndim != 2:
        raise ValueError(f"scores have shape {list(scores.shape)}; permitted: [runs, N]")
    cell = label.long() * levels + scores.long()
    out = torch.zeros(resamples, len(scores), classes * levels)
    for rows, weights in _weights(len(label), resamples=resamples, seed=seed):
        for run, index in enumerate(cell):
            out[rows, run] = torch.zeros(len(weights), classes * levels).index_add_(1, index, weights)
    return out.reshape(resamples, len(scores), classes, levels)


def _weights(n: int, *, resamples: int, seed: int):
    """Yield (slice of resamples, float32 weights [b, n]): how often each example is drawn in n draws."""
    generator = torch.Generator().manual_seed(seed)  # always on the CPU: the same numbers on every device
    step = max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        draws = torch.randint(n, (rows, n), generator=generator)
        draws += torch.arange(rows)[:, None] * n
        weights = torch.bincount(draws.flatten(), minlength=rows * n).reshape(rows, n)
        yield slice(start, start + rows), weights.float()


def _count_cell(out: Tensor, weight: Tensor, predicted: Tensor) -> None:
    """Fill out[b, run, class] with the weight [b, n] of the examples of one cell that go to a class."""
    classes = out.shape[-1]
    named = torch.arange(classes - 1, device=predicted.device)[:, None]
    total = weight.sum(1)
    step = max(1, _CHUNK // max(1, (classes - 1) * max(weight.shape)))
    for start in range(0, len(predicted), step):
        hit = (predicted[start : start + step, None, :] == named).to(weight.dtype).flatten(0, 1)
        block = out[:, start : start + step]
        block[..., :-1] = (weight @ hit.T).reshape(*block.shape[:-1], classes - 1)
        block[..., -1] = total[:, None] - block[..., :-1].sum(-1)  # the last class is what remains


def single_run_interval(
    counts: Tensor,
    metric: Callable[[Tensor], Tensor],
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float] | tuple[Tensor, Tensor]:
    """Percentile interval, low and high, of a metric of one run, counts `[groups, classes, classes]`.

    Two floats for a scalar metric; two float64 tensors of the metric's shape for one with more entries (an accuracy
    for each group), an interval for each entry by itself.

    Drawing counts from the multinomial over the cells has exactly the law of resampling the examples. It says
    nothing of the variance between seeds. NaN where more than 1 resample in 20 leaves the entry undefined. Raises
    ValueError for counts of another shape, and for a metric that does not keep the axis of the resamples.
    """
    import numpy

    if counts.ndim != 3 or counts.shape[-1] != counts.shape[-2]:
        raise ValueError(f"counts have shape {list(counts.shape)}; permitted: [groups, classes, classes], of one run")
    cells = counts.detach().cpu().double().flatten()
    filled = cells.nonzero().flatten()
    total = int(cells.sum())
    drawn = torch.zeros(resamples, len(cells), dtype=torch.float64)
    if total:  # else no example, and every metric is NaN
        share = (cells[filled] / cells.sum()).numpy()
        drawn[:, filled] = torch.from_numpy(
            numpy.random.default_rng(seed).multinomial(total, share, size=resamples)
        ).double()
    values = metric(drawn.reshape(resamples, *counts.shape))
    if values.shape[:1] != (resamples,):
        raise ValueError(f"the metric gives shape {list(values.shape)} for {resamples} counts; permitted: [B, ...]")
    tail = (1 - confidence) / 2
    bounds = torch.full((2, values[0].numel()), math.nan, dtype=torch.float64)
    for entry, column in enumerate(values.reshape(resamples, -1).unbind(1)):
        if (kept := _defined(column)) is not None:
            bounds[:, entry] = kept.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    if values.ndim == 1:
        return tuple(bounds[:, 0].tolist())
    low, high = bounds.reshape(2, *values.shape[1:])
    return low, high


def _defined(values: Tensor) -> Tensor | None:
    """Drop the resamples (rows) with a NaN, which an empty group gives; None when they are over 1 in 20."""
    values = values.detach().cpu().double()
    kept = values[~values.isnan().flatten(1).any(1) if values.ndim > 1 else ~values.isnan()]
    return kept if len(kept) >= 0.95 * len(values) and len(kept) > 1 else None


@dataclass(frozen=True)
class Effect:
    """A quantity for each seed, and the same under one resampling of the examples shared by all seeds.

    by_seed: `[n]`. resampled: `[B]`, the mean over the seeds under each resample; or, better, `[B, n]`, each
    seed under each resample; or None for a quantity that does not depend on a test set.
    """

    by_seed: Tensor
    resampled: Tensor | None = None

    def times(self, factor: float) -> "Effect":
        """The same in another unit: 100 for percent, -1 for the other direction.

        >>> Effect(torch.tensor([0.25])).times(100)
        Effect(by_seed=tensor([25.]), resampled=None)
        """
        return Effect(factor * self.by_seed, None if self.resampled is None else factor * self.resampled)


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds with its interval; all NaN but `effect` and `n` with fewer than two seeds."""

    effect: float
    low: float
    high: float
    standard_error: float
    degrees_of_freedom: float
    n: int


def estimate(effect: Effect, *, confidence: float = 0.95) -> Estimate:
    """Student interval of the mean over seeds, with seeds and examples both counted as drawn at random.

    variance = var(by_seed) / n + var(resampled seed-mean); degrees of freedom after Satterthwaite. The
    part of the example variance that differs between seeds is in both terms. Where `resampled` is `[B, n]` it
    is known, (mean of the seeds' own variances - variance of the seed-mean) / (n - 1), and taken off once;
    where `resampled` is `[B]` it stays, and the interval is on the wide side. NaN where more than 1 resample
    in 20 is NaN (a group that is all but empty). Raises ValueError on a wrong shape.

    >>> e = estimate(Effect(torch.tensor([1.0, 2.0, 3.0])))
    >>> round(e.effect, 3), round(e.low, 3), round(e.high, 3), e.degrees_of_freedom
    (2.0, -0.484, 4.484, 2.0)
    """
    from scipy.special import stdtrit

    by_seed = effect.by_seed.detach().cpu().double()
    if by_seed.ndim != 1:
        raise ValueError(f"by_seed has shape {tuple(by_seed.shape)}; expected [n]")
    n, mean = len(by_seed), float(by_seed.mean())
    if n < 2:
        return Estimate(mean, math.nan, math.nan, math.nan, math.nan, n)
    seeds = float(by_seed.var()) / n
    examples, shared, resamples = _example_variance(effect.resampled, n)
    # taking off the shared part is noisy with few seeds; each term alone is a lower bound of the truth
    variance = max(seeds + examples - shared, seeds, examples) if seeds + examples >= 0 else math.nan
    if variance == 0:
        return Estimate(mean, mean, mean, 0.0, n - 1.0, n)
    # in shares of the variance: squares of tiny variances would underflow
    freedom = 1 / ((seeds / variance) ** 2 / (n - 1) + (examples / variance) ** 2 / (resamples - 1))
    error = math.sqrt(variance)
    half = float(stdtrit(freedom, (1 + confidence) / 2)) * error
    return Estimate(mean, mean - half, mean + half, error, freedom, n)


def _example_variance(resampled: Tensor | None, n: int) -> tuple[float, float, float]:
    """Variance of the seed-mean over resamples; the part of it that `var(by_seed) / n` has too; resamples."""
    if resampled is None:
        return 0.0, 0.0, math.inf
    if resampled.ndim not in (1, 2) or (resampled.ndim == 2 and resampled.shape[1] != n):
        raise ValueError(f"resampled has shape {tuple(resampled.shape)}; expected [B] or [B, {n}]")
    values = _defined(resampled)
    if values is None:
        return math.nan, math.nan, math.nan
    if values.ndim == 1:
        return float(values.var()), 0.0, len(values)
    examples = float(values.mean(1).var())
    return examples, max(0.0, float(values.var(0).mean()) - examples) / (n - 1), len(values)


def p_above(estimate: Estimate, bound: float) -> float:
    """One-sided p of H0: effect <= bound. NaN without a standard error; 0 or 1 where it is zero.

    >>> round(p_above(estimate(Effect(torch.tensor([1.0, 2.0, 3.0]))), 0.0), 4)
    0.0371
    """
    from scipy.special import stdtr

    if estimate.standard_error == 0:
        return 0.0 if estimate.effect > bound else 1.0
    t = (estimate.effect - bound) / estimate.standard_error
    return float(stdtr(estimate.degrees_of_freedom, -t))


def p_below(estimate: Estimate, bound: float) -> float:
    """One-sided p of H0: effect >= bound."""
    return p_above(replace(estimate, effect=-estimate.effect), -bound)


def p_equivalent(estimate: Estimate, margin: float) -> float:
    """p of H0: |effect| >= margin, by two one-sided tests (the larger of the two)."""
    if not margin > 0:
        raise ValueError(f"margin is {margin}; it must be above 0")
    above, below = p_above(estimate, -margin), p_below(estimate, margin)
    return math.nan if math.isnan(above + below) else max(above, below)


def smallest_detectable_effect(estimate: Estimate, power: float = 0.8, confidence: float = 0.95) -> float:
    """True effect that a one-sided test at level (1 - confidence) / 2 finds with probability `power`.

    From the non-central t law, at the estimate's standard error and degrees of freedom.
    """
    from scipy.special import nctdtrinc, stdtrit

    if math.isnan(estimate.standard_error):
        return math.nan
    freedom = estimate.degrees_of_freedom
    critical = stdtrit(freedom, (1 + confidence) / 2)
    return float(nctdtrinc(freedom, 1 - power, critical)) * estimate.standard_error


def holm(p_values: Tensor | Sequence[float]) -> Tensor:
    """Holm's step-down adjusted p-values, in the order given, float64 `[k]`; ValueError outside [0, 1].

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03]).tolist()]
    [0.03, 0.06, 0.06]
    """
    p = torch.as_tensor(p_values, dtype=torch.float64)
    if p.ndim != 1 or not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError(f"p_values are {p.tolist()}; expected a list of numbers from 0 to 1")
    ranked, order = p.sort()
    factors = torch.arange(len(p), 0, -1, dtype=torch.float64, device=p.device)
    adjusted = (ranked * factors).clamp(max=1).cummax(0).values if len(p) else ranked
    return torch.empty_like(p).scatter_(0, order, adjusted)


def welch(
    mean_a: float, spread_a: float, n_a: int, mean_b: float, spread_b: float, n_b: int
) -> tuple[float, float, float, float]:
    """Welch's test from printed summaries (mean, sample standard deviation, number of runs).

    Returns difference a - b, t, degrees of freedom, two-sided p; NaN for the last three when a sample has
    fewer than two runs.

    >>> [round(x, 3) for x in welch(2.0, 1.0, 10, 1.0, 1.0, 10)]
    [1.0, 2.236, 18.0, 0.038]
    """
    from scipy.special import stdtr

    difference = mean_a - mean_b
    if min(n_a, n_b) < 2:
        return difference, math.nan, math.nan, math.nan
    a, b = spread_a**2 / n_a, spread_b**2 / n_b
    variance = a + b
    if variance == 0:
        t = math.copysign(math.inf, difference) if difference else 0.0
        return difference, t, float(n_a + n_b - 2), 0.0 if difference else 1.0
    t = difference / math.sqrt(variance)
    freedom = 1 / ((a / variance) ** 2 / (n_a - 1) + (b / variance) ** 2 / (n_b - 1))
    return difference, t, freedom, float(2 * stdtr(freedom, -abs(t)))
