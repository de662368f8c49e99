"""All runs of arXiv 2403.00625 on Adult from nothing, as a reader would start them.

    python benchmarks/study.py             about five minutes on two cores; writes benchmarks/results/study.json

Wall time of `fairtuning run zhang2024 --executor processes` with an empty store, Adult already fetched.
"""

import os
import tempfile
import time
from pathlib import Path

import typer
from measuring import row, write  # which makes the checkout's fairtuning importable

from fairtuning import datasets, report, runs, studies


def main(
    profile: str = typer.Option("paper", help="Scale of the runs: classroom, compact or paper."),
    output: Path = typer.Option(Path(__file__).parent / "results" / "study.json", help="Where the results go."),
) -> None:
    """Time every run of the study, one process per core."""
    study = studies.study("zhang2024")
    datasets.fetch("adult")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        store = runs.ensure(
            study, report.labels(study), profile=profile, executor_name="processes", folder=Path(folder)
        )
        seconds = time.perf_counter() - start
    case = f"{len(store.records):,} trainings, profile {profile}, {os.cpu_count()} cores"
    note = f"wall time; {len(store.records) / seconds:.1f} trainings a second; ratio: minutes"
    found = [row(case, "fairtuning run zhang2024", seconds=seconds, ratio=seconds / 60, target="<= 9.99", note=note)]
    write(found, output, packages=("torch",))


if __name__ == "__main__":
    typer.run(main)
