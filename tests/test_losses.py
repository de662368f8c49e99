"""Losses against slow loops in float64, finite differences and their hard-count limits."""

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairtuning import losses, metrics

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def draw(*, runs=(3,), n=40, classes=2, groups=2, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*runs, n, classes, generator=generator, dtype=torch.float64)
    label = torch.randint(classes, (*runs, n), generator=generator)
    group = torch.randint(groups, (*runs, n), generator=generator)
    return logits.to(device), label.to(device), group.to(device)


def slow_gap(score, group, counted):
    means = []
    for g in set(group):
        inside = [s for s, h, c in zip(score, group, counted, strict=True) if h == g and c]
        if inside:
            means.append(sum(inside) / len(inside))
    return max(means) - min(means) if means else 0.0


def slow_penalty(name, logits, label, group):
    """One run, plain Python."""
    score = [math.exp(row[1]) / sum(map(math.exp, row)) for row in logits.tolist()]
    label, group = label.tolist(), group.tolist()
    if name == "demographic_parity":
        return slow_gap(score, group, [True] * len(label))
    hit = [y == 1 for y in label]
    return slow_gap(score, group, hit) + slow_gap(score, group, [not h for h in hit])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("runs", [(), (3,), (2, 2)])
def test_cross_entropy_equals_minus_log_probability(runs, device):
    logits, label, _ = draw(runs=runs, classes=3, device=device)
    value = losses.cross_entropy(logits, label)
    expected = [
        math.log(sum(map(math.exp, row))) - row[y]
        for row, y in zip(logits.flatten(0, -2).tolist(), label.flatten().tolist(), strict=True)
    ]
    assert value.shape == label.shape and value.device.type == device
    assert value.flatten().tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", losses.PENALTIES)
@pytest.mark.parametrize("classes, groups", [(2, 2), (2, 4), (3, 2)])
def test_penalty_equals_its_slow_twin_and_its_runs_one_by_one(name, classes, groups, device):
    logits, label, group = draw(classes=classes, groups=groups, device=device)
    value = losses.PENALTIES[name](logits, label, group, groups=groups)
    expected = [slow_penalty(name, *run) for run in zip(logits, label, group, strict=True)]
    assert value.dtype == torch.float64 and value.tolist() == pytest.approx(expected, abs=1e-12)
    mapped = torch.func.vmap(lambda *run: losses.PENALTIES[name](*run, groups=groups))(logits, label, group)
    torch.testing.assert_close(mapped, value)


@pytest.mark.parametrize("device", DEVICES)
def test_shared_label_and_group_may_leave_out_the_run_axis(device):
    logits, label, group = draw(device=device)
    label, group = label[0], group[0]
    for name in losses.PENALTIES:
        shared = losses.penalised_loss(logits, label, group=group, penalty=name, lam=0.3)
        spelled = losses.penalised_loss(logits, label.expand(3, -1), group=group.expand(3, -1), penalty=name, lam=0.3)
        torch.testing.assert_close(shared, spelled)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", losses.PENALTIES)
def test_gradients_equal_finite_differences(name, device):
    logits, label, group = draw(runs=(2,), n=12, groups=3, device=device)
    logits.requires_grad_()
    lam = torch.tensor([0.1, 0.9], dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(
        lambda z: losses.penalised_loss(z, label, group=group, penalty=name, lam=lam, groups=3), logits
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2)), min_size=1, max_size=5), st.integers(0, 99))
def test_absent_groups_and_cells_count_for_nothing(pairs, seed):
    label = torch.tensor([int(y) for y, _ in pairs])
    group = torch.tensor([g for _, g in pairs])
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(pairs), 2, generator=generator, dtype=torch.float64).requires_grad_()
    for name, penalty in losses.PENALTIES.items():
        value = penalty(logits, label, group, groups=3)
        assert float(value.detach()) == pytest.approx(slow_penalty(name, logits.detach(), label, group), abs=1e-12)
        (gradient,) = torch.autograd.grad(value, logits)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", losses.PENALTIES)
def test_one_group_or_none_gives_zero_and_a_zero_gradient(name, device):
    logits, label, group = draw(device=device)
    for rows in (slice(None), slice(0)):
        z = logits[:, rows].clone().requires_grad_()
        value = losses.PENALTIES[name](z, label[:, rows], torch.ones_like(group)[:, rows])
        assert value.tolist() == [0.0] * 3
        assert torch.autograd.grad(value.sum(), z)[0].abs().sum() == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", [2, 3])
def test_penalties_of_hard_predictions_are_the_metrics(groups, device):
    _, label, group = draw(n=200, groups=groups, device=device)
    prediction, _, _ = draw(n=200, groups=groups, seed=1, device=device)
    prediction = prediction.argmax(-1)
    sharp = 1000 * torch.nn.functional.one_hot(prediction, 2).double()
    for run in range(3):
        counts = metrics.group_counts(prediction[run], label[run], group=group[run], classes=2, groups=groups)
        soft = losses.demographic_parity_penalty(sharp[run], group[run], groups=groups)
        assert float(soft) == pytest.approx(float(metrics.demographic_parity_difference(counts)), abs=1e-12)
        soft = losses.equalized_odds_penalty(sharp[run], label[run], group[run], groups=groups)
        assert float(soft) == pytest.approx(float(metrics.equalized_odds_difference_sum(counts)), abs=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", losses.PENALTIES)
def test_penalised_loss_runs_from_the_task_loss_to_the_penalty(name, device):
    logits, label, group = draw(device=device)
    lam = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, device=device)
    value = losses.penalised_loss(logits, label, group=group, penalty=name, lam=lam)
    task = losses.cross_entropy(logits, label).mean(-1)
    penalty = losses.PENALTIES[name](logits, label, group)
    assert value[0] == task[0] and value[2] == penalty[2]
    torch.testing.assert_close(value[1], (task[1] + penalty[1]) / 2)


def test_unknown_penalty_is_named():
    logits, label, group = draw()
    with pytest.raises(ValueError, match=r"penalty is 'dp'; permitted are \['demographic_parity', 'equal"):
        losses.penalised_loss(logits, label, group=group, penalty="dp", lam=0.5)


def test_docstring_examples():
    assert doctest.testmod(losses).failed == 0


# ------------------------------------------------------- apart from a sensitive adapter (arXiv 2503.05684)
def features_of(*, n, p, q, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    task, sensitive = (torch.randn(2, n, width, generator=generator, dtype=torch.float64) + 3 for width in (p, q))
    return task.to(device), sensitive.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n, p, q", [(5, 3, 4), (3, 8, 9), (1, 2, 2)])  # through p x q, and through n x n
def test_cross_covariance_equals_a_loop_over_pairs_of_features(n, p, q, device):
    task, sensitive = features_of(n=n, p=p, q=q, device=device)
    value = losses.cross_covariance_penalty(task, sensitive)
    for run in range(2):
        expected = 0.0
        for i in range(p):
            for j in range(q):
                one, other = task[run, :, i].tolist(), sensitive[run, :, j].tolist()
                means = sum(one) / n, sum(other) / n
                expected += (sum((a - means[0]) * (b - means[1]) for a, b in zip(one, other, strict=True)) / n) ** 2
        assert float(value[run]) == pytest.approx(expected, rel=1e-10, abs=1e-20)


@pytest.mark.parametrize("device", DEVICES)
def test_squared_cosine_equals_a_loop_over_examples(device):
    task, sensitive = features_of(n=6, p=4, q=4, device=device)
    value = losses.squared_cosine_penalty(task, sensitive)
    for run in range(2):
        one, other = (z[run] - z[run].mean(0) for z in (task, sensitive))
        cosines = [torch.nn.functional.cosine_similarity(a, b, dim=0) for a, b in zip(one, other, strict=True)]
        assert float(value[run]) == pytest.approx(float(sum(c**2 for c in cosines)) / 6, rel=1e-10)


def factors_of(*, seed, layers=2, out=7, inside=5, rank=3, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(out, rank), (rank, inside)] * layers
    values = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes]
    return list(zip(values[::2], values[1::2], strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_subspace_overlap_equals_whole_matrices(device):
    task, sensitive = factors_of(seed=0, device=device), factors_of(seed=1, device=device)
    expected = 0.0
    for (b_t, a_t), (b_s, a_s) in zip(task, sensitive, strict=True):
        one, other = b_t @ a_t, b_s @ a_s
        expected += (other.T @ one).norm() ** 2 / (other.norm() ** 2 * one.norm() ** 2)
    value = losses.subspace_overlap_penalty(task, sensitive, eps=0)
    assert float(value) == pytest.approx(float(expected), rel=1e-12) and 0 < value < 2


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 999), st.integers(1, 4), st.booleans())
def test_subspace_overlap_is_about_the_product_of_the_factors_alone(seed, rank, of_task):
    """(B R, R^-1 A) is the same adapter, whichever of the two is rewritten so."""
    given_ = factors_of(seed=seed, rank=rank), factors_of(seed=seed + 1, rank=rank)
    change = torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    change = change + 3 * torch.eye(rank, dtype=torch.float64)
    rewritten = [[(b @ change, torch.linalg.solve(change, a)) for b, a in factors] for factors in given_]
    pair = (rewritten[0], given_[1]) if of_task else (given_[0], rewritten[1])
    condition = float(torch.linalg.cond(change)) ** 2
    assert float(losses.subspace_overlap_penalty(*pair)) == pytest.approx(
        float(losses.subspace_overlap_penalty(*given_)), rel=1e-12 * max(100, condition)
    )


def test_penalties_are_zero_for_orthogonal_subspaces_and_uncorrelated_features():
    basis = torch.linalg.qr(features_of(n=6, p=6, q=1)[0][0])[0]
    inside = factors_of(seed=2, layers=1, inside=5)[0][1]
    task, sensitive = [(basis[:, :3], inside)], [(basis[:, 3:], inside)]
    assert float(losses.subspace_overlap_penalty(task, sensitive)) == pytest.approx(0, abs=1e-24)
    assert float(losses.subspace_overlap_penalty(task, task)) > 0.1
    z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64) + 5
    assert losses.cross_covariance_penalty(z[:, :1], z[:, 1:]) == 0 != losses.cross_covariance_penalty(z, z)


def test_subspace_overlap_is_finite_where_an_adapter_is_new():
    """B = 0 at the start of every adapter: no division by zero, and a finite gradient."""
    task, sensitive = factors_of(seed=0), factors_of(seed=1)
    task = [(torch.zeros_like(b).requires_grad_(), a) for b, a in task]
    value = losses.subspace_overlap_penalty(task, sensitive)
    (gradient,) = torch.autograd.grad(value, [task[0][0]])
    assert value == 0 and gradient.abs().sum() == 0
    assert losses.subspace_overlap_penalty(sensitive, [(0 * b, a) for b, a in sensitive]) == 0


@pytest.mark.parametrize("name", ["cross_covariance_penalty", "squared_cosine_penalty"])
def test_gradients_of_orthogonality_equal_finite_differences_and_stop_at_the_sensitive_features(name):
    task, sensitive = features_of(n=5, p=3, q=3)
    task.requires_grad_(), sensitive.requires_grad_()
    penalty = getattr(losses, name)
    assert torch.autograd.gradcheck(lambda z: penalty(z, sensitive.detach()), task)
    _, gradient = torch.autograd.grad(penalty(task, sensitive).sum(), [task, sensitive], allow_unused=True)
    assert gradient is None
    factors, others = factors_of(seed=0, layers=1), factors_of(seed=1, layers=1)
    assert torch.autograd.gradcheck(
        lambda b, a: losses.subspace_overlap_penalty([(b, a)], others), [f.requires_grad_() for f in factors[0]]
    )


@pytest.mark.parametrize("device", DEVICES)
def test_entropy_and_distance_to_uniform(device):
    logits, _, _ = draw(classes=3, device=device)
    share = logits.softmax(-1)
    entropy, distance = losses.prediction_entropy(logits), losses.cross_entropy_to_uniform(logits)
    assert entropy.shape == distance.shape == logits.shape[:-1]
    slow = [-sum(p * math.log(p) for p in row) for row in share.flatten(0, -2).tolist()]
    assert entropy.flatten().tolist() == pytest.approx(slow, abs=1e-12)
    slow = [-sum(math.log(p) for p in row) / 3 for row in share.flatten(0, -2).tolist()]
    assert distance.flatten().tolist() == pytest.approx(slow, abs=1e-12)
    assert (entropy <= math.log(3)).all() and (distance >= math.log(3)).all()
    certain = torch.tensor([[800.0, 0.0]], device=device)
    assert losses.prediction_entropy(certain) == 0 and losses.cross_entropy_to_uniform(certain) == 400
