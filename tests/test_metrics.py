"""Group metrics against slow twins (loops over rows in float64), fairlearn, scikit-learn and identities."""

import doctest
import math
import statistics

import fairlearn.metrics
import pytest
import sklearn.metrics
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fairtuning import metrics

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
FAST = settings(deadline=None, max_examples=60)


def draw(*, runs=(), n=400, classes=2, groups=2, seed=0, device="cpu"):
    """Predictions that agree with the label about half the time more than chance, with unequal groups."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(groups, (n,), generator=generator)
    label = torch.randint(classes, (n,), generator=generator)
    noise = torch.randint(classes, (*runs, n), generator=generator)
    keep = torch.rand(*runs, n, generator=generator) < 0.4 + 0.1 * group
    return [t.to(device) for t in (torch.where(keep, label, noise), label, group)]


def counts_of(prediction, label, group, *, classes=2, groups=2):
    return metrics.group_counts(prediction, label, group=group, classes=classes, groups=groups)


# --- slow twins: rows in, a float out --------------------------------------------------------------------


def share(rows, hit):
    rows = list(rows)
    return sum(map(hit, rows)) / len(rows) if rows else math.nan


def gap(values):
    values = list(values)
    return math.nan if any(map(math.isnan, values)) else max(values) - min(values)


def smallest(values):
    values = list(values)
    return math.nan if any(map(math.isnan, values)) else min(values)


def ratio(values):
    return smallest(values) / max(values) if max(values) > 0 else math.nan


def slow_f1(rows, c):
    tp = sum(t == c and p == c for p, t, _ in rows)
    wrong = sum((t == c) != (p == c) for p, t, _ in rows)
    return 2 * tp / (2 * tp + wrong) if tp + wrong else math.nan


def slow(rows, *, classes, groups):
    """All metrics by name, from rows (prediction, label, group)."""
    inside = [[r for r in rows if r[2] == g] for g in range(groups)]
    right = lambda r: r[0] == r[1]  # noqa: E731
    chosen = lambda r: r[0] == 1  # noqa: E731
    f1 = [slow_f1(rows, c) for c in range(classes)]
    recall = [share([r for r in rows if r[1] == c], right) for c in range(classes)]
    size = [sum(r[1] == c for r in rows) for c in range(classes)]
    weighted = sum(f * s for f, s in zip(f1, size, strict=True) if s) / len(rows) if rows else math.nan
    tpr = [share([r for r in part if r[1] == 1], chosen) for part in inside]
    fpr = [share([r for r in part if r[1] != 1], chosen) for part in inside]
    one_vs_rest = []
    for c in range(classes):
        pairs = [
            [share([r for r in rows if r[1] == c and (r[2] == g) == own], right) for own in (True, False)]
            for g in range(groups)
        ]
        gaps = [abs(a - b) for a, b in pairs]
        one_vs_rest.append(math.nan if any(map(math.isnan, gaps)) else max(gaps))
    fpr_gap, tpr_gap = gap(fpr), gap(tpr)
    return {
        "accuracy": share(rows, right),
        "weighted_f1": weighted,
        "error": 100 - 100 * weighted,
        "positive_class_f1": f1[1],
        "min_class_f1": smallest(f1),
        "median_class_f1": math.nan if any(map(math.isnan, f1)) else statistics.median(f1),
        "class_f1_gap": gap(f1),
        "min_class_recall": smallest(recall),
        "class_recall_gap": gap(recall),
        "demographic_parity_difference": gap(share(part, chosen) for part in inside),
        "demographic_parity_ratio": ratio([share(part, chosen) for part in inside]),
        "equalized_odds_difference_sum": tpr_gap + fpr_gap,
        "equalized_odds_difference_max": -smallest([-tpr_gap, -fpr_gap]),
        "equalized_odds_one_vs_rest_max": one_vs_rest[1] if classes == 2 else sum(one_vs_rest) / classes,
        "equal_opportunity_difference": tpr_gap,
        "false_positive_rate_difference": fpr_gap,
        "true_positive_rate_ratio": ratio(tpr),
        "false_positive_rate_ratio": ratio(fpr),
        "worst_group_accuracy": smallest(share(part, right) for part in inside),
        "worst_cell_accuracy": smallest(
            share([r for r in part if r[1] == c], right) for part in inside for c in range(classes)
        ),
        "base_rate_difference": gap(share(part, lambda r: r[1] == 1) for part in inside),
    }


def rows_of(prediction, label, group):
    return list(zip(prediction.tolist(), label.tolist(), group.tolist(), strict=True))


@st.composite
def tables(draw_from, *, classes=2, groups=2, top=6):
    shape = [groups, classes, classes]
    cells = draw_from(st.lists(st.integers(0, top), min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(cells).reshape(shape)


def explode(counts):
    """The rows (prediction, label, group) that have these counts."""
    g, t, p = counts.nonzero(as_tuple=True)
    return [x.repeat_interleave(counts[g, t, p]) for x in (p, t, g)]


def filled(counts):
    """Every cell group x label has an example."""
    return bool((counts.sum(-1) > 0).all())


# --- counts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("runs", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("classes, groups, chunk", [(2, 2, 2**18), (3, 4, 2**18), (2, 2, 130), (2, 2, 1)])
def test_counts_equal_a_loop_over_rows(runs, classes, groups, chunk, device, monkeypatch):
    monkeypatch.setattr(metrics, "_CHUNK", chunk)  # small ones cut the runs into blocks
    prediction, label, group = draw(runs=runs, n=60, classes=classes, groups=groups, device=device)
    counts = counts_of(prediction.to(torch.uint8), label, group, classes=classes, groups=groups)
    assert counts.dtype == torch.int64 and counts.device.type == device
    slow_counts = torch.zeros(*runs, groups, classes, classes, dtype=torch.int64)
    for run in torch.cartesian_prod(*map(torch.arange, runs), torch.tensor([0])).reshape(-1, len(runs) + 1):
        at = tuple(run[:-1].tolist())
        for p, t, g in rows_of(prediction[at], label, group):
            slow_counts[(*at, g, t, p)] += 1
    assert torch.equal(counts.cpu(), slow_counts)


@FAST
@given(tables(classes=3, groups=2))
def test_counts_of_exploded_counts_are_the_counts(counts):
    assert torch.equal(counts_of(*explode(counts), classes=3), counts)


def test_counts_refuse_values_out_of_range_and_wrong_shapes():
    prediction, label, group = draw(n=10)
    with pytest.raises(ValueError, match="prediction has values from 0 to 7; permitted are 0 to 1"):
        counts_of(prediction.clone().index_fill_(0, torch.tensor([3]), 7), label, group)
    with pytest.raises(ValueError, match="label has values from -1"):
        counts_of(prediction, label.clone().index_fill_(0, torch.tensor([3]), -1), group)
    with pytest.raises(ValueError, match="group has values from 2 to 3; permitted are 0 to 1"):
        counts_of(prediction, label, group + 2)
    with pytest.raises(ValueError, match=r"label has shape \[9\]; permitted: \[10\]"):
        counts_of(prediction, label[:9], group)
    with pytest.raises(ValueError, match="prediction has dtype torch.float32"):
        counts_of(prediction.float(), label, group)
    with pytest.raises(ValueError, match="counts have shape"):
        metrics.accuracy(torch.zeros(2, 2, 3))


# --- metrics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", metrics.METRICS)
@pytest.mark.parametrize("classes, groups", [(2, 2), (2, 3), (4, 3)])
def test_metric_equals_its_slow_twin_on_batches(name, classes, groups, device):
    prediction, label, group = draw(runs=(3,), classes=classes, groups=groups, device=device)
    counts = counts_of(prediction, label, group, classes=classes, groups=groups)
    value = metrics.METRICS[name].function(counts)
    twin = [slow(rows_of(p, label, group), classes=classes, groups=groups)[name] for p in prediction]
    assert value.dtype == torch.float64 and value.shape == (3,) and value.device.type == device
    assert value.tolist() == pytest.approx(twin, abs=1e-12)
    assert torch.equal(metrics.METRICS[name].function(counts.float()), value)  # resampled counts are float32


@FAST
@given(st.sampled_from([(2, 2), (3, 2), (2, 3)]).flatmap(lambda s: tables(classes=s[0], groups=s[1], top=3)))
def test_metrics_equal_their_twins_on_small_and_empty_cells(counts):
    groups, classes, _ = counts.shape
    twins = slow(rows_of(*explode(counts)), classes=classes, groups=groups)
    assert set(twins) == set(metrics.METRICS)
    for name, twin in twins.items():
        value = float(metrics.METRICS[name].function(counts))
        assert value == pytest.approx(twin, abs=1e-12, nan_ok=True), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "function, twin",
    [
        (metrics.group_accuracy, lambda r: (r, lambda x: x[0] == x[1])),
        (metrics.selection_rate, lambda r: (r, lambda x: x[0] == 2)),
        (metrics.true_positive_rate, lambda r: ([x for x in r if x[1] == 2], lambda x: x[0] == 2)),
        (metrics.false_positive_rate, lambda r: ([x for x in r if x[1] != 2], lambda x: x[0] == 2)),
        (metrics.base_rate, lambda r: (r, lambda x: x[1] == 2)),
    ],
)
def test_group_rates_of_another_positive_class(function, twin, device):
    prediction, label, group = draw(classes=3, groups=3, device=device)
    counts = counts_of(prediction, label, group, classes=3, groups=3)
    value = function(counts) if function is metrics.group_accuracy else function(counts, positive=2)
    rows = rows_of(prediction, label, group)
    expected = [share(*twin([r for r in rows if r[2] == g])) for g in range(3)]
    assert value.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_class_scores_equal_scikit_learn(device):
    prediction, label, group = draw(classes=4, groups=3, device=device)
    counts = counts_of(prediction, label, group, classes=4, groups=3)
    y, p = label.tolist(), prediction.tolist()
    assert metrics.class_f1(counts).tolist() == pytest.approx(sklearn.metrics.f1_score(y, p, average=None))
    recall = sklearn.metrics.recall_score(y, p, average=None)
    assert metrics.class_recall(counts).tolist() == pytest.approx(recall)


@FAST
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 7)), min_size=2, max_size=30))
def test_auroc_equals_scikit_learn_with_ties(examples):
    label, score = (torch.tensor(column) for column in zip(*examples, strict=True))
    counts = torch.zeros(2, 8, dtype=torch.int64).index_put_((label, score), torch.tensor(1), accumulate=True)
    if len(label.unique()) == 1:
        assert metrics.auroc(counts).isnan()
    else:
        expected = sklearn.metrics.roc_auc_score(label.tolist(), score.tolist())
        assert float(metrics.auroc(counts)) == pytest.approx(expected, abs=1e-12)
    assert torch.allclose(metrics.auroc(torch.stack([counts, counts])), metrics.auroc(counts), equal_nan=True)


@FAST
@given(tables(classes=3, groups=2, top=3))
def test_weighted_f1_equals_scikit_learn_with_absent_classes(counts):
    assume(counts.sum() > 0)
    prediction, label, _ = (x.tolist() for x in explode(counts))
    expected = sklearn.metrics.f1_score(label, prediction, average="weighted", zero_division=0)
    assert float(metrics.weighted_f1(counts)) == pytest.approx(expected, abs=1e-12)
    assert float(metrics.error(counts)) == pytest.approx(100 - 100 * expected, abs=1e-9)


FAIRLEARN = {
    "demographic_parity_ratio": fairlearn.metrics.demographic_parity_ratio,
    "true_positive_rate_ratio": fairlearn.metrics.true_positive_rate_ratio,
    "demographic_parity_difference": fairlearn.metrics.demographic_parity_difference,
    "equalized_odds_difference_max": fairlearn.metrics.equalized_odds_difference,
    "equal_opportunity_difference": fairlearn.metrics.equal_opportunity_difference,
    "false_positive_rate_difference": fairlearn.metrics.false_positive_rate_difference,
    "false_positive_rate_ratio": fairlearn.metrics.false_positive_rate_ratio,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", [2, 5])
def test_group_metrics_equal_fairlearn(groups, device):
    prediction, label, group = draw(groups=groups, n=700, device=device)
    counts = counts_of(prediction, label, group, groups=groups)
    y, p, s = label.tolist(), prediction.tolist(), group.tolist()
    for name, function in FAIRLEARN.items():
        expected = function(y, p, sensitive_features=s)
        assert float(metrics.METRICS[name].function(counts)) == pytest.approx(expected, abs=1e-12), name
    frame = fairlearn.metrics.MetricFrame(
        metrics={
            "selection_rate": fairlearn.metrics.selection_rate,
            "true_positive_rate": fairlearn.metrics.true_positive_rate,
            "false_positive_rate": fairlearn.metrics.false_positive_rate,
            "group_accuracy": sklearn.metrics.accuracy_score,
        },
        y_true=y,
        y_pred=p,
        sensitive_features=s,
    )
    for name in frame.by_group.columns:
        expected = frame.by_group[name].tolist()
        assert getattr(metrics, name)(counts).tolist() == pytest.approx(expected, abs=1e-12), name
    differences = frame.difference(method="between_groups")
    eo_sum = differences["true_positive_rate"] + differences["false_positive_rate"]
    assert float(metrics.equalized_odds_difference_sum(counts)) == pytest.approx(eo_sum, abs=1e-12)
    assert float(metrics.worst_group_accuracy(counts)) == pytest.approx(frame.group_min()["group_accuracy"])


# --- empty groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_empty_group_is_nan_and_never_zero(device):
    counts = torch.tensor([[[5, 1], [2, 4]], [[0, 0], [0, 0]]], device=device)
    between = [name for name in metrics.METRICS if "class" not in name]
    for name in set(between) - {"accuracy", "weighted_f1", "error"}:
        assert metrics.METRICS[name].function(counts).isnan(), name
    for name in set(metrics.METRICS) - set(between) | {"accuracy", "weighted_f1", "error"}:
        assert metrics.METRICS[name].function(counts).isfinite(), name
    for rate in (metrics.selection_rate, metrics.true_positive_rate, metrics.group_accuracy):
        assert rate(counts).isnan().tolist() == [False, True]
    for metric in metrics.METRICS.values():
        assert metric.function(torch.zeros_like(counts)).isnan()


def test_empty_cell_touches_only_the_metrics_that_need_it():
    no_positives = torch.tensor([[[5, 1], [2, 4]], [[3, 2], [0, 0]]])
    assert metrics.equal_opportunity_difference(no_positives).isnan()
    assert metrics.equalized_odds_difference_sum(no_positives).isnan()
    assert metrics.worst_cell_accuracy(no_positives).isnan()
    assert metrics.demographic_parity_difference(no_positives).isfinite()
    assert metrics.false_positive_rate_difference(no_positives).isfinite()


# --- identities ------------------------------------------------------------------------------------------


@FAST
@given(tables(top=20))
def test_ranges_and_order_of_the_conventions(counts):
    assume(filled(counts))
    total = float(metrics.equalized_odds_difference_sum(counts))
    largest = float(metrics.equalized_odds_difference_max(counts))
    assert 0 <= float(metrics.demographic_parity_difference(counts)) <= 1
    assert 0 <= largest <= total <= 2 * largest + 1e-12 and total <= 2
    assert 0 <= float(metrics.error(counts)) <= 100
    worst = float(metrics.worst_group_accuracy(counts))
    assert float(metrics.worst_cell_accuracy(counts)) <= worst + 1e-12
    assert worst <= float(metrics.accuracy(counts)) + 1e-12


@FAST
@given(tables(classes=3, groups=3, top=9))
def test_perfect_classifier_has_the_base_rate_gap_and_no_odds_gap(counts):
    perfect = torch.diag_embed(counts.sum(-1))
    assume(filled(perfect))
    parity = metrics.demographic_parity_difference(perfect)
    assert torch.equal(parity, metrics.base_rate_difference(perfect))
    assert torch.equal(parity, metrics.base_rate_difference(counts))
    assert metrics.equalized_odds_difference_sum(perfect) == 0
    assert metrics.equalized_odds_one_vs_rest_max(perfect) == 0
    assert metrics.error(perfect) == 0 and metrics.worst_cell_accuracy(perfect) == 1


@FAST
@given(tables(top=20))
def test_two_class_accuracy_follows_from_the_class_f1s(counts):
    f0, f1 = metrics.class_f1(counts).tolist()
    assume(0 < f0 < 1 and 0 < f1 < 1)
    identity = 1 - 1 / (1 + f1 / (2 * (1 - f1)) + f0 / (2 * (1 - f0)))
    assert float(metrics.accuracy(counts)) == pytest.approx(identity, abs=1e-12)


@FAST
@given(tables(classes=2, groups=3, top=9))
def test_metrics_ignore_the_order_of_groups_and_copies_of_the_data(counts):
    for name, metric in metrics.METRICS.items():
        value = float(metric.function(counts))
        for same in (counts.flip(-3), counts * 7):
            assert float(metric.function(same)) == pytest.approx(value, abs=1e-12, nan_ok=True), name


@FAST
@given(tables(top=9))
def test_with_two_groups_the_one_vs_rest_gap_is_equal_opportunity(counts):
    value = float(metrics.equalized_odds_one_vs_rest_max(counts))
    expected = float(metrics.equal_opportunity_difference(counts))
    assert value == pytest.approx(expected, abs=1e-12, nan_ok=True)
    other = float(metrics.equalized_odds_one_vs_rest_max(counts, positive=0))
    flipped = float(metrics.equal_opportunity_difference(counts.flip(-1, -2)))
    assert other == pytest.approx(flipped, abs=1e-12, nan_ok=True)


@FAST
@given(st.lists(tables(top=5), min_size=2, max_size=4))
def test_batch_equals_one_at_a_time(many):
    for metric in metrics.METRICS.values():
        one_by_one = torch.stack([metric.function(counts) for counts in many])
        torch.testing.assert_close(metric.function(torch.stack(many)), one_by_one, equal_nan=True)


def test_metric_table_and_examples():
    for name, metric in metrics.METRICS.items():
        assert metric.function.__name__ == name and metric.title and metric.unit in ("", "%")
        assert metric.better in ("lower", "higher", None)
    assert doctest.testmod(metrics).failed == 0
