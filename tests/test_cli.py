"""The command line as a user or a machine meets it: help, JSON forms, one-line errors, exit statuses."""

import json
import os
import subprocess
import sys

import pytest

from fairtuning import cli, papers, paths, report
from fairtuning.claims import load
from fairtuning.pages import tables
from fairtuning.runs import Store
from fairtuning.studies import zhang2024

COMMANDS = [
    "",
    "data",
    "data list",
    "data fetch",
    "data verify",
    "data pack",
    "run",
    "table",
    "claims",
    "coverage",
    "rerun",
    "verify",
    "transcript",
    "transcript verify",
    "transcript compare",
    "transcript make",
]
VERDICTS = {"supported", "contradicted", "unresolved", "not yet", "not testable here"}
CLASSROOM = ["--profile", "classroom"]


@pytest.fixture
def fairtuning(monkeypatch, capsys):
    """Runs the command line in this process: exit status, standard output, standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fairtuning", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def records(classroom, monkeypatch):
    """The session's classroom records stand where committed ones would."""
    monkeypatch.setenv("FAIRTUNING_RESULTS", str(classroom.path.parent))
    return classroom


def objects(answer):
    status, out, err = answer
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert isinstance(found, list) and found and all(isinstance(one, dict) for one in found)
    return found


# ---------------------------------------------------------------------------------------------------- help and errors
@pytest.mark.parametrize("command", COMMANDS)
def test_help(fairtuning, command):
    status, out, err = fairtuning(*command.split(), "--help")
    assert (status, err) == (0, "") and "Usage: fairtuning" in out


@pytest.mark.parametrize(
    "command, words",
    [
        ("run zhang2025", ["unknown study 'zhang2025'", "zhang2024"]),
        ("claims zhang2025", ["unknown study"]),
        ("verify zhang2025", ["unknown study"]),
        ("table zhang2025 table1", ["'zhang2025'", "zhang2024, sukumaran2024"]),
        ("run zhang2024 --profile huge", ["profile is 'huge'", "paper, classroom, compact"]),
        ("claims --profile huge", ["profile is 'huge'"]),
        ("coverage --profile huge", ["profile is 'huge'"]),
        ("table zhang2024 table3 --profile huge", ["profile is 'huge'"]),
        ("verify zhang2024 --profile huge", ["profile is 'huge'"]),
        ("table zhang2024 table9", ["'table9'", "table1, table2"]),
        ("run zhang2024 --only table9", ["'table9'", "table1, table2"]),
        ("run zhang2024 --seeds 0", ["seeds is 0", "1 or more"]),
        ("run zhang2024 --seeds -3", ["seeds is -3"]),
        ("run zhang2024 --seeds many", ["--seeds", "integer"]),
        ("run zhang2024 --only figure4 --executor threads", ["executor is 'threads'", "inline, processes"]),
        ("run", ["argument"]),
        ("run zhang2024 --quick", ["--quick"]),
        ("walk", ["'walk'"]),
        ("verify zhang2024", ["holds no records", "fairtuning run zhang2024"]),
        ("verify zhang2024 --sample 0", ["--sample is 0"]),
        ("data fetch adults", ["unknown data set 'adults'", "adult, census"]),
        ("data verify adult", ["adult.data", "is not there"]),
        ("data pack digits", ["digits has no images to pack"]),
        ("data pack waterbirds --size huge", ["size is 'huge'", "80x64"]),
    ],
)
def test_a_mistake_is_one_line_on_standard_error(fairtuning, folders, command, words):
    status, out, err = fairtuning(*command.split())
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert all(word in err for word in words), err
    assert "Traceback" not in out + err
    assert not list(folders.rglob("*.jsonl"))


def test_a_wrong_store_is_one_line(fairtuning, folders):
    path = Store.path_of("zhang2024", "classroom")
    path.parent.mkdir()
    path.write_text('{"kind": "record"}\n{"torn')
    for command in ("run zhang2024", "table zhang2024 figure4", "claims", "coverage", "verify zhang2024"):
        status, _, err = fairtuning(*command.split(), *CLASSROOM)
        assert status == 2 and err.count("\n") == 1 and "line 1 is not a record" in err, err


def test_a_key_that_fits_none_or_many(fairtuning, records):
    status, _, err = fairtuning("verify", "zhang2024", *CLASSROOM, "--key", "xyz")
    assert status == 2 and "'xyz' fits 0 records" in err and err.count("\n") == 1
    status, _, err = fairtuning("verify", "zhang2024", *CLASSROOM, "--key", "")
    assert status == 2 and f"fits {len(records.records)} records" in err


def test_a_process_of_its_own(folders):
    """As a shell starts it: no traceback, exit status 2; and a Ctrl-C is a line too."""
    command = [sys.executable, "-m", "fairtuning.cli"]
    wrong = subprocess.run([*command, "run", "zhang2024", "--seeds", "0"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "") and wrong.stderr == "error: seeds is 0; allowed: 1 or more\n"


def test_ctrl_c(fairtuning, folders, monkeypatch):
    from fairtuning import runs

    def stop(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "ensure", stop)
    status, _, err = fairtuning("run", "zhang2024", *CLASSROOM)
    assert status == 130 and err.splitlines()[-1] == "stopped; what is recorded stays, start again to go on"


LIGHT = """
import sys
import fairtuning, fairtuning.cli, fairtuning.paths
heavy = {"torch", "timm", "peft", "numpy", "sklearn", "matplotlib", "pandas", "yaml", "rich.table"} & set(sys.modules)
assert not heavy, heavy
"""


def test_importing_is_light():
    """torch takes seconds to import: neither the package nor the command line's help may need it (cf. benchmarks)."""
    subprocess.run([sys.executable, "-c", LIGHT], check=True, env=os.environ | {"PYTHONPATH": str(paths.ROOT / "lib")})


# --------------------------------------------------------------------------------------------------------------- data
def test_data(fairtuning, folders):
    found = objects(fairtuning("data", "list", "--json"))
    assert {"adult", "census", "digits"} <= {one["name"] for one in found}
    assert all(one.keys() == {"name", "title", "needs", "licence"} for one in found)
    assert "adult" in fairtuning("data", "list")[1]
    assert "generated" in fairtuning("data", "verify", "census")[1]
    assert "needs no files" in fairtuning("data", "fetch", "digits")[1]


# ------------------------------------------------------------------------------------------------------------ reading
def test_claims_json(fairtuning, records):
    found = objects(fairtuning("claims", "zhang2024", *CLASSROOM, "--json"))
    names = ["id", "data", "profile", "verdict", "effect", "interval", "n", "reason"]
    named = {"adult": "census"}  # the generated data stands in for the paper's, under its own name
    expected = [(claim.id, named.get(data, data)) for claim in load("zhang2024") for data in claim.data]
    assert [(one["id"], one["data"]) for one in found] == expected and len(set(expected)) == len(expected)
    for one in found:
        assert set(names) <= set(one)
        assert one["profile"] == "classroom" and one["verdict"] in VERDICTS and one["reason"]
        low, high = one["interval"]
        if one["effect"] is None:
            assert (low, high, one["n"]) == (None, None, 0)
        else:
            assert low <= one["effect"] <= high and one["n"] in (0, 5)
        assert one["reason"].startswith("census in place of adult: ") == (one["data"] == "census")
    verdict = {(one["id"], one["data"]): one["verdict"] for one in found}
    assert verdict["P1-C2", "census"] == "not yet"  # Table 2 is not among the session's records
    assert verdict["P1-C4", "census"] in ("supported", "contradicted", "unresolved")
    assert verdict["P1-C12", "census"] == "supported"  # 742 parameters against 46, by arithmetic
    every = objects(fairtuning("claims", *CLASSROOM, "--json"))
    assert every[: len(found)] == found and {one["id"][:2] for one in every[len(found) :]} == {"P2", "P3"}
    assert "P1-C12" in fairtuning("claims", *CLASSROOM)[1]


def test_claims_without_records(fairtuning, folders):
    found = objects(fairtuning("claims", "--json"))
    assert {one["verdict"] for one in found} <= {"not yet", "not testable here", "supported"}
    assert {(one["id"][:2], one["profile"]) for one in found} == {
        ("P1", "paper"),
        ("P2", "compact"),
        ("P3", "compact"),
    }


def test_table_json(fairtuning, records):
    found = objects(fairtuning("table", "zhang2024", "Fig. 4", *CLASSROOM, "--json"))
    cells = papers.published_cells("zhang2024", "figure4")
    assert [(one["row"], one["column"]) for one in found] == [(cell["row"], cell["column"]) for cell in cells]
    for one, cell in zip(found, cells, strict=True):
        assert {"row", "column", "published", "ours"} <= set(one)
        assert one["published"] == {name: cell[name] for name in ("mean", "spread", "n")}
        if cell["data"] != "adult":
            assert one["ours"] is None
            continue
        ours = one["ours"]
        assert {"mean", "spread", "n", "profile", "records"} <= set(ours) and ours["data"] == "census"
        assert (ours["n"], ours["profile"], len(ours["records"])) == (5, "classroom", 5)
        assert set(ours["records"]) <= set(records.records) and ours["spread"] >= 0
    missing = objects(fairtuning("table", "zhang2024", "table3", *CLASSROOM, "--json"))
    assert [one["ours"] is None for one in missing if one["row"].startswith("Retrain+")] != []
    assert all(one["ours"] is None for one in missing if one["row"].startswith("Retrain+"))
    shown = fairtuning("table", "zhang2024", "figure4", *CLASSROOM)[1]
    page = tables.paper_table("zhang2024", "figure4", data="adult", profile="classroom")
    assert "ours (profile classroom, data census in place of adult;" in page.caption
    assert "OURS" in shown and shown.count("ours: census") == sum(one["ours"] is not None for one in found)


def test_coverage_json(fairtuning, records):
    found = objects(fairtuning("coverage", *CLASSROOM, "--json"))
    assert all({"paper", "item", "state", "profile", "note"} <= set(one) for one in found)
    assert {one["state"] for one in found} <= {"reproduced", "not yet", "not testable here"}
    state = {(one["item"], one["data"]): one for one in found if one["paper"] == "zhang2024"}
    assert state["Figure 4", "adult"]["state"] == "reproduced" and state["Figure 4", "adult"]["profile"] == "classroom"
    assert state["Figure 4", "adult"]["note"] == "with census in place of adult"
    assert state["Table 2", "adult"]["state"] == "not yet" and state["Table 2", "adult"]["profile"] is None
    assert all(one["note"] for one in found if one["state"] != "reproduced")
    listed = {(paper, item["item"]) for paper in papers.STUDIES for item in papers.load_published(paper)["items"]}
    assert {(one["paper"], one["item"]) for one in found} == listed
    assert "Figure 4" in fairtuning("coverage", *CLASSROOM)[1]


def test_no_other_profile_has_data_that_stands_in_for_a_papers(fairtuning, classroom, tmp_path, monkeypatch):
    """A profile of one's own, with the classroom's data and records: none of its numbers is one of Adult."""
    monkeypatch.setenv("FAIRTUNING_RESULTS", str(tmp_path))
    monkeypatch.setitem(zhang2024.PROFILES, "mine", zhang2024.PROFILES["classroom"])
    (tmp_path / "zhang2024-mine.jsonl").write_bytes(classroom.path.read_bytes())
    assert report.read("zhang2024", ["OURS"], profile="mine").data_name == "census"
    assert report.read("zhang2024", ["OURS"], profile="mine", data="adult") is None
    of_adult = [one for one in report.table("zhang2024", "figure4", profile="mine") if one["data"] == "adult"]
    assert of_adult and all(one["ours"] is None for one in of_adult)
    given = report.table("zhang2024", "figure4", profile="mine", found=report.results("zhang2024", "mine"))
    assert all(one["ours"] is None for one in given)
    assert {one.verdict for one in report.verdicts("zhang2024", profile="mine")} == {"not yet"}
    rows = [one for one in report.coverage(profile="mine") if one["data"] == "adult" and one["item"] == "Figure 4"]
    assert [(one["state"], one["note"]) for one in rows] == [("not yet", "profile mine does not run on adult")]
    assert "census" not in fairtuning("table", "zhang2024", "figure4", "--profile", "mine")[1]


# ------------------------------------------------------------------------------------------------------------ running
def test_dry_run_says_what_it_would_cost(fairtuning, folders, records):
    before = records.path.read_bytes()
    status, out, _ = fairtuning("run", "zhang2024", *CLASSROOM, "--only", "Fig. 4", "--dry-run")
    assert status == 0 and f"{len(records.records)} records, 0 runs missing; nothing to do" in out
    status, out, _ = fairtuning("run", "zhang2024", *CLASSROOM, "--only", "figure4", "--seeds", "7", "--dry-run")
    assert status == 0 and " 8 runs missing, about " in out and "minutes" in out
    assert records.path.read_bytes() == before
    status, out, _ = fairtuning("run", "zhang2024", "--only", "figure2", "--dry-run")
    assert status == 0 and "0 records, 0 runs missing; nothing to do" in out


def test_run_computes_what_is_missing(fairtuning, folders):
    run = ["run", "zhang2024", *CLASSROOM, "--only", "figure4", "--executor", "inline", "--seeds"]
    status, out, _ = fairtuning(*run, "1")
    assert status == 0 and " 0 records, 4 runs missing" in out and out.endswith(" 4 records\n")
    assert "nothing to do" in fairtuning(*run, "1")[1]
    status, out, _ = fairtuning(*run, "2")
    assert status == 0 and " 4 records, 4 runs missing" in out and out.endswith(" 8 records\n")
    # fewer than 5 seeds: no verdict, and no mean over a part of the profile's seeds
    found = objects(fairtuning("claims", *CLASSROOM, "--json"))
    assert {one["verdict"] for one in found if one["id"] == "P1-C4"} <= {"not yet", "unresolved"}


def test_verify_all(fairtuning, records):
    before = records.path.read_bytes()
    status, out, _ = fairtuning("verify", "zhang2024", *CLASSROOM, "--all")
    assert status == 0 and f"equal: {len(records.records)} (" in out and "differs: 0\n" in out
    assert records.path.read_bytes() == before


def test_verify_finds_a_record_that_differs(fairtuning, folders, records, tmp_path, monkeypatch):
    keys = list(records.records)
    entries = [json.loads(line) for line in records.path.read_text().splitlines()]
    for entry in entries:
        if entry["key"] == keys[0]:
            entry["accuracy"]["test"] -= 0.1
    folder = tmp_path / "changed"
    folder.mkdir()
    (folder / records.path.name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    monkeypatch.setenv("FAIRTUNING_RESULTS", str(folder))
    status, out, _ = fairtuning("verify", "zhang2024", *CLASSROOM, "--key", keys[0][:12])
    assert status == 1 and f"differs: 1 ({keys[0]})" in out
    status, out, _ = fairtuning("verify", "zhang2024", *CLASSROOM, "--key", keys[1])
    assert status == 0 and f"equal: 1 ({keys[1]})" in out


def test_fresh_writes_elsewhere_and_compares(fairtuning, records, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    before = records.path.read_bytes()
    fresh = ["run", "zhang2024", *CLASSROOM, "--only", "figure4", "--executor", "inline", "--fresh"]
    status, out, _ = fairtuning(*fresh)
    assert status == 0 and " 0 records, 20 runs missing" in out and "equal: 20 (" in out
    assert records.path.read_bytes() == before
    [path] = (tmp_path / "_build" / "fresh").rglob("*.jsonl")
    assert len(Store(path).records) == 20


def test_fewer_than_five_seeds_are_unresolved(fairtuning, classroom, tmp_path, monkeypatch):
    """The same records, but a profile that asks for four seeds."""
    monkeypatch.setenv("FAIRTUNING_RESULTS", str(tmp_path))
    (tmp_path / classroom.path.name).write_bytes(classroom.path.read_bytes())
    monkeypatch.setitem(zhang2024.PROFILES, "classroom", zhang2024.PROFILES["classroom"] | {"seeds": 4})
    found = objects(fairtuning("claims", *CLASSROOM, "--json"))
    tested = [one for one in found if one["n"]]
    assert tested and all(one["n"] == 4 and one["verdict"] == "unresolved" for one in tested)
    assert all("fewer than 5 seeds" in one["reason"] for one in tested)
