"""Group metrics from counts against fairlearn: point values, and resampled values for a whole study.

    python benchmarks/metrics.py           about two minutes on one core; writes benchmarks/results/metrics.json

The point values are those of one model on 16,000 examples: accuracy, selection rate, true and false positive rate of
each group. The resampled values are those behind the intervals of a study: 1,000 resamples of 10,315 test examples for
each of many runs, drawn once for all runs; fairlearn's ``n_boot`` draws them anew for each model.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import fairlearn.metrics
import sklearn.metrics
import torch
import typer
from measuring import cpu_seconds, row, write  # before fairtuning, which it makes importable
from torch import Tensor

from fairtuning import metrics, statistics

TARGET = 1000.0
OURS = {
    "accuracy": metrics.group_accuracy,
    "selection rate": metrics.selection_rate,
    "true positive rate": metrics.true_positive_rate,
    "false positive rate": metrics.false_positive_rate,
}
THEIRS = {
    "accuracy": sklearn.metrics.accuracy_score,
    "selection rate": fairlearn.metrics.selection_rate,
    "true positive rate": fairlearn.metrics.true_positive_rate,
    "false positive rate": fairlearn.metrics.false_positive_rate,
}
#: What each run of a study is judged by: differences between groups, all resampled.
EFFECTS = {
    "demographic parity": (metrics.demographic_parity_difference, fairlearn.metrics.selection_rate),
    "equal opportunity": (metrics.equal_opportunity_difference, fairlearn.metrics.true_positive_rate),
    "false positive rate": (metrics.false_positive_rate_difference, fairlearn.metrics.false_positive_rate),
}


def draw(n: int, runs: int, groups: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """prediction [runs, n], label [n], group [n]: about one positive in four, most predictions right."""
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(groups, (n,), generator=generator)
    label = (torch.rand(n, generator=generator) < 0.15 + 0.15 * group).long()
    wrong = torch.rand(runs, n, generator=generator) < 0.15
    return torch.where(wrong, 1 - label, label), label, group


def frame(
    prediction: Tensor, label: Tensor, group: Tensor, measures: dict[str, Callable], **boot: object
) -> fairlearn.metrics.MetricFrame:
    return fairlearn.metrics.MetricFrame(
        metrics=measures,
        y_true=label.numpy(),
        y_pred=prediction.numpy(),
        sensitive_features=group.numpy(),
        **boot,
    )


def compare_points(n: int, repeats: int) -> list[dict]:
    prediction, label, group = draw(n, 1)
    prediction = prediction[0]

    def ours() -> dict[str, Tensor]:
        counts = metrics.group_counts(prediction, label, group=group, classes=2, groups=2)
        return {name: measure(counts) for name, measure in OURS.items()}

    def theirs() -> dict[str, Tensor]:
        found = frame(prediction, label, group, THEIRS).by_group
        return {name: torch.tensor(found[name].to_numpy(dtype=float)) for name in THEIRS}

    first, second = ours(), theirs()
    difference = max(float((first[name] - second[name]).abs().max()) for name in OURS)
    assert difference < 1e-12, f"fairlearn differs by {difference:.1e}"
    fast = cpu_seconds({"ours": lambda: [ours() for _ in range(100)]}, repeats=repeats)["ours"] / 100
    slow = cpu_seconds({"theirs": theirs}, repeats=max(3, repeats // 3))["theirs"]
    case = f"4 metrics of 2 groups, {n:,} examples"
    note = f"values differ by {difference:.0e} at most"
    return [
        row(case, "counts", seconds=fast, ratio=1.0),
        row(case, "fairlearn MetricFrame", seconds=slow, ratio=slow / fast, target=f">= {TARGET:g}", note=note),
    ]


def compare_resamples(runs: int, resamples: int, few: int, repeats: int, n: int = 10_315) -> list[dict]:
    prediction, label, group = draw(n, runs)

    def ours() -> dict[str, Tensor]:
        counts = statistics.resampled_counts(prediction, label, group=group, classes=2, groups=2, resamples=resamples)
        return {name: measure(counts) for name, (measure, _) in EFFECTS.items()}

    def theirs() -> fairlearn.metrics.MetricFrame:
        measures = {name: measure for name, (_, measure) in EFFECTS.items()}
        return frame(prediction[0], label, group, measures, n_boot=few, ci_quantiles=[0.16, 0.84], random_state=0)

    times = cpu_seconds({"ours": ours, "theirs": theirs}, repeats=repeats)
    slow = times["theirs"] / few * resamples * runs
    # The same spread, within what so few of fairlearn's resamples can tell.
    spread = {name: float(found[:, 0].std()) for name, found in ours().items()}
    low, high = theirs().difference_ci()
    agreement = [float((high[name] - low[name]) / 2 / spread[name]) for name in EFFECTS]
    assert all(0.5 < one < 2 for one in agreement), agreement
    case = f"{resamples:,} resamples, {runs} runs, {n:,} examples"
    note = f"{few} resamples of one run timed, x{resamples * runs // few:,}; half widths, theirs over ours: "
    return [
        row(case, "resampled_counts, 3 differences", seconds=times["ours"], ratio=1.0),
        row(
            case,
            "fairlearn MetricFrame(n_boot), 3 differences",
            seconds=slow,
            ratio=slow / times["ours"],
            target=f">= {TARGET:g}",
            note=note + ", ".join(f"{one:.2f}" for one in agreement),
        ),
    ]


def main(
    runs: int = typer.Option(700, help="Runs of the study whose effects are resampled."),
    resamples: int = typer.Option(1000, help="Resamples of the examples."),
    few: int = typer.Option(40, help="Resamples that fairlearn is timed on, for one run."),
    repeats: int = typer.Option(5, help="Rounds in which each variant is timed once."),
    output: Path = typer.Option(Path(__file__).parent / "results" / "metrics.json", help="Where the results go."),
) -> None:
    """Time group metrics and their resampled values against fairlearn's."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="fairlearn")
    found = compare_points(16_000, 3 * repeats) + compare_resamples(runs, resamples, few, repeats)
    write(found, output, packages=("torch", "fairlearn", "scikit-learn", "pandas"))


if __name__ == "__main__":
    typer.run(main)
