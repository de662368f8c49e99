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
        spelled = losses.penalised_loss(
            logits, label.expand(3, -1), group=group.expand(3, -1), penalty=name, lam=0.3
        )
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
        assert float(value.detach()) == pytest.approx(
            slow_penalty(name, logits.detach(), label, group), abs=1e-12
        )
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
