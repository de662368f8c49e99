"""The identities of the weighted split, each against the paper's own recipe: scale, torch.linalg.svd, un-scale."""

import doctest
import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from fairtuning import factorization as module
from fairtuning.factorization import VARIANTS, FactoredHead, low_rank, neutralise
from fairtuning.fisher import head_fisher

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
FEW = settings(deadline=None, max_examples=40, derandomize=True)
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 7))  # (d, k): more rows than columns, and fewer


def problem(shape, seed=0, *, device="cpu"):
    """W and positive importances of rows and columns, log-normal: some count hundreds of times as much as others."""
    torch.manual_seed(seed)
    W = torch.randn(*shape, dtype=torch.float64)
    rows, columns = (torch.randn(n, dtype=torch.float64).mul(2).exp() for n in shape[-2:])
    return W.to(device), rows.to(device), columns.to(device)


def papers_recipe(W, rank, rows, columns=None):
    """Eq. 4 as it stands: the SVD of diag(rows) W (diag(columns)), the scaling undone by inverses."""
    C = torch.diag(torch.ones_like(W[0]) if columns is None else columns)
    U, S, Vh = torch.linalg.svd(torch.diag(rows) @ W @ C, full_matrices=False)
    A = torch.linalg.inv(torch.diag(rows)) @ U[:, :rank] @ torch.diag(S[:rank])
    return A, Vh[:rank] @ torch.linalg.inv(C)


def error(W, A, B, rows=None, columns=None):
    residual = W - A @ B
    residual = residual if rows is None else rows[:, None] * residual
    return (residual if columns is None else residual * columns).square().sum().sqrt()


def same(ours, theirs, tolerance=1e-9):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


def separated(matrix, rank):
    """Whether the truncated singular vectors are well defined."""
    s = torch.linalg.svdvals(matrix)
    return (s[:-1] / s[1:] > 1.05).all() and s[rank - 1] > 1e-3 * s[0]


# Identity 1


@FEW
@given(SHAPES, st.integers(0, 2**16))
def test_full_rank_reproduces_the_head_under_any_weights(shape, seed):
    W, rows, columns = problem(shape, seed)
    silent = torch.where(torch.rand(shape[0]) < 0.5, 0, rows)
    for weights in ({}, {"rows": rows}, {"rows": rows, "columns": columns}, {"columns": columns}, {"rows": silent}):
        A, B = low_rank(W, min(shape), **weights)
        undone = (columns.max() / columns.min()).item() if "columns" in weights else 1.0  # a division undoes them
        same(A @ B, W, 1e-12 * undone)


@FEW
@given(SHAPES, st.integers(1, 7), st.integers(0, 2**16))
def test_closed_form_is_the_papers_recipe(shape, rank, seed):
    W, rows, columns = problem(shape, seed)
    assume(rank <= min(shape))
    for weights in ({"rows": rows}, {"rows": rows, "columns": columns}):
        assume(separated(rows[:, None] * W * weights.get("columns", torch.ones_like(columns)), rank))
        A, B = low_rank(W, rank, **weights)
        slow_A, slow_B = papers_recipe(W, rank, **weights)
        sign = (B * slow_B).sum(-1).sign()
        same(B, sign[:, None] * slow_B, 1e-6)
        same(A, slow_A * sign, 1e-6)
        assert error(W, A, B, **weights) <= error(W, slow_A, slow_B, **weights) * (1 + 1e-9) + 1e-12


@FEW
@given(SHAPES, st.integers(0, 2**16))
def test_first_factor_is_the_head_seen_from_the_second(shape, seed):
    W, rows, _ = problem(shape, seed)
    for rank in range(1, min(shape) + 1):
        A, B = low_rank(W, rank, rows=rows)
        same(B @ B.mT, torch.eye(rank, dtype=W.dtype), 1e-12)
        same(A, W @ B.mT, 1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(4, 6, 3), (2, 3, 3, 7)])
def test_runs_are_batched_and_weights_broadcast(shape, device):
    W, rows, columns = problem(shape, device=device)
    many = rows * torch.rand(*shape[:-1], dtype=W.dtype, device=device)
    for weights in ({}, {"rows": many}, {"rows": rows, "columns": columns}):
        A, B = low_rank(W, 2, **weights)
        for index in itertools.product(*map(range, shape[:-2])):
            one = {name: w[index] if w.ndim > 1 else w for name, w in weights.items()}
            for ours, alone in zip((A, B), low_rank(W[index], 2, **one), strict=True):
                same(ours[index], alone, 1e-8)


# Identity 2


@FEW
@given(SHAPES, st.integers(1, 7), st.floats(1e-6, 1e6), st.integers(0, 2**16))
def test_equal_importances_are_the_plain_svd(shape, rank, scale, seed):
    W, rows, _ = problem(shape, seed)
    assume(rank <= min(shape) and separated(W, rank))
    A, B = low_rank(W, rank)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    sign = (B * Vh[:rank]).sum(-1).sign()
    same(A, U[:, :rank] * S[:rank] * sign, 1e-6)
    same(B, Vh[:rank] * sign[:, None], 1e-6)
    for ours, plain in zip(low_rank(W, rank, rows=torch.full_like(rows, scale)), (A, B), strict=True):
        same(ours, plain, 1e-12)


@FEW
@given(SHAPES, st.integers(1, 7), st.floats(-12, 12), st.integers(0, 2**16))
def test_scale_of_the_importances_is_immaterial(shape, rank, exponent, seed):
    W, rows, columns = problem(shape, seed)
    assume(rank <= min(shape) and separated(rows[:, None] * W, rank))
    for ours, scaled in zip(low_rank(W, rank, rows=rows), low_rank(W, rank, rows=rows * 10**exponent), strict=True):
        same(scaled, ours, 1e-6)


@FEW
@given(st.integers(2, 4), SHAPES, st.integers(0, 2**16))
def test_equal_groups_make_the_method_fwsvd(groups, shape, seed):
    torch.manual_seed(seed)
    fisher = torch.rand(1, *shape, dtype=torch.float64).expand(groups, *shape)
    sizes = torch.randint(1, 50, (groups,))
    fwsvd = neutralise(fisher, variant="pooled", sizes=sizes)
    for variant in ("neutralised", "average_first", "group_0", "group_1"):
        same(neutralise(fisher, variant=variant), fwsvd, 1e-12)
    normalised = neutralise(fisher, variant="normalised")
    same(normalised / normalised.mean(), fwsvd / fwsvd.mean(), 1e-12)


# Identity 3


@FEW
@given(SHAPES, st.integers(1, 7), st.integers(0, 2**16))
def test_weighted_split_wins_in_weighted_error_and_loses_in_plain_error(shape, rank, seed):
    W, rows, columns = problem(shape, seed)
    assume(rank <= min(shape))
    plain = low_rank(W, rank)
    for weights in ({"rows": rows}, {"rows": rows, "columns": columns}):
        weighted = low_rank(W, rank, **weights)
        slack = 1e-7 * W.norm() * rows.max() * columns.max()
        assert error(W, *weighted, **weights) <= error(W, *plain, **weights) + slack
        assert error(W, *weighted) >= error(W, *plain) - 1e-7 * W.norm()


# Zero importances


@pytest.mark.parametrize("shape", [(8, 3), (3, 8)])
def test_zero_importance_is_the_limit_of_a_small_one(shape):
    W, rows, _ = problem(shape)
    silent = rows.clone()
    silent[0] = 0
    for rank in range(1, min(shape)):
        A, B = low_rank(W, rank, rows=silent)
        small_A, small_B = low_rank(W, rank, rows=torch.where(silent > 0, silent, 1e-6 * silent.max()))
        same(A, small_A, 1e-5)
        same(B, small_B, 1e-5)
        same(A[0], W[0] @ B.mT)  # projected on the second layer's rows, not dropped
    A, B = low_rank(W, 2, rows=torch.zeros_like(rows))
    assert A.isfinite().all()
    same(B @ B.mT, torch.eye(2, dtype=W.dtype))


def test_single_precision_survives_tiny_importances():
    W, rows, _ = problem((40, 6))
    ours = low_rank(W.float(), 3, rows=rows.float() * 1e-20)
    for single, double in zip(ours, low_rank(W, 3, rows=rows), strict=True):
        same(single.double(), double, 1e-3)


# What the weighting can and cannot do


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_at_full_rank_sgd_cannot_tell_one_weighting_from_another(momentum, decay):
    spread = _spread(lambda p: torch.optim.SGD(p, lr=0.1, momentum=momentum, weight_decay=decay))
    assert spread.max() < 1e-10


def test_at_full_rank_adam_can_tell_one_weighting_from_another():
    spread = _spread(lambda p: torch.optim.Adam(p, lr=0.03))
    assert spread[0] < 1e-10  # the same function to begin with
    assert spread[-1] > 1e-2


def _spread(optimiser, steps=300):
    """Largest difference of the logits, at each step, between heads that start from different weightings."""
    torch.manual_seed(0)
    X, y = torch.randn(60, 6, dtype=torch.float64), torch.randint(0, 3, (60,))
    W, rows, _ = problem((6, 3))
    bias = torch.randn(3, dtype=torch.float64)
    heads = [FactoredHead.from_factors(*low_rank(W, 3, rows=r), bias) for r in (None, rows, rows.flip(0))]
    optimisers = [optimiser(head.parameters()) for head in heads]
    spread = []
    for _ in range(steps):
        logits = [head(X) for head in heads]
        spread.append(max((z - logits[0]).abs().max().item() for z in logits))
        for z, o in zip(logits, optimisers, strict=True):
            o.zero_grad()
            cross_entropy(z, y).backward()
            o.step()
    return torch.tensor(spread)


@FEW
@given(st.integers(1, 12), st.integers(0, 2**16))
def test_opposite_columns_leave_the_weighting_nothing_to_choose(d, seed):
    """A probe started at zero keeps w_0 = -w_1, a head of rank 1: all weightings agree, here even in sign."""
    w, rows, _ = problem((d, 1), seed)
    W = torch.cat([w, -w], 1)
    plain = low_rank(W, 1)
    same(plain[0] @ plain[1], W, 1e-12)
    for r in (rows, rows.flip(0), rows**2):
        for ours, theirs in zip(low_rank(W, 1, rows=r), plain, strict=True):
            same(ours, theirs, 1e-9)




# Neutralising


def slow_neutralise(fisher, weight, variant):
    """Section 2 and its variants with Python's own numbers, for one run."""
    roots = [[sum(row) ** 0.5 for row in group] for group in fisher.tolist()]
    if variant == "normalised":
        roots = [[x / (sum(group) / len(group)) for x in group] for group in roots]
    if variant in ("average_first", "pooled"):
        return [
            sum(w * x**2 for w, x in zip(weight, column, strict=True)) ** 0.5 for column in zip(*roots, strict=True)
        ]
    if variant.startswith("group_"):
        return roots[int(variant[-1])]
    return [sum(w * x for w, x in zip(weight, column, strict=True)) for column in zip(*roots, strict=True)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "random"])
def test_neutralise_is_the_recipe(variant, device):
    torch.manual_seed(0)
    fisher = torch.rand(3, 2, 5, 4, dtype=torch.float64, device=device)
    sizes = torch.tensor([30, 10], device=device)
    for alpha in (0.5, 0.75, 1.0):
        ours = neutralise(fisher, alpha=alpha, variant=variant, sizes=sizes)
        assert ours.shape == (3, 5)
        weight = (0.75, 0.25) if variant == "pooled" else (alpha, 1 - alpha)
        for run in range(3):
            slow = torch.tensor(slow_neutralise(fisher[run], weight, variant), dtype=torch.float64)
            torch.testing.assert_close(ours[run].cpu(), slow)


def test_neutralise_takes_more_groups_and_an_alpha_for_each_run():
    fisher = torch.rand(4, 3, 5, 2, dtype=torch.float64)
    torch.testing.assert_close(neutralise(fisher), fisher.sum(-1).sqrt().mean(1))
    torch.testing.assert_close(neutralise(fisher, alpha=1 / 3), neutralise(fisher))
    two, alpha = fisher[:, :2], torch.tensor([0.5, 0.6, 0.7, 1.0], dtype=torch.float64)
    ours = neutralise(two, alpha=alpha)
    for run in range(4):
        torch.testing.assert_close(ours[run], neutralise(two[run], alpha=alpha[run].item()))
    torch.testing.assert_close(neutralise(two), neutralise(two, alpha=0.5))


def test_roots_first_or_average_first_differ_when_groups_disagree():
    fisher = torch.rand(2, 50, 3, dtype=torch.float64)
    assert (neutralise(fisher, variant="average_first") > neutralise(fisher)).all()  # the root is concave


@pytest.mark.parametrize("device", DEVICES)
def test_random_importances_are_positive_and_repeat(device):
    fisher = torch.rand(2, 2, 6, 3, device=device)
    draw = lambda seed: neutralise(fisher, variant="random", generator=torch.Generator().manual_seed(seed))  # noqa: E731
    assert draw(0).shape == (2, 6) and (draw(0) > 0).all()
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def test_pooled_is_the_fisher_that_knows_no_groups():
    z, logits = torch.randn(40, 5, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    label, group = torch.randint(0, 3, (40,)), torch.randint(0, 2, (40,)) * 2  # nobody in group 1
    fisher = head_fisher(z, logits, label, group=group, groups=3)
    whole = head_fisher(z, logits, label, group=torch.zeros_like(group), groups=1)
    pooled = neutralise(fisher, variant="pooled", sizes=group.bincount(minlength=3))
    torch.testing.assert_close(pooled, neutralise(whole))
    assert neutralise(fisher).isnan().all()


# The head, and errors


@pytest.mark.parametrize("device", DEVICES)
def test_factored_head_is_the_head(device):
    W, rows, _ = problem((20, 2), device=device)
    bias, X = (torch.randn(*shape, dtype=torch.float64, device=device) for shape in ((2,), (7, 20)))
    A, B = low_rank(W, 2, rows=rows)
    head = FactoredHead.from_factors(A, B, bias)
    torch.testing.assert_close(head(X), X @ W + bias)
    assert sum(p.numel() for p in head.parameters()) == 2 * (20 + 2) + 2 == 46
    assert all(p.requires_grad and p.dtype == torch.float64 and p.device == A.device for p in head.parameters())
    with torch.no_grad():
        head.first.weight.zero_()
    assert A.abs().max() > 0  # a copy
    assert sum(p.numel() for p in nn.Linear(20, 2).parameters()) == 42  # the ordinary head has fewer


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda W: low_rank(W, 0), r"rank is 0; permitted for W of 4 x 3: 1..3"),
        (lambda W: low_rank(W, 4), r"rank is 4; permitted"),
        (lambda W: low_rank(W, 1, rows=-W[:, 0].abs()), "rows span -.*; permitted: finite and not negative"),
        (lambda W: low_rank(W, 1, rows=W[:, 0] * torch.nan), "rows span nan..nan"),
        (lambda W: low_rank(W, 1, columns=W[0] * 0), "columns span .*; permitted: finite and positive"),
        (lambda W: neutralise(W[None].square(), variant="mean"), "variant is 'mean'; permitted: neutralised, "),
        (lambda W: neutralise(W.square().expand(2, 4, 3), alpha=1.2), r"alpha is 1.2.*permitted for 2 groups: 0 to 1"),
        (lambda W: neutralise(W.square().expand(3, 4, 3), alpha=0.5), "permitted for 3 groups: None or 1/3"),
        (lambda W: neutralise(W.square()[None], variant="pooled"), "sizes is None; permitted for variant 'pooled'"),
        (lambda W: neutralise(W.square()[None], variant="random"), "generator is None; permitted for variant 'random'"),
    ],
)
def test_errors_name_the_value_and_what_is_permitted(call, message):
    with pytest.raises(ValueError, match=message):
        call(problem((4, 3))[0])


def test_doctests():
    assert doctest.testmod(module).failed == 0
