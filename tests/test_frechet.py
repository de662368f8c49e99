"""The Fréchet distance against its formula with a general matrix root, and against Gaussians of known distance."""

import doctest

import numpy as np
import pytest
import scipy.linalg
import torch

from fairtuning import frechet
from fairtuning.frechet import frechet_distance


def normal(n, d, seed):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def exact_moments(n, mean, root, seed):
    """Features whose sample mean and covariance are exactly ``mean`` and ``root root^T``."""
    noise = normal(n, len(mean), seed)
    noise = noise - noise.mean(0)
    white = noise @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(noise.T))).T
    return white @ root.T + mean


def test_doctest():
    assert doctest.testmod(frechet).failed == 0


@pytest.mark.parametrize("d", [1, 3, 8])
def test_twin_with_a_general_matrix_root(d):
    ours, theirs = normal(200, d, 0) @ normal(d, d, 1), normal(150, d, 2) @ normal(d, d, 3) + 1
    first, second = (np.atleast_2d(np.cov(x.numpy().T)) for x in (ours, theirs))
    root = scipy.linalg.sqrtm(first @ second).real
    means = (ours.mean(0) - theirs.mean(0)).square().sum()
    assert frechet_distance(ours, theirs) == pytest.approx(float(means) + np.trace(first + second - 2 * root), rel=1e-8)


def test_gaussians_with_a_known_distance():
    """Diagonal covariances: the sum of squared differences of means and of standard deviations."""
    mean, other = torch.tensor([1.0, 0, -2]).double(), torch.tensor([0.0, 3, -2]).double()
    one, two = torch.tensor([1.0, 2, 0.5]).double(), torch.tensor([2.0, 2, 0.1]).double()
    found = frechet_distance(exact_moments(50, mean, one.diag(), 0), exact_moments(60, other, two.diag(), 1))
    assert found == pytest.approx(float((mean - other).square().sum() + (one - two).square().sum()), rel=1e-9)


def test_it_vanishes_for_equal_sets_is_symmetric_and_needs_no_full_rank():
    few = normal(5, 9, 0)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(few, normal(7, 9, 1)) == pytest.approx(frechet_distance(normal(7, 9, 1), few), rel=1e-9)


@pytest.mark.parametrize(
    "ours, line",
    [
        (torch.ones(1, 3), "n of 2 or more"),
        (torch.full((4, 3), torch.nan), "finite: False"),
        (torch.ones(4, 2), "2 and 3 features"),
        (torch.ones(4), r"first features are \[4\]"),
    ],
)
def test_bad_features(ours, line):
    with pytest.raises(ValueError, match=line):
        frechet_distance(ours, torch.ones(4, 3))
