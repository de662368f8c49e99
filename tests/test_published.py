from collections import Counter

import pytest

from fairtuning.papers import STUDIES, load_published, published_cells, published_item

RUNS = {"zhang2024": 10, "sukumaran2024": 3}


@pytest.mark.parametrize(
    "study, tables, figures", [("zhang2024", 4, 5), ("sukumaran2024", 6, 12), ("kamalaruban2025", 8, 14)]
)
def test_every_table_and_figure_is_listed(study, tables, figures):
    items = load_published(study)["items"]
    assert Counter(item["kind"] for item in items) | {"text": 1} == {
        "table": tables,
        "figure": figures,
        "text": 1,
    }
    numbered = {f"Table {i + 1}" for i in range(tables)} | {f"Figure {i + 1}" for i in range(figures)}
    assert numbered <= {item["item"] for item in items}
    assert len({item["slug"] for item in items}) == len(items)


@pytest.mark.parametrize("study", STUDIES)
def test_shape(study):
    published = load_published(study)
    assert published["paper"].keys() == {"id", "slug", "arxiv", "title", "authors", "year"}
    assert published["paper"]["slug"] == study
    for item in published["items"]:
        assert item.keys() - {"note", "not_testable"} == {"item", "slug", "kind", "data", "caption", "cells"}
        cells = published_cells(study, item["slug"])
        assert len({(cell["row"], cell["column"], cell["data"]) for cell in cells}) == len(cells)
        for cell in cells:
            assert cell["data"] in item["data"] and isinstance(cell["mean"], int | float)
            assert isinstance(cell["row"], str)
            assert cell["spread"] is None or (cell["spread"] > 0 and cell["n"] == RUNS[study])


def test_every_number_of_zhang2024_is_there():
    count = {item["slug"]: len(item["cells"]) for item in load_published("zhang2024")["items"]}
    # 3 x 3; 6 x 4; pre-trained + 6 + OURS, x 3; 7 x 3; 3 x 3 x 3; 5 x 3; 46, 742, 93.8
    assert count == {
        "table1": 9, "table2": 24, "table3": 24, "table4": 21, "figure1": 0, "figure2": 0, "figure3": 3,
        "figure4": 27, "figure5": 15, "parameters": 3,
    }  # fmt: skip


def test_every_number_of_sukumaran2024_is_there():
    count = {item["slug"]: len(item["cells"]) for item in load_published("sukumaran2024")["items"] if item["cells"]}
    # 3 backbones x 4 methods x 4 (2 in Table 3) measures; bars: 4 methods x 2, 3 x 6 means; 3 x 2 x 3 x 2 x 5 by rank
    assert count == {
        "table1": 48, "table2": 48, "table3": 24, "table4": 6, "table5": 15, "table6": 48, "figure1": 8,
        "figure2": 18, "figure11": 8, "figure12": 8, "ranks": 180,
    }  # fmt: skip


def means(slug, data="adult", study="zhang2024"):
    return {(c["row"], c["column"]): c["mean"] for c in published_cells(study, slug) if c["data"] == data}


def test_printed_changes_agree_with_the_printed_values():
    for slug, before in (("table2", None), ("table3", "pre-trained")):
        mean = means(slug)
        for cell in published_cells("zhang2024", slug):
            if cell["change"] is not None:
                start = mean[before or cell["row"], cell["column"] if before else "bias pre-trained"]
                assert cell["mean"] - start == pytest.approx(cell["change"], abs=5e-4)


@pytest.mark.parametrize("study, drawn", [("zhang2024", "figure"), ("sukumaran2024", ("figure", "text"))])
def test_what_is_only_drawn_is_marked(study, drawn):
    for item in load_published(study)["items"]:
        cells = published_cells(study, item["slug"])
        assert {cell["decoded"] for cell in cells} <= {item["kind"] in drawn}


def test_printed_saving():
    counts = means("parameters")
    saving = 100 * (1 - counts["OURS", "trainable parameters"] / counts["network", "trainable parameters"])
    assert saving == pytest.approx(counts["OURS", "saving in percent"], abs=0.05)


def test_two_class_f1s_give_the_accuracy_of_dino_and_vit_but_not_of_clip():
    """Of two classes the F1 values fix the accuracy; a typing error in Table 2 would show here."""
    found = means("table2", "waterbirds", "sukumaran2024")
    for row in dict.fromkeys(row for row, _ in found):
        low, gap = (found[row, column] / 100 for column in ("F1 min", "F1 diff"))
        implied = 100 * (1 - 1 / (1 + sum(f / (2 * (1 - f)) for f in (low, low + gap))))
        if row.startswith("CLIP"):
            assert 6 < found[row, "Acc"] - implied < 8
        else:
            assert found[row, "Acc"] == pytest.approx(implied, abs=0.011)


def test_table_5_of_sukumaran2024_is_arithmetic():
    found = means("table5", "aircraft", "sukumaran2024") | means("table5", "geode", "sukumaran2024")
    for rank in (8, 16, 32, 64, 128):
        classes = 40 if rank == 8 else 100
        adapters, head = 12 * rank * (768 + 2304), 769 * classes
        assert found[f"r={rank}", "trainable"] == adapters + head
        total = 85_798_656 + adapters + 2 * head  # ViT-B/16, and the classifier twice as peft counts
        assert found[f"r={rank}", "percent"] == pytest.approx(100 * (adapters + head) / total, abs=0.005)
        assert (found[f"r={rank}", "total"] == total) == (rank == 8)  # printed in every row, true of the first


def test_unknown_names():
    with pytest.raises(ValueError, match="'zhang2023'; permitted: zhang2024, sukumaran2024, kamalaruban2025"):
        load_published("zhang2023")
    with pytest.raises(ValueError, match="no item 'table9' in study 'zhang2024'; permitted: table1, "):
        published_item("zhang2024", "table9")
