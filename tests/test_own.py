"""Somebody's own data: what is read, how it is split and encoded, and that everything wrong with it is said at once."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from fairtuning.datasets import DataError, own


def rows_of(n=400, seed=0):
    random = np.random.default_rng(seed)
    group = random.choice(["a", "b"], n)
    age = random.normal(40, 10, n).round(1)
    label = np.where(age + 5 * (group == "a") + random.normal(0, 5, n) > 42, "yes", "no")
    town = random.choice(["Kyiv", "Łódź", "Oslo"], n)
    columns = zip(age, town, group, label, strict=True)
    return [dict(zip(("age", "town", "sex", "paid"), row, strict=True)) for row in columns]


def write(folder, rows, yaml="table: d.csv\nlabel: paid\ngroup: sex\n"):
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


def test_warnings_of_small_groups_and_tell_tales(tmp_path):
    rows = [row | {"copy": row["sex"] * 2, "same": 1} for row in rows_of(150)]
    notes = "\n".join(own.read(write(tmp_path, rows)).notes)
    assert "small: " in notes and "points either way" in notes
    assert "'copy' says 'sex' outright" in notes and "'same' is the same in every row" in notes
    big = own.read(write(tmp_path, rows_of(4000)))
    assert big.notes == ()


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


@pytest.mark.parametrize(
    "content, words",
    [
        # of R's write.table: the names of the rows have no name; the label would have been the column before it
        (b"age,town,sex,paid\n1,30,a,f,yes\n2,31,b,m,no\n", "4 columns, line 2 has 5 fields, and so on in 2 rows"),
        (b"age,town,sex,paid\n30,a,f,yes\n31,b,m,no,late\n", "header names 4 columns, line 3 has 5 fields; give"),
        (b"age,town,sex,paid\n30,a,f,yes\n31,m,no\n", "header names 4 columns, line 3 has 3 fields; give"),
        (b'age,town,sex,paid\n30,"a\nb",f,yes\n31,"a, b",m,no,x\n', "line 4 has 5 fields"),
    ],
)  # fmt: skip
def test_rows_of_another_width_than_the_header_are_refused(tmp_path, content, words):
    path = write(tmp_path, rows_of())
    (tmp_path / "d.csv").write_bytes(content)
    (said,) = [line for line in lines(path) if "is no table" in line]
    assert words in said


def test_blank_lines_and_quoted_commas_are_no_other_width(tmp_path):
    path = write(tmp_path, rows_of())
    before = own.read(path)
    text = (tmp_path / "d.csv").read_text()
    (tmp_path / "d.csv").write_text(text.replace("\n", "\n\n", 3) + "\n\n")
    assert own.read(path).digest == before.digest


def test_the_digest_is_that_of_what_decides_a_result(tmp_path):
    """Not of names, places, comments or keys that decide nothing."""
    path = write(tmp_path, rows_of())
    data, text = own.read(path), path.read_text()
    other = tmp_path / "elsewhere"
    other.mkdir()
    (tmp_path / "d.csv").rename(other / "people.csv")
    (other / "mine.yaml").write_text("# of our own\n" + text.replace("d.csv", "people.csv"))
    moved = own.read(other / "mine.yaml")
    assert moved.digest == data.digest and moved.edition == data.edition == data.digest[:12]
    column = next(name for name in data.feature_names if "=" not in name)
    (other / "mine.yaml").write_text(text.replace("d.csv", "people.csv") + f"ignore: [{column}]\n")
    assert own.read(other / "mine.yaml").digest != data.digest
    people = (other / "people.csv").read_text().splitlines()
    (other / "mine.yaml").write_text(text.replace("d.csv", "people.csv"))
    (other / "people.csv").write_text("\n".join([people[0], *people[:0:-1], ""]))  # the rows in another order
    assert own.read(other / "mine.yaml").digest != data.digest


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


def test_images_of_other_formats_are_named_with_those_allowed(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **rest: started.append(args))
    monkeypatch.setattr("subprocess.Popen", lambda *args, **rest: started.append(args))
    rows = pictures(tmp_path)
    (tmp_path / "1.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n")
    Image.new("RGB", (20, 24)).save(tmp_path / "2.png", "PPM")
    assert lines(write(tmp_path, rows, IMAGES)) == (
        "d.csv, row 3: '1.png' cannot be decoded (no JPEG or PNG file, whatever its name; convert it)",
        "d.csv, row 4: '2.png' cannot be decoded (no JPEG or PNG file, whatever its name; convert it)",
    )
    assert not started


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
