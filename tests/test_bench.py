"""The comparison of methods: labels, selection, stacks, what each method does, and a page for somebody's own data."""

import csv
from dataclasses import asdict, replace
from importlib import import_module

import numpy as np
import pytest
import torch

from fairtuning import FairtuningError, claims, report, runs
from fairtuning.analysis import MissingRuns, Results
from fairtuning.cli import main
from fairtuning.datasets import DataError, GroupedData, own
from fairtuning.losses import cross_entropy
from fairtuning.networks import head, mlp_parameters, stack
from fairtuning.pages import comparison
from fairtuning.runs import key_of, pack, unpack
from fairtuning.studies import bench, sukumaran2024
from fairtuning.studies.bench import METHODS, Run, resolve, seeded, selected, tables, units
from fairtuning.studies.bench.configuration import LABELS, PROFILES, STACKED, STUDY, labels_of, place
from fairtuning.vision import features

work = import_module("fairtuning.studies.bench.work")
CENSUS = PROFILES["classroom"]["data"]["census"]


def census(method="ERM", *, seed=0, **settings):
    run = Run(data="census", method=method, learning_rate=0.01, **CENSUS | {"epochs": 3})
    return seeded(replace(run, **settings), seed)


def records_of(unit):
    return [line for line in bench.work(unit) if line["kind"] == "record"]


def predictions(record, split="test"):
    return unpack(record["predictions"][split])


# ------------------------------------------------------------------------------------------------- labels and selection
def test_a_label_names_a_row():
    assert resolve("adult/variance by cell/R2") == {"method": "variance by cell", "rule": "R2", "place": "adult"}
    assert resolve("adult/DP=0.9") == {"method": "DP", "given": 0.9, "place": "adult"}
    assert resolve("adult/DFR")["method"] == "DFR"


@pytest.mark.parametrize(
    "label, words",
    [
        ("adult", "unknown run label 'adult'; allowed: ERM, MLP"),
        ("adult/JTT/R1", "unknown run label 'adult/JTT/R1'"),
        ("adult/ERM/R3", "unknown modifier 'R3' in 'adult/ERM/R3'; allowed: R1, R2"),
        ("adult/DFR/R1", "rule is 'R1' in 'adult/DFR/R1'; allowed: none"),
        ("adult/DP=2", "strength is '2' in 'DP=2'; allowed: 0.1, 0.5, 0.7, 0.9"),
        ("adult/DP=much", "strength is 'much'"),
        ("adult/DFR=1", "allowed: none"),
        ("adult/DP=0.9/R1", "allowed: none, for nothing is selected"),
    ],
)
def test_an_unknown_label_is_one_line(label, words):
    with pytest.raises(FairtuningError) as error:
        resolve(label)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_every_method_has_the_same_budget():
    assert {len(method.strengths) for method in METHODS.values()} == {0, 4}
    assert all(set(method.told) <= {"training", "validation", "test"} for method in METHODS.values())


def test_selection_is_of_erms_rate_by_r1_then_of_the_strength_by_the_rule():
    def lookup(run):
        assert run.evaluate == "validation"
        if run.method == "ERM":
            accuracy, worst = {0.001: (0.7, 0.1), 0.003: (0.90, 0.2), 0.01: (0.895, 0.5)}.get(run.learning_rate, (0, 0))
        else:
            assert run.learning_rate == 0.003  # R1's, whatever the label's rule
            accuracy, worst = {0.1: (0.91, 0.3), 1.0: (0.902, 0.6)}.get(run.strength, (0.5, 0.9))
        return {"accuracy": {"validation": accuracy}, "worst": {"validation": worst}}

    chosen = {label: selected(f"census/{label}", "classroom", lookup)[0] for label in ("ERM/R1", "ERM/R2", "DFR")}
    assert [run.learning_rate for run in chosen.values()] == [0.003, 0.01, 0.003]
    for label, strength in (("variance by cell/R1", 0.1), ("variance by cell/R2", 1.0)):
        run, searches = selected(f"census/{label}", "classroom", lookup)
        assert (run.strength, run.evaluate, len(searches)) == (strength, "test", 2)
    run, searches = selected("census/DP=0.9", "classroom", lambda run: None)
    assert (run.strength, len(searches)) == (0.9, 1)


def test_runs_without_records_are_planned_and_the_test_rows_are_read_once():
    search, strengths, final = STUDY.phases("classroom", labels_of("census"), 5, lambda run: None)
    assert len(search) == 4 * 3 and len(strengths) == 9 * 4 * 3
    assert {run.evaluate for run in (*search, *strengths)} == {"validation"}
    assert {run.evaluate for run in final} == {"test"} and len(set(final)) == len(final)
    for unit in units([*search, *strengths, *final]):
        assert len(unit) <= 40
        assert len({str(replace(run, seed=0, order_seed=0, strength=0.0)) for run in unit}) == 1


# ------------------------------------------------------------------------------------------------------------- methods
@pytest.mark.parametrize("method", METHODS)
def test_a_run_in_a_stack_does_what_it_does_alone(method):
    strengths = METHODS[method].strengths or (0.0,)
    varied = strengths if method in STACKED else strengths[:1]
    unit = [census(method, seed=seed, strength=strength) for seed in (0, 1) for strength in varied[:2]]
    together = records_of(unit)
    alone = records_of([unit[-1]])[0]
    assert (predictions(together[-1]) == predictions(alone)).mean() > 0.999
    assert together[-1]["accuracy"]["validation"] == pytest.approx(alone["accuracy"]["validation"], abs=0.002)
    assert together[-1]["worst"].keys() == {"validation", "test"}


def test_the_split_head_starts_as_erms_head():
    data = bench.load(place(census()))
    start = stack([mlp_parameters((data.inputs.shape[1], 2), seed=seed) for seed in (0, 1)])
    torch.testing.assert_close(head(work._factored(start, data), data.inputs), head(start, data.inputs))


def test_reweighting_is_the_mean_over_cells():
    data = bench.load(place(census()))
    rows = data.part("training")
    cell, objective = work._objective([census("reweighting")], data, rows)
    logits = torch.randn(1, len(rows), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = cross_entropy(logits, data.label[rows][None])[0]
    expected = torch.stack([loss[cell == c].mean() for c in range(4)]).mean()
    torch.testing.assert_close(objective(logits, data.label[rows][None], cell[None])[0], expected)


def test_balanced_rows_depend_on_the_seed_alone():
    cell = torch.tensor([0] * 90 + [1] * 10)
    two = work._balanced([census(seed=3), census(seed=4)], cell)
    assert torch.equal(two[1], work._balanced([census(seed=4)], cell)[0]) and not torch.equal(two[0], two[1])
    assert abs(float((cell[two] == 1).double().mean()) - 0.5) < 0.15


def biased(n=3000):
    """Scores that put group 1 well above group 0, at equal labels."""
    random = np.random.default_rng(0)
    group, label = torch.from_numpy(random.integers(0, 2, (2, n)))
    score = 2.0 * label - 1 + 1.5 * group - 0.75 + torch.from_numpy(random.normal(0, 1, n))
    split = torch.arange(n) % 3
    names = (("no", "yes"), ("a", "b"), ("training", "validation", "test"))
    return GroupedData("biased", "", "0" * 64, score[:, None], label, group, split, *names)


@pytest.mark.parametrize("method, metric", [("threshold DP", "DP"), ("threshold EO", "EO")])
def test_thresholds_close_the_gap_that_they_are_asked_to_close(method, metric):
    data = biased()
    rows = {split: data.part(split) for split in ("validation", "test")}
    scores = {split: torch.stack([-data.inputs[i, 0], data.inputs[i, 0]], -1) for split, i in rows.items()}

    def gap(scores, split):
        index = rows[split]
        chosen, group, label = scores[split].argmax(-1).double(), data.group[index], data.label[index]
        if metric == "DP":
            return float((chosen[group == 1].mean() - chosen[group == 0].mean()).abs())
        rates = [[chosen[(group == g) & (label == y)].mean() for g in (0, 1)] for y in (0, 1)]
        return float(max(abs(a - b) for a, b in rates))

    decided = work._thresholds(Run(method=method), data, scores)
    assert gap(scores, "test") > 0.3
    assert gap(decided, "validation") < 0.05 and gap(decided, "test") < 0.12


def test_dfr_trains_on_the_validation_rows_alone():
    data = bench.load(place(census()))
    other = replace(data, inputs=torch.where((data.split == 1)[:, None], -data.inputs, data.inputs))
    assert data.split_names[1] == "training"
    for one, two in zip(
        work._refit(census("DFR"), data).values(), work._refit(census("DFR"), other).values(), strict=True
    ):
        torch.testing.assert_close(one, two)


# -------------------------------------------------------------------------------------------------------------- records
@pytest.fixture(scope="module")
def store(tmp_path_factory):
    labels = ["ERM/R1", "ERM/R2", "group DRO/R2", "DP/R2", "DP=0.9", "DFR", "threshold DP"]
    folder = tmp_path_factory.mktemp("bench")
    return runs.ensure(
        bench, [f"census/{row}" for row in labels], profile="classroom", seeds=2, folder=folder, progress=False
    )


def test_searches_hold_no_prediction_of_a_test_row(store):
    for record in store.records.values():
        assert record["predictions"].keys() == {record["configuration"]["evaluate"]}
        run = bench.configuration(record)
        assert key_of(run, digest=record["data"]["digest"], version=record["version"]) == record["key"]
        assert asdict(bench.configuration(record)) == record["configuration"]


def test_rows_differences_frontier_and_tables(store):
    found = bench.results(store, "classroom", seeds=2, data="census")
    assert tables.rows(found, "R2") == ["ERM/R2", "DP/R2", "DP=0.9", "group DRO/R2", "DFR", "threshold DP"]
    assert {"ERM/R1", "DFR", "threshold DP"} <= set(tables.rows(found, "R1"))
    differences = bench.differences(found, "R2")
    assert len(differences) == 5 * 4
    by = {(one.row, one.metric): one for one in differences}
    one = by["DP=0.9", "demographic_parity_difference"]
    expected = found.values("DP=0.9", one.metric) - found.values("ERM/R2", one.metric)
    assert one.estimate.effect == pytest.approx(float(expected.mean()))
    # the shortcut of the generated census is what these methods are for
    assert by["group DRO/R2", "worst_cell_accuracy"].estimate.effect > 0.05
    assert by["DP=0.9", "demographic_parity_difference"].estimate.effect < 0
    points = bench.frontier(store, "classroom", "census")
    assert {method: len(settings) for method, settings in points.items()} == {"ERM": 4, "DP": 4, "group DRO": 4}
    table = comparison.methods_table("census", found)._repr_html_()
    assert "intensity<br>0.9, given" in table and "largest group loss" in table
    assert "★" in comparison.differences_table("census", found)._repr_html_() or all(d.p >= 0.05 for d in differences)
    assert "<img" in comparison.frontier_figure("census", points)._repr_html_()


def test_what_a_row_is_told():
    told = {row: comparison.told(row) for row in ("ERM/R1", "ERM/R2", "group DRO/R2", "DP=0.9", "DFR", "threshold DP")}
    assert list(told.values()) == [
        "nowhere",
        "validation",
        "training, validation",
        "training",
        "validation",
        "validation, test",
    ]


def test_adapters_of_the_papers_stand_beside_the_heads_where_task_and_images_are_the_same(folders):
    import planted as p2

    p2.fill(["LoRA/utkface", "FairLoRA/utkface", "LoRA"])
    assert bench.adapters("adult", "compact") == bench.adapters("lfw", "compact") == {}
    assert bench.adapters("census", "classroom") == {}
    beside = bench.adapters("utkface", "compact")["sukumaran2024"]
    assert list(beside.runs) == ["LoRA/utkface", "FairLoRA/utkface"]
    assert list(bench.adapters("waterbirds", "compact")["sukumaran2024"].runs) == ["LoRA"]
    ours, theirs = PROFILES["compact"]["data"], sukumaran2024.PROFILES["compact"]["data"]
    for data in ("waterbirds", "celeba", "utkface"):  # else no adapter would ever stand beside a head
        assert {name: ours[data].get(name) for name in ("size", "label", "attribute")} == {
            name: theirs[data].get(name) for name in ("size", "label", "attribute")
        }
    plain, fair = (comparison._adapter_row("sukumaran2024", beside, row) for row in beside.runs)
    assert ">LoRA<" in plain[0] and "/utkface" not in fair[0]
    told, setting = 1, -3
    assert (plain[told], plain[setting]) == ("nowhere", "-")
    assert fair[told] == "validation" and fair[setting].startswith("lambda<br>")


def test_lines_of_the_penalty_on_adapters_start_at_plain_lora(folders):
    import planted as p2

    assert bench.adapter_frontier("utkface", "compact") == {}
    store = p2.fill(["FairLoRA/utkface"], seeds=1)
    (line,) = bench.adapter_frontier("utkface", "compact").values()
    assert list(line) == [0.0, *sukumaran2024.PROFILES["compact"]["penalties"]]
    runs_ = [record for record in store.records.values() if record["configuration"]["penalty"] == 10.0]
    (record,) = [record for record in runs_ if record["configuration"]["evaluate"] == "validation"]
    examples = store.examples[next(key for key in store.examples if "validation" in key)]
    right = unpack(record["predictions"]["validation"]) == unpack(examples["label"])
    assert line[10.0]["accuracy"] == pytest.approx(right.mean())


def test_no_records_is_one_line(tmp_path):
    with pytest.raises(MissingRuns, match="bench has no records in profile compact; `fairtuning run bench"):
        bench.results(runs.Store.of("bench", "compact", folder=tmp_path), "compact")


# ---------------------------------------------------------------------------------------------------- across data sets
def planted(order, *, n=4000, seeds=5, seed=0):
    """Results of the rows that ``order`` names, each two points of accuracy better than the one before."""
    random = np.random.default_rng(seed)
    label, group = random.integers(0, 2, (2, n))
    examples = {"key": "x-test", "label": pack(label, classes=2), "group": pack(group, classes=2)}
    examples |= {"label_names": ["no", "yes"], "group_names": ["a", "b"]}
    made = {}
    for place_, row in enumerate(order):
        wrong = random.random((seeds, n)) > 0.7 + 0.04 * place_
        made[row] = [
            {"predictions": {"test": pack(label ^ one, classes=2)}, "data": {"name": "planted"}} for one in wrong
        ]
    return Results(made, examples)


ROWS = ["ERM/R2", "P1/R2", "DP/R2", "EO/R2", "DFR"]


def test_the_order_of_methods_across_data_sets():
    same = {"one": planted(ROWS, seed=1), "two": planted(ROWS, seed=2)}
    agreement = tables.rank_agreement(same, "accuracy", "R2")
    assert float(agreement.by_seed.mean()) > 0.9 and agreement.resampled.shape == (1000, 5)
    ranks = bench.mean_ranks(same, "R2", "accuracy")
    assert {row: mean for row, (mean, _) in ranks.items()} == {row: 5.0 - i for i, row in enumerate(ROWS)}
    turned = {"one": planted(ROWS, seed=1), "two": planted(ROWS[::-1], seed=2)}
    assert float(tables.rank_agreement(turned, "accuracy", "R2").by_seed.mean()) < -0.9
    with pytest.raises(MissingRuns, match="needs two or more"):
        tables.rank_agreement({"one": same["one"]}, "accuracy", "R2")
    assert tables.ranks(torch.tensor([1.0, 3.0, 1.0, 0.0])).tolist() == [2.5, 1.0, 2.5, 4.0]


def test_claims_name_rows_and_data_that_there_are():
    for claim in claims.load("bench"):
        for data, entry in claim.data.items():
            for part in (*entry.parts, *entry.beside):
                if part.quantity == "difference":
                    assert data in PROFILES["compact"]["data"]
                    assert {f"{data}/{part.arguments[name]}" for name in ("of", "minus")} <= set(LABELS[data])
                else:
                    assert (data, part.quantity) == ("all", "rank_agreement")


def test_verdicts_come_from_planted_results():
    found = {"adult": planted(ROWS, seed=1), "waterbirds": planted(ROWS[::-1], seed=2)}
    said = {(v.id, v.data): v.verdict for v in comparison.verdicts(found)}
    assert (said["B-C2", "adult"], said["B-C2", "waterbirds"]) == ("supported", "contradicted")
    assert said["B-C7", "all"] == "contradicted" and said["B-C2", "lfw"] == "not yet"


def test_without_records_no_claim_has_a_verdict(folders):
    assert {verdict.verdict for verdict in report.verdicts("bench", profile="compact")} == {"not yet"}


# -------------------------------------------------------------------------------------------------------- your own data
def table(folder, n=300):
    random = np.random.default_rng(0)
    with open(folder / "d.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["age", "<b>town</b>", "sex", "paid"])
        for _ in range(n):
            age, sex = random.normal(40, 10), random.choice(["f", "<script>alert(1)</script>"])
            rows.writerow(
                [f"{age:.1f}", random.choice(["a", "b"]), sex, "yes" if age + random.normal(0, 5) > 40 else "no"]
            )
    (folder / "d.yaml").write_text("table: d.csv\nlabel: paid\ngroup: sex\n")
    return folder / "d.yaml"


def run_cli(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["fairtuning", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code or 0


def test_a_page_of_your_own_data(tmp_path, monkeypatch, capsys):
    few = [f"own/{row}" for row in ("ERM/R1", "ERM/R2", "reweighting/R1", "reweighting/R2")]
    monkeypatch.setattr(bench, "labels_of", lambda data, without: few if without else [*few, "own/DFR"])
    source, output = table(tmp_path), tmp_path / "out"
    assert run_cli(monkeypatch, "bench", "--data", source, "--output", output, "--seeds", 2) == 0
    page = (output / "index.html").read_text()
    for words in ("reweighting", "Less ERM", "small: ", "95 % interval", "<img", "2 seeds", "label 1 is <b>yes</b>"):
        assert words in page
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing is fetched
    lines = (output / "bench-own.jsonl").read_text()
    monkeypatch.setattr(runs, "run_all", None)  # a second time there is nothing to train
    assert run_cli(monkeypatch, "bench", "--data", source, "--output", output, "--seeds", 2) == 0
    assert (output / "bench-own.jsonl").read_text() == lines
    assert (output / "index.html").read_text() == page


def test_each_edition_of_your_data_has_its_own_numbers(tmp_path, monkeypatch):
    """Through one output folder, in any order: once, records were looked up without saying of which data they are."""
    few = [f"own/{row}" for row in ("ERM/R1", "ERM/R2")]
    monkeypatch.setattr(bench, "labels_of", lambda data, without: few)
    source, output = table(tmp_path), tmp_path / "out"
    (tmp_path / "less.yaml").write_text(source.read_text() + "ignore: [age]\n")
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "same.yaml").write_text("# the same people\n" + source.read_text())
    (tmp_path / "moved" / "d.csv").write_text((tmp_path / "d.csv").read_text())

    def accuracy(path):
        seen = []
        real = bench.columns
        monkeypatch.setattr(bench, "columns", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1])
        assert run_cli(monkeypatch, "bench", "--data", path, "--output", output, "--seeds", 2) == 0
        monkeypatch.setattr(bench, "columns", real)
        return seen[0]["own"].values("ERM/R1", "accuracy").tolist()

    first, less = accuracy(source), accuracy(tmp_path / "less.yaml")
    assert min(first) > max(less) + 0.05  # without age there is little to go by
    trained = len(runs.Store(output / "bench-own.jsonl").records)
    assert accuracy(source) == first and accuracy(tmp_path / "less.yaml") == less
    assert accuracy(tmp_path / "moved" / "same.yaml") == first
    assert len(runs.Store(output / "bench-own.jsonl").records) == trained  # nothing of it twice, wherever it lies
    people = (tmp_path / "d.csv").read_text()
    names, *rows = people.splitlines()
    (tmp_path / "d.csv").write_text("\n".join([names, *sorted(rows), ""]))
    accuracy(source)
    assert len(runs.Store(output / "bench-own.jsonl").records) == 3 * trained / 2  # an edited table is another one
    (tmp_path / "d.csv").write_text(people)
    assert accuracy(source) == first


def test_a_table_with_one_input_is_compared_without_p1(tmp_path, monkeypatch):
    few = [f"own/{row}" for row in ("ERM/R1", "ERM/R2", "reweighting/R1", "reweighting/R2")]
    asked = {}
    monkeypatch.setattr(bench, "labels_of", lambda data, without: asked.setdefault("without", without) and few)
    source, output = table(tmp_path), tmp_path / "out"
    source.write_text(source.read_text() + "ignore: ['<b>town</b>']\n")
    assert run_cli(monkeypatch, "bench", "--data", source, "--output", output, "--seeds", 2) == 0
    assert "P1" in asked["without"]
    page = (output / "index.html").read_text()
    assert "P1 is left out: it needs 2 inputs or more, here is 1" in page
    assert not [label for label in labels_of("own", without=["P1"]) if "/P1" in label]


def test_what_is_wrong_with_your_data_is_said_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "ensure", None)
    source = table(tmp_path)
    source.write_text("table: d.csv\nlabel: payed\ngroup: sex\nignore: [phone]\ncolour: red\n")
    assert run_cli(monkeypatch, "bench", "--data", source, "--output", tmp_path / "out") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all(line.startswith("error: ") for line in said)
    assert not (tmp_path / "out").exists()
    assert run_cli(monkeypatch, "bench", "--data", source, "--seeds", 1) == 2
    assert "--seeds is 1; allowed: 2 or more" in capsys.readouterr().err


def test_dfr_is_left_out_where_validation_is_too_small(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(bench, "labels_of", lambda data, without: asked.setdefault("without", without) and [])
    monkeypatch.setattr(runs, "ensure", lambda *a, **k: pytest.fail("stop here"))
    with pytest.raises(pytest.fail.Exception):
        comparison.own_page(table(tmp_path, n=120), tmp_path / "out")
    assert asked["without"] == ["DFR"]


def test_own_images_train_on_features(tmp_path, monkeypatch):
    from PIL import Image

    random = np.random.default_rng(0)
    with open(tmp_path / "d.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "bright", "side"])
        for i in range(120):
            bright, side = i % 2, i // 2 % 2
            pixels = random.integers(0, 100, (16, 16, 3)) + 100 * bright
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{i}.png")
            rows.writerow([f"{i}.png", bright, side])
    (tmp_path / "d.yaml").write_text("images: d.csv\nlabel: bright\ngroup: side\n")
    monkeypatch.setattr(features, "load", lambda data, backbone: data.inputs.float().flatten(2).mean(-1))
    source = str(tmp_path / "d.yaml")
    edition = own.read(source).edition
    run = Run(data="own", source=source, edition=edition, backbone="vit-tiny", learning_rate=0.03, epochs=20)
    with pytest.raises(DataError, match="is another edition .* it was changed meanwhile; start again"):
        records_of([replace(run, edition="0" * 64)])
    (record,) = records_of([run])
    assert record["configuration"]["source"] == "" and str(tmp_path) not in str(record)
    assert record["accuracy"]["test"] == 1.0 and record["parameters"] == 3 * 2 + 2
