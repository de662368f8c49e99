from collections import Counter

import pytest

from fairtuning.papers import STUDIES, load_published, published_cells, published_item


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
            assert cell["spread"] is None or (cell["spread"] > 0 and cell["n"] == 10)


def test_every_number_of_zhang2024_is_there():
    count = {item["slug"]: len(item["cells"]) for item in load_published("zhang2024")["items"]}
    # 3 x 3; 6 x 4; pre-trained + 6 + OURS, x 3; 7 x 3; 3 x 3 x 3; 5 x 3; 46, 742, 93.8
    assert count == {
        "table1": 9, "table2": 24, "table3": 24, "table4": 21, "figure1": 0, "figure2": 0, "figure3": 3,
        "figure4": 27, "figure5": 15, "parameters": 3,
    }  # fmt: skip


def means(slug, data="adult"):
    return {
        (c["row"], c["column"]): c["mean"] for c in published_cells("zhang2024", slug) if c["data"] == data
    }


def test_printed_changes_agree_with_the_printed_values():
    for slug, before in (("table2", None), ("table3", "pre-trained")):
        mean = means(slug)
        for cell in published_cells("zhang2024", slug):
            if cell["change"] is not None:
                start = mean[before or cell["row"], cell["column"] if before else "bias pre-trained"]
                assert cell["mean"] - start == pytest.approx(cell["change"], abs=5e-4)


def test_what_is_only_drawn_is_marked():
    for item in load_published("zhang2024")["items"]:
        cells = published_cells("zhang2024", item["slug"])
        assert {cell["decoded"] for cell in cells} <= {item["kind"] == "figure"}


def test_printed_saving():
    counts = means("parameters")
    saving = 100 * (1 - counts["OURS", "trainable parameters"] / counts["network", "trainable parameters"])
    assert saving == pytest.approx(counts["OURS", "saving in percent"], abs=0.05)


def test_unknown_names():
    with pytest.raises(ValueError, match="'zhang2023'; permitted: zhang2024, sukumaran2024, kamalaruban2025"):
        load_published("zhang2023")
    with pytest.raises(ValueError, match="no item 'table9' in study 'zhang2024'; permitted: table1, "):
        published_item("zhang2024", "table9")
