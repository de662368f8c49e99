"""What importing costs: the package, the command line, and torch beside them, each in a fresh interpreter.

python benchmarks/imports.py           under a minute; writes benchmarks/results/imports.json
"""

import os
import subprocess
import sys
from pathlib import Path

import typer
from measuring import ROOT, row, write

TARGET = 0.3  # seconds
CODE = """
import time
start = time.perf_counter(), time.process_time()
{statement}
print(time.perf_counter() - start[0], time.process_time() - start[1])
"""
STATEMENTS = {
    "import fairtuning": "import fairtuning",
    "import fairtuning.cli": "import fairtuning.cli",
    "import torch": "import torch",
}


def seconds(statement: str) -> tuple[float, float]:
    """Wall and CPU seconds of one statement in a fresh interpreter, whose own start is not counted."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "lib")}
    command = [sys.executable, "-c", CODE.format(statement=statement)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    return float(answer[0]), float(answer[1])


def main(
    repeats: int = typer.Option(5, help="Rounds in which each statement is timed once."),
    output: Path = typer.Option(Path(__file__).parent / "results" / "imports.json", help="Where the results go."),
) -> None:
    """Time imports in fresh interpreters."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in STATEMENTS}
    for _ in range(repeats + 1):  # the first round fills the file system's cache
        for name, statement in STATEMENTS.items():
            found[name].append(seconds(statement))
    median = {name: sorted(wall for wall, _ in times[1:])[repeats // 2] for name, times in found.items()}
    least = {name: min(cpu for _, cpu in times[1:]) for name, times in found.items()}
    rows = []
    for name in STATEMENTS:
        asked = "" if name == "import torch" else f"; asked for: under {TARGET} s"
        note = f"wall time; CPU {least[name]:.3f} s{asked}"
        rows.append(row("import in a fresh interpreter", name, seconds=median[name], note=note))
    write(rows, output, packages=("fairtuning", "typer", "torch"))


if __name__ == "__main__":
    typer.run(main)
