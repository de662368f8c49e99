"""Somebody's own data: what is read, how it is split and encoded, and that everything wrong with it is said at once."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from fairtuning.datasets import DataError, own

YAML = "table: d.csv\nlabel: paid\ngroup: sex\n"


def rows_of(n=400, seed=0):
    random = np.random.default_rng(seed)
    group = random.choice(["a", "b"], n)
    age = random.normal(40, 10, n).round(1)
    label = np.where(age + 5 * (group == "a") + random.normal(0, 5, n) > 42, "yes", "no")
    town = random.choice(["Kyiv", "Łódź", "Oslo"], n)
    columns = zip(age, town, group, label, strict=True)
    return [dict(zip(("age", "town", "sex", "paid"), row, strict=True)) for row in columns]


def write(folder, rows, yaml=YAML):
    with open(folder / "d.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "d.yaml").write_text(yaml)
    return folder / "d.yaml"


def lines(path):
    with pytest.raises(own.Problems) as error:
        own.read(path)
    assert isinstance(error.value, DataError)
    assert all("\n" not in line for line in error.value.lines)
    return error.value.lines


# -------------------------------------------------------------------------------------------------------- what is read
def test_a_table_becomes_grouped_data(tmp_path):
    rows = rows_of()
    data = own.read(write(tmp_path, rows))
    assert (data.name, data.label_names, data.group_names) == ("own", ("no", "yes"), ("a", "b"))
    assert data.feature_names == ("age", "town=Kyiv", "town=Oslo", "town=Łódź")  # neither label nor group among them
    assert data.label.tolist() == [row["paid"] == "yes" for row in rows]
    assert data.group.tolist() == [row["sex"] == "b" for row in rows]
    training = data.inputs[data.part("training")]
    assert torch.allclose(training.mean(0), torch.zeros(4, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(training.std(0, correction=0), torch.ones(4, dtype=torch.float64))
    towns = torch.stack([data.inputs[:, i] > 0 for i in (1, 2, 3)]).sum(0)
    assert (towns == 1).all()
    again = own.read(tmp_path / "d.yaml")
    assert again.digest == data.digest and torch.equal(again.split, data.split)


def test_each_part_has_its_share_of_every_label_in_every_group(tmp_path):
    data = own.read(write(tmp_path, rows_of(600)))
    cells = data.label * 2 + data.group
    whole = cells.bincount()
    for number, share in enumerate(own.SHARES):
        assert ((cells[data.split == number].bincount() - share * whole).abs() <= 1.01).all()


def test_a_given_split_is_kept_and_is_no_input(tmp_path):
    rows = [row | {"part": ["train", "validation", "test"][i % 3]} for i, row in enumerate(rows_of())]
    data = own.read(write(tmp_path, rows, "table: d.csv\nlabel: paid\ngroup: sex\nsplit: part\nignore: [town]\n"))
    assert data.split.tolist() == [i % 3 for i in range(len(rows))]
    assert data.feature_names == ("age",)


def test_missing_numbers_are_filled_with_the_training_median_and_marked(tmp_path):
    rows = rows_of()
    for row in rows[::10]:
        row["age"] = ""
    data = own.read(write(tmp_path, rows))
    assert data.feature_names[:2] == ("age", "age missing")
    absent = torch.zeros(len(rows), dtype=torch.bool)
    absent[::10] = True
    train = data.split == 0
    filled = data.inputs[absent, 0].unique()
    assert len(filled) == 1
    assert torch.isclose(filled[0], torch.from_numpy(np.array(np.median(data.inputs[train & ~absent, 0]))))
    assert ((data.inputs[:, 1] > 0) == absent).all()
    assert any("'age': 40 missing values" in note for note in data.notes)


def test_an_input_that_is_the_same_in_every_training_row_is_left_out(tmp_path):
    rows = [row | {"part": ["training", "training", "validation", "test"][i % 4]} for i, row in enumerate(rows_of())]
    for row in rows:
        seen = row["part"] == "training"
        row |= {"tenth": 0.1 if seen else row["age"], "city": "a" if seen else "b"}  # the mean of tenths is not 0.1
    rows[2]["age"] = ""  # a validation row
    data = own.read(write(tmp_path, rows, YAML + "split: part\nignore: [town]\n"))
    assert data.feature_names == ("age",) and data.inputs.shape == (400, 1)
    for name in ("tenth", "city=a", "age missing"):
        assert f"input '{name}' is the same in every training row and left out" in data.notes
    (said,) = lines(write(tmp_path, rows, YAML + "split: part\nignore: [town, age]\n"))
    assert said == "no column is left that could be an input: each is the same in every training row"


def test_warnings_of_small_groups_and_tell_tales(tmp_path):
    rows = [row | {"copy": row["sex"] * 2, "same": 1} for row in rows_of(150)]
    notes = "\n".join(own.read(write(tmp_path, rows)).notes)
    assert "small: " in notes and "points either way" in notes
    assert "'copy' says 'sex' outright" in notes and "'same' is the same in every row" in notes
    big = own.read(write(tmp_path, rows_of(4000)))
    assert big.notes == ()


def test_the_edition_is_what_the_data_says(tmp_path):
    rows = [row | {"name": f"n{i}", "part": ["train", "val", "test"][i % 3]} for i, row in enumerate(rows_of())]
    few = [{name: value for name, value in row.items() if name not in ("name", "part")} for row in rows]
    moved = tmp_path / "moved"
    moved.mkdir()
    data = own.read(write(tmp_path, rows, YAML + "ignore: [name, part]\n"))
    assert data.edition == data.digest and len(data.digest) == 64
    write(moved, few, "# mine\ngroup: sex\nlabel: 'paid'\ntable: other.csv\n")
    text = (moved / "d.csv").read_text().replace("Kyiv", '"Kyiv"')
    (moved / "other.csv").write_text("\ufeff" + text + "\n", encoding="utf-8")
    assert own.read(moved / "d.yaml").digest == data.digest
    (moved / "d.yaml").rename(moved / "e.yaml")
    assert own.read(moved / "e.yaml").digest == data.digest
    described = [
        YAML + "ignore: [name]\nsplit: part\n",
        YAML + "ignore: [name]\n",
        YAML + "ignore: [name, part, age]\n",
        YAML.replace("sex", "part") + "ignore: [name, sex]\n",
        "table: d.csv\nlabel: sex\ngroup: paid\nignore: [name, part]\n",
    ]
    town = "Kyiv" if few[7]["town"] == "Oslo" else "Oslo"
    edited = [few[:7] + [few[7] | change] + few[8:] for change in ({"age": 1.5}, {"age": ""}, {"town": town})]
    others = [own.read(write(moved, rows, text)).digest for text in described]
    others += [own.read(write(moved, some)).digest for some in (*edited, few[1:] + few[:1])]
    assert len({data.digest, *others}) == 10


# -------------------------------------------------------------------------------------------------- what is refused
def test_everything_wrong_with_a_table_is_said_at_once(tmp_path):
    rows = rows_of()
    for i, row in enumerate(rows):
        row["income"] = "many" if i in (7, 30) else i
        row["hole"] = i if i % 5 > 1 else ""  # 40 % missing
        row["id"] = f"person {i}"
        row["big"] = "inf" if i == 3 else i
    for row in rows[:3]:
        row["sex"] = "c"
    rows[9]["town"] = "Bjørn"
    path = write(tmp_path, rows, "table: d.csv\nlabel: paid\ngroup: sex\nignore: [phone]\nseeds: 3\n")
    content = (tmp_path / "d.csv").read_bytes()
    (tmp_path / "d.csv").write_bytes(content.replace("ø".encode(), "ø".encode("latin-1")))
    said = lines(path)
    expected = [
        "unknown key 'seeds'; allowed: table, images, label, group, split, ignore",
        "d.csv is not UTF-8 throughout (1 lines: 11)",
        "no column 'phone'; it has age, town, sex, paid, income, hole, id, big",
        "group 'c' has 3 rows (",
        "column 'income' has 2 values that are no numbers, first 'many' in row 9",
        "column 'hole' is missing in 40% of the rows; allowed: 25%",
        "column 'id' has 400 different texts; allowed: 50",
        "column 'big' has infinite values",
    ]
    assert [any(words in line for line in said) for words in expected] == [True] * len(expected), said
    assert len(said) == len(expected)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda row, i: row | {"paid": "yes"}, "label 'paid' is 'yes' in every row"),
        (lambda row, i: row | {"paid": i % 3}, "label 'paid' has 3 values ('0' …); allowed: 2"),
        (lambda row, i: row | {"paid": "" if i == 5 else row["paid"]}, "label 'paid' is missing in 1 of 400 rows"),
        (lambda row, i: row | {"sex": i}, "group 'sex' has 400 values"),
        (lambda row, i: row | {"sex": "NA" if i < 7 else row["sex"]}, "group 'sex' is missing in 7 of 400 rows"),
        (lambda row, i: {"sex": row["sex"], "paid": row["paid"]}, "no column left that could be an input"),
        (lambda row, i: {"sex": row["sex"], "age": row["age"]}, "no column 'paid'; it has sex, age"),
    ],
)
def test_one_thing_wrong_is_one_line(tmp_path, change, words):
    (said,) = lines(write(tmp_path, [change(row, i) for i, row in enumerate(rows_of())]))
    assert words in said


@pytest.mark.parametrize(
    "yaml, words",
    [
        ("", "must say table (or images), label and group"),
        ("- a", "must say table (or images), label and group"),
        ("a: [", "is not YAML"),
        ("table: !!python/object/apply:os.system ['true']", "is not YAML"),
        ("label: paid\ngroup: sex", "neither table nor images given"),
        ("table: d.csv\nimages: d.csv\nlabel: paid\ngroup: sex", "table and images given; allowed: exactly one"),
        ("table: d.csv\ngroup: sex", "label is not given"),
        ("table: d.csv\nlabel: sex\ngroup: sex", "must be different columns"),
        ("table: d.csv\nlabel: [paid]\ngroup: sex", "label is ['paid']; allowed: one name"),
        ("table: d.csv\nlabel: paid\ngroup: sex\nignore: town", "ignore is 'town'; allowed: a list of columns"),
        ("table: none.csv\nlabel: paid\ngroup: sex", "table is 'none.csv', which is not there"),
        ("table: ../d.csv\nlabel: paid\ngroup: sex", "lies outside"),
        ("table: /etc/passwd\nlabel: paid\ngroup: sex", "lies outside"),
        ("table: \"a\\0b\"\nlabel: paid\ngroup: sex", "is not there"),
        ("table: link.csv\nlabel: paid\ngroup: sex", "lies outside"),
    ],
)  # fmt: skip
def test_a_bad_description(tmp_path, yaml, words):
    folder = tmp_path / "inner"
    folder.mkdir()
    write(tmp_path, rows_of())
    path = write(folder, rows_of(), yaml)
    (folder / "link.csv").symlink_to(tmp_path / "d.csv")
    assert any(words in line for line in lines(path))


def test_files_that_are_no_tables(tmp_path):
    assert "is not there" in lines(tmp_path / "none.yaml")[0]
    path = write(tmp_path, rows_of())
    for content, words in (
        (b"", "fewer than two columns"),
        (b"a;b\n1;2\n", "commas must separate"),
        (b"a,a\n1,2\n", "two columns are called 'a'"),
        (b"sex,paid,x\n1,2,3,4\n1,2,3,4,5\n", "is no table"),
        (b"sex,paid,x\n", "has no rows"),
        (b"\x00\x01\x02", "fewer than two columns"),
    ):
        (tmp_path / "d.csv").write_bytes(content)
        assert any(words in line for line in lines(path)), content


def test_every_row_has_the_fields_that_the_header_names(tmp_path):
    path = write(tmp_path, rows_of())
    header, *rows = (tmp_path / "d.csv").read_text().splitlines()
    numbered = [f"{number},{row}" for number, row in enumerate(rows, 1)]
    many = "d.csv is no table (its first line names 4 columns, but {} rows have more or fewer fields, first line {}; "
    for lines_, words in (
        ([header, *numbered], many.format("400 of 400", "2 with 5")),  # as R's write.table: the label would be the sex
        ([header, *(f"{row}," for row in rows)], many.format("400 of 400", "2 with 5")),
        ([header, *rows[:9], "41.0,Kyiv, west,a,yes", *rows[9:]], many.format("1 of 401", "11 with 5")),
        ([header, *rows[:9], "", "41.0,Oslo,a", *rows[9:], "41.0"], many.format("2 of 402", "12 with 3")),  # no blanks
        ([header.replace(",", ";"), *(row.replace(",", ";") for row in rows)], "commas must separate them"),
        ([header, *rows, '41.0,"Kyiv,a,yes'], "line 402: unexpected end of data"),
    ):
        (tmp_path / "d.csv").write_text("\n".join(lines_) + "\n")
        (said,) = lines(path)
        assert words in said, said


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_quoted_commas_and_lines_are_no_fields_and_blank_lines_no_rows(tmp_path, end):
    rows = rows_of()
    rows[3]["town"], rows[4]["town"] = 'Kyiv, "Podil"', "Kyiv,\nPodil"
    path = write(tmp_path, rows)
    text = (tmp_path / "d.csv").read_bytes().decode().replace("\r\n", "\n")
    (tmp_path / "d.csv").write_bytes((text.replace("\n", "\n\n", 2) + "\n  \n\n").replace("\n", end).encode())
    data = own.read(path)
    assert len(data.label) == 400
    training = {f"town={rows[i]['town']}" for i in (3, 4) if data.split[i] == 0}
    assert training <= set(data.feature_names) and len(training) >= 1


def test_a_column_without_a_name_gets_one(tmp_path):
    path = write(tmp_path, [{"": i * 7 % 400, "Unnamed: 0": i * 3 % 400} | row for i, row in enumerate(rows_of())])
    assert own.read(path).feature_names[:2] == ("Unnamed: 1", "Unnamed: 0")


def test_a_split_that_cannot_be_used(tmp_path):
    text = "table: d.csv\nlabel: paid\ngroup: sex\nsplit: part\n"
    rows = [row | {"part": "dev" if i == 0 else "training"} for i, row in enumerate(rows_of())]
    assert "has the value 'dev'; allowed: training, validation, test" in lines(write(tmp_path, rows, text))[0]
    rows = [row | {"part": "training" if i % 2 else "test"} for i, row in enumerate(rows_of())]
    said = lines(write(tmp_path, rows, text))
    assert len(said) == 4 and all("the validation part has 0 rows" in line for line in said)


def test_very_many_problems_are_cut(tmp_path):
    rows = [row | {f"c{j}": f"{i} {j}" for j in range(60)} for i, row in enumerate(rows_of(200))]
    said = lines(write(tmp_path, rows))
    assert len(said) == own.MOST_LINES + 1 and said[-1] == "… and 30 more"


# ------------------------------------------------------------------------------------------------------------- images
def pictures(folder, n=120):
    random = np.random.default_rng(0)
    rows = []
    for i in range(n):
        label, group = i % 2, i // 2 % 2
        Image.fromarray(random.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append({"path": f"{i}.png", "paid": label, "sex": group})
    return rows


IMAGES = "images: d.csv\nlabel: paid\ngroup: sex\n"


def test_images_become_grouped_data(tmp_path):
    rows = pictures(tmp_path)
    (tmp_path / "119.png").write_bytes((tmp_path / "3.png").read_bytes())  # one content twice: one part
    data = own.read(write(tmp_path, rows, IMAGES))
    assert data.inputs.shape == (120, 3, 112, 112) and data.inputs.dtype == torch.uint8
    assert data.split[3] == data.split[119]
    assert set(data.split.tolist()) == {0, 1, 2}


def test_the_edition_of_images_is_theirs_whatever_their_names(tmp_path):
    rows = pictures(tmp_path)
    data = own.read(write(tmp_path, rows, IMAGES))
    (tmp_path / "5.png").rename(tmp_path / "five.png")
    rows[5]["path"] = "five.png"
    assert own.read(write(tmp_path, rows, IMAGES + "ignore: [sex]\n")).digest == data.digest
    (tmp_path / "five.png").write_bytes((tmp_path / "7.png").read_bytes())
    changed = own.read(write(tmp_path, rows, IMAGES)).digest
    turned = own.read(write(tmp_path, rows, "images: d.csv\nlabel: sex\ngroup: paid\n")).digest
    assert len({data.digest, changed, turned}) == 3


def test_everything_wrong_with_images_is_said_at_once(tmp_path):
    rows = pictures(tmp_path)
    (tmp_path / "1.png").write_text("<html>")
    (tmp_path / "text.txt").write_text("text")
    rows[2]["path"], rows[3]["path"], rows[4]["path"], rows[5]["path"] = "none.png", "../x.png", "7.png", "text.txt"
    said = lines(write(tmp_path, rows, IMAGES))
    for words in (
        "1 paths are there twice, the first '7.png'",
        "row 3: '1.png' cannot be decoded",
        "row 4: path is 'none.png', which is not there",
        "row 5: path is '../x.png', which lies outside",
        "row 7: path is 'text.txt'; allowed are .jpg",
    ):
        assert any(words in line for line in said), said
    assert len(said) == 5
