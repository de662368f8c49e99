"""Copies of the labs for learners: solutions become empty cells, stored outputs are cleared.

    python notebooks/labs/strip_solutions.py [FOLDER]        FOLDER is _build/student unless given

A solution is a code cell tagged `hide-cell`. The originals stay as they are.
"""

import json
import sys
from pathlib import Path

LABS = Path(__file__).resolve().parent


def stripped(notebook: dict) -> dict:
    """The notebook, changed in place: an empty cell for each solution, no outputs anywhere."""
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        cell.update(outputs=[], execution_count=None)
        if "hide-cell" in cell["metadata"].get("tags", []):
            title = "".join(cell["source"]).splitlines()[0]  # "# Solution 3"
            cell.update(source=title.replace("Solution", "Your answer to exercise") + "\n", metadata={})
        elif "nbval-ignore-output" in cell["metadata"].get("tags", []):
            cell["metadata"]["tags"].remove("nbval-ignore-output")  # there is nothing left to compare
    return notebook


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(LABS.glob("*.ipynb")):
        copy = stripped(json.loads(path.read_text(encoding="utf-8")))
        (folder / path.name).write_text(json.dumps(copy, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(folder / path.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else LABS.parents[1] / "_build/student")
