"""Your data: a table or a folder of images, described by a few lines of YAML, as grouped data.

    table: loans.csv        # or images: pictures/list.csv, a CSV whose column "path" names an image file per row
    label: repaid           # a column with two values
    group: sex              # a column with 2 to 20 values; never an input
    split: part             # optional, a column of training, validation and test; else 60 / 20 / 20 % by seed 0
    ignore: [id, name]      # optional, columns that are no inputs

Paths are relative to the file they stand in, and stay below its folder. Everything that is wrong is said at once.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
import yaml

from fairtuning.datasets import DataError, GroupedData, images

KEYS = ("table", "images", "label", "group", "split", "ignore")
SPLITS = {"training": 0, "train": 0, "validation": 1, "val": 1, "test": 2}
SHARES = (0.6, 0.2, 0.2)
MISSING = ("", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "?")
SIZE = 112  # of images

# What a comparison of groups needs at the least, and where a warning starts; all our choice.
FEWEST_ROWS = 100
FEWEST_IN_CELL = 10  # of one label in one group: six to train on, two to select with, two to test
FEW_TEST_ROWS = 50  # of one label in one group: below, an accuracy of 80 % is known to 11 points at best
MOST_GROUPS = 20
MOST_LEVELS = 50  # of a column of texts; more, and it is no category
MOST_MISSING = 0.25
MOST_LINES = 30


class Problems(DataError):
    """Everything that is wrong with somebody's data, one line each."""

    def __init__(self, lines: Sequence[str]):
        more = len(lines) - MOST_LINES
        self.lines = (*lines[:MOST_LINES], *([f"… and {more} more"] if more > 0 else []))
        super().__init__("; ".join(self.lines))


@dataclass
class Description:
    """The YAML file, as far as it could be read; ``problems`` says what could not."""

    file: Path | None = None  # the CSV
    images: bool = False
    label: str = ""
    group: str = ""
    split: str = ""
    ignore: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.label, self.group, self.split, *self.ignore, *(["path"] if self.images else []))


def read(path: str | Path) -> GroupedData:
    """The data that the YAML file at ``path`` describes; ``Problems`` where anything about it is wrong.

    A table: inputs ``[N, d]`` float64, texts one-hot, all standardised by the training part; a missing number is the
    training part's median and an input that says so. Images: uint8 ``[N, 3, 112, 112]``. Label 1 is the last of the two
    values in the order of the alphabet. ``notes`` warn of what makes a comparison unsure, small groups above all.

    The edition is the digest: of label, group and split, and of the input columns as written or of the images' files.
    Names of files, comments and columns that are no inputs have no part in it.
    """
    told = describe(Path(path))
    if told.file is None:
        raise Problems(told.problems)
    content = told.file.read_bytes()
    table = _table(told, content)
    problems = told.problems
    label, label_names = _values(table, told.label, "label", 2, 2, problems)
    group, group_names = _values(table, told.group, "group", 2, MOST_GROUPS, problems)
    notes: list[str] = []
    cells = None
    if label is not None and group is not None:
        cells = label * len(group_names) + group
        _check_cells(cells, label_names, group_names, problems)
        if len(table) < FEWEST_ROWS:
            problems.append(f"{told.file.name} has {len(table)} rows; allowed: {FEWEST_ROWS} or more")
    seen = pixels = columns = None
    if told.images:
        pixels, seen = _pixels(told, table)
    else:
        columns = _columns(told, table, notes)
    split = _split(told, table, cells, seen, label_names, group_names)
    if problems:
        raise Problems(problems)
    inputs, names = (pixels, []) if told.images else _encode(columns, split == 0, notes)
    notes += _small(cells[split == 2], label_names, group_names)
    mark = hashlib.sha256()
    for part in (label_names, label.tolist(), group_names, group.tolist(), split.tolist(), seen):
        mark.update(json.dumps(part).encode())
    for column, (kind, _) in (columns or {}).items():
        mark.update(json.dumps([column, kind, *table[column].fillna("")]).encode())
    return GroupedData(
        name="own",
        edition=mark.hexdigest(),
        digest=mark.hexdigest(),
        inputs=torch.from_numpy(inputs),
        label=torch.from_numpy(label),
        group=torch.from_numpy(group),
        split=torch.from_numpy(split),
        label_names=label_names,
        group_names=group_names,
        split_names=("training", "validation", "test"),
        feature_names=tuple(names),
        notes=tuple(notes),
    )


# --------------------------------------------------------------------------------------------------------- description
def describe(path: Path) -> Description:
    """What the YAML file says. An entry that is missing, unknown or of the wrong kind is a problem, not an error."""
    told = Description()
    say = told.problems.append
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Problems([f"{path} is not there; it must say: table (or images), label, group"]) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Problems([f"{path} is not YAML ({' '.join(str(error).split())[:120]})"]) from None
    if not isinstance(given, dict):
        raise Problems([f"{path} must say table (or images), label and group; it is {_show(given)}"])
    for key in given:
        if key not in KEYS:
            say(f"{path.name}: unknown key {_show(key)}; allowed: {', '.join(KEYS)}")
    texts = {key: given.get(key) for key in KEYS[:-1] if given.get(key) is not None}
    for key, value in texts.items():
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            say(f"{path.name}: {key} is {_show(value)}; allowed: one name")
    for key in ("label", "group"):
        if key not in texts:
            say(f"{path.name}: {key} is not given; allowed: a column of the table")
    ignore = given.get("ignore") or []
    if not isinstance(ignore, list) or not all(isinstance(name, str | int | float) for name in ignore):
        say(f"{path.name}: ignore is {_show(ignore)}; allowed: a list of columns, as [id, name]")
        ignore = []
    told.label, told.group, told.split = (str(texts.get(key, "")) for key in ("label", "group", "split"))
    told.ignore = tuple(str(name) for name in ignore)
    named = [column for column in (told.label, told.group, told.split) if column]
    if len(set(named)) < len(named):
        say(f"{path.name}: label, group and split must be different columns; given: {', '.join(map(_show, named))}")
    sources = [key for key in ("table", "images") if key in texts]
    if len(sources) != 1:
        say(f"{path.name}: {' and '.join(sources) or 'neither table nor images'} given; allowed: exactly one of them")
    else:
        told.images = sources[0] == "images"
        told.file = _below(path.parent, str(texts[sources[0]]), f"{path.name}: {sources[0]}", told.problems)
    return told


def _below(folder: Path, name: str, what: str, problems: list[str]) -> Path | None:
    """The file ``name`` in or below ``folder``; a way out of it, by .., an absolute path or a link, is a problem."""
    try:
        file = (folder / name).resolve()
        inside = not Path(name).is_absolute() and file.is_relative_to(folder.resolve())
        there = inside and file.is_file()
    except (OSError, ValueError):  # a null byte, a name too long
        inside, there = True, False
    if there:
        return file
    problems.append(f"{what} is {_show(name)}, which " + ("is not there" if inside else f"lies outside {folder}"))
    return None


def _show(value: Any) -> str:
    """A user's value in a message: one line, no longer than it need be."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…'"


# --------------------------------------------------------------------------------------------------------------- table
def _table(told: Description, content: bytes) -> Any:
    """The CSV as a pandas table of texts, NaN for what is missing. What is not UTF-8 is a problem, and read on."""
    import pandas as pd

    name, say = told.file.name, told.problems.append
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("utf-8-sig", errors="replace")
        bad = [number for number, line in enumerate(text.splitlines(), 1) if "\ufffd" in line]
        lines = ", ".join(map(str, bad[:3])) + (" …" if len(bad) > 3 else "")
        say(f"{name} is not UTF-8 throughout ({len(bad)} lines: {lines}); save it as UTF-8, all of it in one encoding")
    try:
        header, rows = _fields(text)
    except ValueError as error:
        raise Problems([*told.problems, f"{name} is no table ({' '.join(str(error).split())[:200]})"]) from None
    table = pd.DataFrame(rows, columns=header, dtype=object)
    table = table.mask(table.isin(MISSING))
    absent = [column for column in dict.fromkeys(told.roles) if column and column not in table]
    has = ", ".join(map(str, table.columns[:12])) + (" …" if len(table.columns) > 12 else "")
    for column in absent:
        say(f"{name} has no column {_show(column)}; it has {has}")
    if not len(table):
        say(f"{name} has no rows")
    return table


def _fields(text: str) -> tuple[list[str], list[list[str]]]:
    """Names of the columns, and the fields of every row; blank lines are none.

    ValueError, with the line, where the quotes are wrong or a row has more or fewer fields than there are names: which
    field belongs to which column would be a guess.
    """
    reader = csv.reader(io.StringIO(text, newline=None), skipinitialspace=True, strict=True)
    try:
        lines = [(reader.line_num, row) for row in reader if len(row) > 1 or "".join(row).strip()]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None
    header = lines.pop(0)[1] if lines else []
    if len(header) < 2:
        raise ValueError("its first line names fewer than two columns; commas must separate them")
    if twice := sorted({column for column in header if header.count(column) > 1}):
        raise ValueError(f"two columns are called {_show(twice[0])}")
    if ragged := [(number, len(row)) for number, row in lines if len(row) != len(header)]:
        raise ValueError(
            f"its first line names {len(header)} columns, but {len(ragged)} of {len(lines)} rows have more or fewer "
            f"fields, first line {ragged[0][0]} with {ragged[0][1]}; name each column, quote texts with a comma"
        )
    if "" in header:  # an index that pandas or R wrote; twice over by pandas, and the inner one has a name
        first = header.index("")
        header[first] = next(name for i in count(first) if (name := f"Unnamed: {i}") not in header)
    return header, [row for _, row in lines]


def _values(
    table: Any, column: str, what: str, fewest: int, most: int, problems: list[str]
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """A column as numbers ``[N]`` and what they stand for, in the order of the alphabet; None where it cannot be."""
    if column not in table or not len(table):
        return None, ()
    values = table[column]
    if missing := int(values.isna().sum()):
        problems.append(f"{what} {_show(column)} is missing in {missing} of {len(table)} rows; fill it or drop them")
    names = tuple(sorted(values.dropna().unique()))
    if len(names) < 2:
        problems.append(f"{what} {_show(column)} is {_show(names[0]) if names else 'missing'} in every row")
    elif not fewest <= len(names) <= most:
        allowed = f"{fewest} to {most}" if most > fewest else f"{fewest}"
        problems.append(f"{what} {_show(column)} has {len(names)} values ({_show(names[0])} …); allowed: {allowed}")
    elif not missing:
        return values.map({name: index for index, name in enumerate(names)}).to_numpy(np.int64, copy=True), names
    return None, ()


def _check_cells(cells: np.ndarray, labels: Sequence[str], groups: Sequence[str], problems: list[str]) -> None:
    size = np.bincount(cells, minlength=len(labels) * len(groups)).reshape(len(labels), len(groups))
    for index, group in enumerate(groups):
        if size[:, index].min() < FEWEST_IN_CELL:
            found = ", ".join(f"{n} with label {_show(name)}" for name, n in zip(labels, size[:, index], strict=True))
            problems.append(
                f"group {_show(group)} has {size[:, index].sum()} rows ({found}); allowed: {FEWEST_IN_CELL} or more of "
                "each label; put it together with another group, or leave its rows out"
            )


def _columns(told: Description, table: Any, notes: list[str]) -> dict[str, tuple[str, np.ndarray]]:
    """Inputs by name: ("number", float64 with NaN for what is missing) or ("text", objects with None)."""
    import pandas as pd

    found: dict[str, tuple[str, np.ndarray]] = {}
    say = told.problems.append
    for column in table:
        if column in told.roles:
            continue
        values = table[column]
        share = float(values.isna().mean())
        what = f"column {_show(column)}"
        if share > MOST_MISSING:
            say(f"{what} is missing in {share:.0%} of the rows; allowed: {MOST_MISSING:.0%}; fill or ignore it")
            continue
        numbers = pd.to_numeric(values, errors="coerce")
        texts = values[numbers.isna() & values.notna()]
        if values.nunique() < 2:
            notes.append(f"{what} is the same in every row and left out")
        elif len(texts) <= 0.1 * values.notna().sum():
            if len(texts):
                row = int(texts.index[0]) + 2
                say(f"{what} has {len(texts)} values that are no numbers, first {_show(texts.iloc[0])} in row {row}")
            elif not np.isfinite(numbers.dropna()).all():
                say(f"{what} has infinite values; replace them or ignore the column")
            else:
                found[column] = ("number", numbers.to_numpy(np.float64))
        elif values.nunique() > MOST_LEVELS:
            say(f"{what} has {values.nunique()} different texts; allowed: {MOST_LEVELS}; ignore or group them")
        else:
            found[column] = ("text", values.to_numpy(object))
    _tell_tales(told, table, found, notes)
    if not found and len(table):
        say(f"{told.file.name} has no column left that could be an input")
    return found


def _tell_tales(told: Description, table: Any, columns: dict, notes: list[str]) -> None:
    """Warns of a column that says the label or the group outright."""
    for column in columns:
        if table[column].nunique() > MOST_GROUPS:
            continue
        for role in (told.label, told.group):
            if role in table and table.groupby(column, dropna=False)[role].nunique().max() == 1:
                notes.append(f"column {_show(column)} says {_show(role)} outright in every row: should it be ignored?")


def _encode(
    columns: dict[str, tuple[str, np.ndarray]], training: np.ndarray, notes: list[str]
) -> tuple[np.ndarray, list[str]]:
    """Inputs ``[N, d]`` float64, standardised by the training part, and their names.

    What is the same in every training row is left out: no training can say what another value means. Problems where
    nothing is left.
    """
    found: dict[str, np.ndarray] = {}
    for name, (kind, values) in columns.items():
        absent = np.array([value is None or value != value for value in values])
        if kind == "number":
            known = values[training & ~absent]
            found[name] = np.where(absent, np.median(known) if len(known) else 0.0, values)
        else:
            for level in sorted({value for value in values[training & ~absent]}):
                found[f"{name}={level}"] = (values == level).astype(np.float64)
        if absent.any():
            found[f"{name} missing"] = absent.astype(np.float64)
            notes.append(f"column {_show(name)}: {int(absent.sum())} missing values, filled and marked")
    for name in [name for name, values in found.items() if np.ptp(values[training]) == 0]:
        notes.append(f"input {_show(name)} is the same in every training row and left out")
        del found[name]
    if not found:
        raise Problems(["no column is left that could be an input: each is the same in every training row"])
    inputs = np.stack(list(found.values()), axis=1)
    spread = inputs[training].std(0)
    return (inputs - inputs[training].mean(0)) / np.where(spread > 0, spread, 1.0), list(found)


# -------------------------------------------------------------------------------------------------------------- images
def _pixels(told: Description, table: Any) -> tuple[np.ndarray | None, list[str]]:
    """``[N, 3, 112, 112]`` uint8 and the SHA-256 of each file; None where any file is a problem."""
    from PIL import Image

    if "path" not in table:
        return None, []
    say, folder, name = told.problems.append, told.file.parent, told.file.name
    paths = table["path"].fillna("")
    if twice := paths[paths.duplicated()].unique().tolist():
        say(f"{name}: {len(twice)} paths are there twice, the first {_show(twice[0])}")
    before, found, seen = len(told.problems), [], []
    for number, path in enumerate(paths, 2):
        file = _below(folder, path, f"{name}, row {number}: path", told.problems)
        if file is None:
            continue
        if PurePosixPath(path).suffix.lower() not in images.ENDINGS:
            say(f"{name}, row {number}: path is {_show(path)}; allowed are {', '.join(images.ENDINGS)}")
            continue
        content = file.read_bytes()
        try:
            with images._strict():
                found.append(images.decode(content, (SIZE, SIZE)))
        except (OSError, ValueError, SyntaxError, ZeroDivisionError, Warning, Image.DecompressionBombError) as error:
            say(f"{name}, row {number}: {_show(path)} cannot be decoded ({' '.join(str(error).split())[:80]})")
            continue
        seen.append(hashlib.sha256(content).hexdigest())
    return (np.stack(found) if found and len(told.problems) == before else None), seen


# --------------------------------------------------------------------------------------------------------------- split
def _split(
    told: Description, table: Any, cells: np.ndarray | None, seen: list[str] | None, labels: Sequence, groups: Sequence
) -> np.ndarray | None:
    """The part of each row, ``[N]`` int64: as given, else drawn by seed 0 so that each part has its share of each label
    in each group; images of one content go to one part."""
    if told.split and told.split in table:
        given = table[told.split].fillna("")
        if strange := sorted(set(given) - set(SPLITS)):
            told.problems.append(
                f"split {_show(told.split)} has the value {_show(strange[0])}; allowed: training, validation, test"
            )
            return None
        split = given.map(SPLITS).to_numpy(np.int64, copy=True)
        if cells is not None:
            for number, part in enumerate(("training", "validation", "test")):
                size = np.bincount(cells[split == number], minlength=len(labels) * len(groups))
                for cell in np.flatnonzero(size < 2):
                    where = f"label {_show(labels[cell // len(groups)])} in group {_show(groups[cell % len(groups)])}"
                    told.problems.append(f"the {part} part has {size[cell]} rows with {where}; allowed: 2 or more")
        return split
    if cells is None or told.problems:
        return None
    split = np.zeros(len(cells), dtype=np.int64)
    random = np.random.default_rng(0)
    for cell in np.unique(cells):
        rows = random.permutation(np.flatnonzero(cells == cell))
        held = [max(2, round(share * len(rows))) for share in SHARES[1:]]
        split[rows[: held[0]]], split[rows[held[0] : sum(held)]] = 1, 2
    if seen and len(set(seen)) < len(seen):
        first: dict[str, int] = {}
        for row, content in enumerate(seen):
            split[row] = split[first.setdefault(content, row)]
    return split


def _small(cells: np.ndarray, labels: Sequence[str], groups: Sequence[str]) -> list[str]:
    """Warns of every label in every group with few test rows, and says what that does to an accuracy."""
    size = np.bincount(cells, minlength=len(labels) * len(groups))
    return [
        f"small: {size[cell]} test rows with label {_show(labels[cell // len(groups)])} in group "
        f"{_show(groups[cell % len(groups)])}; an accuracy of 80 % there is known to about "
        f"{196 * math.sqrt(0.16 / size[cell]):.0f} points either way"
        for cell in np.flatnonzero(size < FEW_TEST_ROWS)
    ]
