"""A notebook rerun with other parameters computes what is missing and shows other numbers."""

import json

import nbformat
import pytest

from fairtuning import FairtuningError
from fairtuning.paths import ROOT
from fairtuning.rerun import rerun

pytest.importorskip("papermill")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
ALPHA = ROOT / "notebooks" / "zhang2024" / "alpha.ipynb"


def tables(path):
    """The HTML of every table that a notebook shows."""
    cells = nbformat.read(path, 4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    return [o["data"]["text/html"] for o in outputs if "<table" in o.get("data", {}).get("text/html", "")]


def test_changed_parameters_compute_what_is_missing_and_change_the_table(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRTUNING_RESULTS", str(tmp_path / "results"))
    store = tmp_path / "results" / "zhang2024-classroom.jsonl"
    shown, counts = [], []
    for index, alphas in enumerate(([0.5, 0.8], [0.5, 0.8], [0.5, 0.7, 0.95])):
        output = tmp_path / f"{index}.ipynb"
        rerun(ALPHA, output, ["profile=classroom", "seeds=2", f"alphas={alphas}"])
        shown.append(tables(output))
        counts.append(sum(json.loads(line)["kind"] == "record" for line in store.read_text().splitlines()))
    # two seeds of alpha = 0.5, 0.8 and 0.2; then nothing new; then 0.7, 0.3, 0.95 and 0.05
    assert counts == [6, 6, 14]
    assert shown[0] == shown[1]
    assert shown[0] != shown[2]
    assert "alpha 0.95 on female" in shown[2][-1] and "alpha 0.95" not in shown[0][-1]
    committed = tables(ALPHA)
    assert committed and committed[0] != shown[0][0], "the book's table is of other runs"


@pytest.mark.parametrize("parameter", ["alfas=[0.5]", "alphas", "=1"])
def test_an_unknown_parameter_is_refused(tmp_path, parameter):
    with pytest.raises(FairtuningError, match="has no parameter .* it has profile, seeds, split_seed, alphas"):
        rerun(ALPHA, tmp_path / "out.ipynb", [parameter])
    assert list(tmp_path.iterdir()) == []


def test_a_failing_run_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRTUNING_RESULTS", str(tmp_path / "results"))
    with pytest.raises(FairtuningError, match="profile is 'huge'; allowed: paper, classroom, compact"):
        rerun(ALPHA, tmp_path / "out.ipynb", ["profile=huge"])
    assert not (tmp_path / "out.ipynb").exists()


def test_an_existing_output_is_kept(tmp_path):
    (tmp_path / "out.ipynb").write_text("mine")
    with pytest.raises(FairtuningError, match="exists already"):
        rerun(ALPHA, tmp_path / "out.ipynb", [])
    assert (tmp_path / "out.ipynb").read_text() == "mine"
