"""The book's pages on arXiv 2410.17358: what stands in the place of missing runs, and what is shown of planted ones."""

import ast
import json
import re
from types import SimpleNamespace

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure as Canvas

import planted
from fairtuning import claims, papers, report
from fairtuning.metrics import METRICS
from fairtuning.pages import figures, records, scoreboard, tables
from fairtuning.paths import ROOT
from fairtuning.statistics import estimate
from fairtuning.studies import STUDIES, bench
from fairtuning.studies import sukumaran2024 as study
from fairtuning.studies.sukumaran2024 import measures
from fairtuning.studies.sukumaran2024.tables import vit_parameters

NAME = "sukumaran2024"
FOUR = ["LoRA", "FairLoRA", "FFT", "FairFFT"]
WATERBIRDS = ("table2", "groups", "groups-fft", "rule", "baselines", "ranks", "collapse")
#: Pages that show nothing of ours without records, and their profile and size.
OURS = dict.fromkeys(("waterbirds", "groups", "ranks", "radar", "noise"), ("compact", 112)) | {"grid": ("gpu", 224)}
NOTEBOOKS = sorted((ROOT / "notebooks" / NAME).glob("*.ipynb"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results in which every run of the Waterbirds pages has a planted record; only ever read."""
    folder = tmp_path_factory.mktemp("planted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAIRTUNING_RESULTS", str(folder))
        planted.fill([label for item in (*WATERBIRDS, "kinds") for label in study.LABELS[item]])
        planted.fill(
            [label for item in ("table2", "groups", "ranks", "grid") for label in study.LABELS[item]], profile="gpu"
        )
    return folder


@pytest.fixture
def full(folder, monkeypatch):
    monkeypatch.setenv("FAIRTUNING_RESULTS", str(folder))
    return report.results(NAME, "compact")


def shown(thing):
    """The HTML of what a cell shows; a figure is drawn, though not made an SVG of, which takes most of the time."""
    if isinstance(thing, figures.Figure):
        with matplotlib.rc_context():
            thing.draw(Canvas(figsize=thing.size), figures.COLOURS["light"])
        return thing.alt
    return thing._repr_html_() if hasattr(thing, "_repr_html_") else str(thing)


def run(path, **parameters):
    """What the code cells of a notebook show, run here and not in a kernel."""
    space, found = {}, []
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            body = ast.parse("".join(cell["source"])).body
            last = body.pop() if isinstance(body[-1], ast.Expr) else None
            exec(compile(ast.Module(body, []), path.name, "exec"), space)
            if last:
                found.append(shown(eval(compile(ast.Expression(last.value), path.name, "eval"), space)))
            if "parameters" in cell["metadata"].get("tags", []):
                assert set(parameters) <= set(space)
                space |= parameters
    return "\n".join(found)


# ----------------------------------------------------------------------------------------------------------- notebooks
@pytest.mark.filterwarnings("ignore::UserWarning")  # matplotlib on figures without a renderer
@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem != "audit"], ids=lambda p: p.stem)
def test_every_page_renders_without_records_and_with_all(path, folders, folder, monkeypatch):
    before = run(path)
    profile, size = OURS.get(path.stem, ("", 0))
    if profile:
        assert "Not run yet." in before and f"fairtuning run sukumaran2024 --profile {profile} --only " in before
        assert 'href="../../book/records' not in before
    assert not list(folders.rglob("*.jsonl")), "a page only reads"
    monkeypatch.setenv("FAIRTUNING_RESULTS", str(folder))
    after = run(path)
    if profile:
        assert f"ViT-Tiny/16 at {size} px" in after and "Not run yet." not in after and after != before
        assert 'href="../../book/records/sukumaran2024.html#run-' in after
    assert "nan" not in re.sub(r"<[^>]*>", "", after).lower().split()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_parameters_show_other_runs(full):
    waterbirds = next(path for path in NOTEBOOKS if path.stem == "waterbirds")
    assert "FairLoRA/r=8" in run(waterbirds, rank=8, seeds=3)
    other = run(waterbirds, penalty=7.0)
    assert "No records yet: FairLoRA/lambda=7, FairFFT/lambda=7" in other and "compute = True" in other


def test_a_page_of_records_alone_imports_no_backbone():
    for path in NOTEBOOKS:
        assert not re.search(r"\b(?:import|from) (?:timm|peft|fairtuning\.vision)", path.read_text())


# -------------------------------------------------------------------------------------------------------------- report
def test_the_profile_shown():
    assert [report.shown(name) for name in ("zhang2024", NAME)] == ["paper", "compact"]
    assert {row["profile"] for row in report.coverage() if row["paper"] == NAME} <= {"compact", None}


def test_data_sets_are_kept_apart(full, folders, monkeypatch):
    """The cells of GeoDE take nothing from Waterbirds; in the classroom its own data takes Waterbirds' place."""
    monkeypatch.setitem(study.PROFILES, "mine", study.PROFILES["classroom"])
    assert not report.runnable(NAME, "mine", "waterbirds") and report.runnable(NAME, "mine", "parity")
    measured = [report.measured_on(NAME, profile, "waterbirds") for profile in ("compact", "classroom", "mine")]
    assert measured == ["waterbirds", "parity", "waterbirds"] and report.in_place("parity", "parity") == "parity"
    faces = SimpleNamespace(data_name="celeba", runs=full.runs)  # given, but not of the cells' data
    assert all(row["ours"] is None for row in report.table(NAME, "table2", profile="compact", found=faces))
    assert report.runnable(NAME, "compact", "waterbirds") and report.runnable(NAME, "classroom", "waterbirds")
    assert not report.runnable(NAME, "compact", "geode") and report.runnable(NAME, "paper", "geode")
    assert all(row["ours"] is None for row in report.table(NAME, "table1", profile="compact", found=full))
    assert report.read(NAME, ["LoRA"], profile="compact", data="celeba") is None


def test_labels_with_missing_seeds_are_left_out(full):
    assert set(report.read(NAME, FOUR, profile="compact").runs) == set(FOUR)
    assert set(report.read(NAME, ["LoRA/r=8", "FFT"], profile="compact", seeds=4).runs) == {"LoRA/r=8", "FFT"}
    assert report.read(NAME, ["FFT"], profile="compact", seeds=9) is None


def test_table_5_is_counted_and_needs_no_run(folders):
    for row in report.table(NAME, "table5", profile="compact"):
        ours, printed = row["ours"]["mean"], row["published"]["mean"]
        if row["column"] != "total" or row["row"] == "r=8":  # percentages are printed of each row's own total
            assert ours == pytest.approx(printed, abs=0.005)
        else:
            assert ours > printed == vit_parameters(rank=8, classes=40)[1]  # the total of the first row, in every row
    state = {(row["item"], row["data"]): row["state"] for row in report.coverage()}
    assert state["Table 5", "geode"] == state["Table 5", "aircraft"] == "reproduced"
    html = tables.paper_table(NAME, "table5", data=None)._repr_html_()
    assert "counted: no run is needed" in html and "325,672" in html


# ------------------------------------------------------------------------------------------------------------ measures
def test_labels_of_methods():
    assert measures.label_of("FFT", rank=8, penalty=1.0, groups="cell", backbone="clip") == "FFT/clip"
    label = measures.label_of("FairFFT", rank=8, penalty=10.0, groups="cell", data="celeba")
    assert label == "FairFFT/lambda=10/groups=cell/celeba"
    assert study.resolve(label)["penalty"] == 10 and study.resolve(label)["place"] == "celeba"


def test_functions_of_counts(full):
    counts = full.counts("FairLoRA")[0]
    recalls = [[int(counts[g, y, y]) / int(counts[g, y].sum()) for y in range(2)] for g in range(2)]
    shares = torch.tensor([[4.0, 1.0], [2.0, 3.0]])
    adjusted = sum(float(shares[g, y]) / 10 * recalls[g][y] for g in range(2) for y in range(2))
    assert float(measures.adjusted_accuracy(counts, shares)) == pytest.approx(adjusted)
    assert float(measures.cell_recall(counts, 1, 0)) == pytest.approx(recalls[1][0])
    natural = counts.sum(-1).double()
    assert float(measures.adjusted_accuracy(counts, natural)) == pytest.approx(
        float(METRICS["accuracy"].function(counts))
    )


@pytest.mark.parametrize("metric", ["accuracy", "worst_cell_accuracy"])
def test_effects_of_counts_are_those_of_metrics(full, metric):
    ours = measures.count_effect(full, METRICS[metric].function, "FairLoRA", minus="LoRA")
    expected = full.effect("FairLoRA", metric, minus="LoRA")
    assert ours.by_seed.tolist() == expected.by_seed.tolist()
    assert torch.equal(ours.resampled, expected.resampled)


def test_searches_tell_what_was_tried(full):
    store = report.Store.of(NAME, "compact")
    rates, penalties = measures.searches(store, "compact", "FairLoRA")
    assert [run.learning_rate for run, _ in rates] == list(study.PROFILES["compact"]["rates"]["lora"])
    assert [run.penalty for run, _ in penalties] == list(study.PROFILES["compact"]["penalties"])
    assert all(record["configuration"]["penalty"] == run.penalty for run, record in penalties)


# --------------------------------------------------------------------------------------------------- tables and figures
def test_differences_are_the_effects(full):
    table = tables.differences(full, [("FairLoRA", "LoRA"), ("FFT", "absent")], measures.measures(full), caption="")
    one = estimate(measures.measures(full)["Acc"]("FairLoRA", minus="LoRA"))
    assert table.rows[0][1] == f"{one.effect:.1f}<br>[{one.low:.1f}, {one.high:.1f}]" and len(table.rows) == 1
    assert one.effect == pytest.approx(100 * float(full.effect("FairLoRA", "accuracy", minus="LoRA").by_seed.mean()))
    assert isinstance(tables.differences(None, [("FairLoRA", "LoRA")], {}, caption=""), tables.Missing)
    # three seeds against five do not pair
    assert isinstance(
        tables.differences(full, [("LoRA/r=8", "LoRA")], measures.measures(full), caption=""), tables.Missing
    )


def drawn(figure):
    canvas = Canvas(figsize=figure.size)
    figure.draw(canvas, figures.COLOURS["light"])
    return canvas


def test_dots_show_ours_and_the_papers(full):
    columns = measures.measures(full)
    vit = {f"ViT {label}": label for label in FOUR}
    published = tables.published_by_metric(NAME, "table2", data="waterbirds", labels=vit)
    assert published["FairFFT", "Recall min"]["mean"] == 78.95
    figure = figures.dots(full, FOUR, published=published, metrics=columns, shown=["Acc", "F1 diff"], aligned=True)
    left, right = drawn(figure).axes
    xs = [x for line in left.lines for x in line.get_xdata()]
    for label in FOUR:
        assert any(abs(x - 100 * full.values(label, "accuracy").mean()) < 1e-6 for x in xs)
        assert published[label, "Acc"]["mean"] in xs
    width = [high - low for low, high in (left.get_xlim(), right.get_xlim())]
    assert width[0] == pytest.approx(width[1])
    assert "LoRA: " in figure.alt and "(paper 91.83)" in figure.alt


def test_a_method_has_one_colour_and_marker_in_every_figure():
    colours = figures.COLOURS["light"]
    found = figures.look(["FairLoRA", "FairLoRA/groups=cell", "LoRA, two classes", "your own"], colours)
    assert found["palette"]["FairLoRA"] == found["palette"]["FairLoRA/groups=cell"] == colours[1]
    assert found["dashes"]["FairLoRA"] != found["dashes"]["FairLoRA/groups=cell"]
    assert found["markers"]["LoRA, two classes"] == figures.look(["LoRA"], colours)["markers"]["LoRA"]
    assert found["palette"]["your own"] not in (colours[0], colours[1])
    for names in (study.LABELS["table2"], bench.METHODS):
        looks = figures.look(names, colours)
        drawn = [tuple(looks[part][name] for part in ("palette", "markers", "dashes")) for name in names]
        assert len(set(drawn)) == len(drawn)


def test_dots_leave_no_panel_empty(full):
    columns = measures.measures(full)
    for panels in (5, 6, 7):
        figure = figures.dots(full, FOUR, metrics=columns, shown=list(columns)[:panels])
        axes = drawn(figure).axes
        assert len(axes) == panels and all(one.lines for one in axes)


def test_dots_without_records(full):
    assert isinstance(figures.dots(None, FOUR, metrics={}, shown=["Acc"]), tables.Missing)
    published = tables.published_by_metric(NAME, "table6", data="aircraft")
    figure = figures.dots(None, ["CLIP LoRA", "LoRA"], published=published, metrics={}, shown=["Acc"])
    [axes] = drawn(figure).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["CLIP LoRA"]


def test_the_best_of_each_backbone_is_marked(full):
    html = tables.paper_table(NAME, "table2", data="waterbirds", profile="compact", blocks=True)._repr_html_()
    # highest printed accuracy of each backbone, lowest F1 difference
    for value in ("93.87 ± 0.58", "89.27 ± 1.12", "91.83 ± 0.08", "18.58 ± 1.15", "15.86 ± 1.24", "12.66 ± 0.15"):
        assert f"<strong>{value} ★</strong>" in html
    best = max(FOUR, key=lambda label: full.values(label, "accuracy").mean())
    mean = 100 * float(full.values(best, "accuracy").mean())
    assert re.search(rf"<strong>{mean:.2f} ± [\d.]+ ★", html)
    assert "ViT-Tiny/16 at 112 px" in html and "over 5 seeds (the paper's over 3 runs)" in html


def test_state_names_scale_gap_and_command(full):
    html = tables.state(NAME, [*FOUR, "LoRA/clip", "LoRA/celeba", "FairLoRA/lambda=3"], full, profile="compact").text
    assert "No records yet: LoRA/celeba, FairLoRA/lambda=3" in html and "--only celeba" in html
    assert "Profile compact does not offer: LoRA/clip" in html and "compute = True" in html
    whole = tables.state(NAME, FOUR, full, profile="compact")
    assert whole.text == "" and whole.title == (
        "Measured here: profile compact, data waterbirds, ViT-Tiny/16 at 112 px, 5 seeds."
    )


# -------------------------------------------------------------------------------------------- scoreboard, record pages
def test_scoreboard_names_every_paper_and_its_profile(full, tmp_path):
    found = {path.name: path.read_text() for path in scoreboard.write(tmp_path)}
    assert set(found) == {"scoreboard-light.svg", "scoreboard-dark.svg", "scoreboard.md"}
    for name in STUDIES:
        arxiv, profile = papers.load_published(name)["paper"]["arxiv"], report.shown(name)
        headline = f"arXiv {arxiv}, profile {profile}"
        assert headline in found["scoreboard.md"] and headline in scoreboard.figure().alt
    assert "profile compact, not the paper's scale" in found["scoreboard.md"]
    assert "A verdict of this profile is about its scale, not about the paper's." in found["scoreboard.md"]
    verdicts = report.verdicts(NAME, profile="compact")
    assert {v.verdict for v in verdicts if v.id == "P2-C1" and v.data == "waterbirds"} <= set(scoreboard.ORDER[:3])
    assert all(f"| {v.id}: " in found["scoreboard.md"] for v in verdicts if v.verdict != "not yet")


def test_a_second_profile_shows_what_the_first_has_no_runs_on(monkeypatch):
    def verdicts(study, *, profile):
        said = {"paper": ("supported", "not yet"), "compact": ("contradicted", "supported")}[profile]
        return [
            claims.Verdict(id="P1-C4", data=data, profile=profile, verdict=one, reason="")
            for data, one in zip(("adult", "celeba"), said, strict=True)
        ]

    monkeypatch.setattr(scoreboard.studies, "STUDIES", ("zhang2024",))
    monkeypatch.setattr(report, "verdicts", verdicts)
    monkeypatch.setattr(report, "profiles", lambda study: ["paper", "compact"])
    found = [[(v.profile, v.data, v.verdict) for v in block] for block in scoreboard._blocks(None)]
    assert found == [[("paper", "adult", "supported")], [("compact", "celeba", "supported")]]
    assert len(scoreboard._blocks("compact")) == 1 and len(scoreboard._blocks("compact")[0]) == 2


def test_every_number_leads_to_a_section_of_records(full, tmp_path):
    page = next(path for path in records.write(tmp_path) if path.stem == NAME).read_text()
    anchors = re.findall(r"^\(run-(\w+)\)=$", page, re.M)
    assert len(anchors) == len(set(anchors)), "two labels of the same runs share a section"
    found = [full, report.results(NAME, "compact", "kinds"), report.results(NAME, "gpu")]
    links = {key for link in tables.RecordsBehind(NAME, *found).links for key in re.findall(r"#run-(\w+)", link)}
    assert links == set(anchors)
    assert f"fairtuning verify {NAME} --profile compact --key {anchors[0]}" in page
    store = report.Store.of(NAME, "compact")
    searched = [key for key, record in store.records.items() if record["configuration"]["evaluate"] == "validation"]
    listed = page.partition("### Searches")[2]
    assert searched and all(f"`{key}`" in listed for key in searched)


def test_searches_stand_once_with_the_rules_that_select(full, tmp_path):
    store = report.Store.of(NAME, "compact")
    labels = ["LoRA", "FairLoRA", "FairLoRA/groups=cell", "FFT"]
    rows = measures.search_rows(store, "compact", labels)
    rates = study.PROFILES["compact"]["rates"]
    assert [row[:3] for row in rows[:4]] == [["LoRA", "rate", f"{rate:g}"] for rate in rates["lora"]]
    assert [row[0] for row in rows[4:]] == ["FairLoRA"] * 3 + ["FairLoRA/groups=cell"] * 3 + ["FFT"] * 4
    for of, setting in (("LoRA", "learning_rate"), ("FairLoRA/groups=cell", "penalty")):
        rule = "R1" if setting == "learning_rate" else "R2"
        [taken] = [float(row[2]) for row in rows if row[0] == of and rule in row[5]]
        assert taken == full.records(of)[0]["configuration"][setting]
        assert all(row[5] in ("", "R1") for row in rows if row[1] == "rate")
    empty = measures.search_rows(report.Store(tmp_path / "none.jsonl"), "compact", ["LoRA"])
    assert [row[3:] for row in empty] == [["not run", "not run", ""]] * 4


def test_record_pages_without_records(folders, tmp_path):
    for path in records.write(tmp_path):
        assert "No records yet: `fairtuning run " in path.read_text()
