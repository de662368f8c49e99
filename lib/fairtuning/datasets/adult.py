"""Adult (census income): the UCI files, prepared as arXiv 2403.00625 must have done.

Rows whose ``workclass`` or ``occupation`` is missing are dropped, which leaves 30,718 of the official training file
and 15,315 of the official test file: 60 % / 40 % of the first are the pre-training and the fine-tuning data, 5,000 /
10,315 of the second validation and test. These are the sizes of the paper's Table 1; that the rows were drawn at
random, by a seed, is our reading. Inputs are the 13 attributes other than sex, integer-coded (our reading: 13 inputs
are what the paper's 742 parameters imply) and standardised by the pre-training part; ``encoding="one-hot"`` is a
variant.
"""

import csv
import hashlib
from functools import partial
from pathlib import Path

import numpy as np

from fairtuning.datasets import DataError, GroupedData, check_choice, files
from fairtuning.paths import data_folder

ADDRESS = "https://archive.ics.uci.edu/ml/machine-learning-databases/adult"
FILES = {
    "adult.data": "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d",
    "adult.test": "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05",
}
COLUMNS = [
    "age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship", "race",
    "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country",
]  # fmt: skip
NUMERIC = {"age", "fnlwgt", "education-num", "capital-gain", "capital-loss", "hours-per-week"}
GROUPS = ("Female", "Male")
LABELS = ("<=50K", ">50K")
#: The paper's Table 1, and the pre-training part that it leaves out; ``read`` checks them.
SIZES = {"pretraining": 18431, "training": 12287, "validation": 5000, "test": 10315}
SPLITS = tuple(SIZES)
ENCODINGS = ("integer", "one-hot")


def fetch() -> list[Path]:
    paths = [data_folder() / "adult" / file for file in FILES]
    for path, expected in zip(paths, FILES.values(), strict=True):
        if not (path.is_file() and files.sha256(path) == expected):
            files.fetch(path, partial(files.check, expected=expected), address=f"{ADDRESS}/{path.name}")
    return paths


def verify() -> list[str]:
    lines = []
    for file, expected in FILES.items():
        path = data_folder() / "adult" / file
        files.check(path, expected)
        lines.append(f"{path}: {len(read_rows(path))} rows, SHA-256 as published")
    return lines


def read_rows(path: Path) -> list[list[str]]:
    """The rows of one UCI file as 15 strings each; DataError names file, line and what is wrong with a bad one."""
    rows = []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for number, row in enumerate(csv.reader(file, skipinitialspace=True), 1):
            if not row or row[0].startswith("|"):  # a blank last line; adult.test opens with a comment line
                continue
            if len(row) != len(COLUMNS) + 1:
                raise DataError(f"{path}, line {number}: {len(row)} fields, expected {len(COLUMNS) + 1}")
            row[-1] = row[-1].rstrip(".")  # the labels of adult.test end in a full stop
            if row[-1] not in LABELS:
                raise DataError(f"{path}, line {number}: label {row[-1]!r}, expected one of {', '.join(LABELS)}")
            for name, value in zip(COLUMNS, row, strict=False):
                if name in NUMERIC and not value.isdecimal():
                    raise DataError(f"{path}, line {number}: {name} {value!r}, expected a whole number")
            if row[9] not in GROUPS:
                raise DataError(f"{path}, line {number}: sex {row[9]!r}, expected one of {', '.join(GROUPS)}")
            rows.append(row)
    if not rows:
        raise DataError(f"{path}: no rows; expected lines of {len(COLUMNS) + 1} fields")
    return rows


def read(*, encoding: str = "integer", split_seed: int = 0) -> GroupedData:
    """Adult as grouped data: inputs ``[46033, 13]`` float64, label 1 = over 50K, group 0 = female, 1 = male."""
    check_choice("encoding", encoding, ENCODINGS)
    paths = fetch()
    training, test = (
        [row for row in read_rows(path) if row[1] != "?" and row[6] != "?"]  # workclass, occupation
        for path in paths
    )
    halves = (training, "pretraining", 0), (test, "validation", 2)
    split = np.concatenate([_split(len(rows), SIZES[part], split_seed, first=first) for rows, part, first in halves])
    sizes = dict(zip(SPLITS, np.bincount(split, minlength=4).tolist(), strict=True))
    if sizes != SIZES:
        raise DataError(f"{paths[0].parent}: split sizes are {sizes}, expected {SIZES}")
    columns = list(zip(*(training + test), strict=True))
    inputs, names = _encode(columns, one_hot=encoding == "one-hot")
    reference = inputs[split == 0]
    spread = reference.std(0)
    inputs = (inputs - reference.mean(0)) / np.where(spread > 0, spread, 1.0)
    return GroupedData.of(
        "adult",
        "official",
        hashlib.sha256("".join(FILES.values()).encode()).hexdigest(),
        inputs,
        label=([LABELS.index(value) for value in columns[-1]], LABELS),
        group=([GROUPS.index(value) for value in columns[9]], GROUPS),
        split=(split, SPLITS),
        feature_names=tuple(names),
    )


def _split(n: int, size: int, seed: int, *, first: int) -> np.ndarray:
    """``size`` of n rows, drawn at random, get the number ``first``, the others the next."""
    split = np.full(n, first + 1)
    split[np.random.default_rng(seed).permutation(n)[:size]] = first
    return split


def _encode(columns: list[tuple[str, ...]], *, one_hot: bool) -> tuple[np.ndarray, list[str]]:
    encoded, names = [], []
    for name, values in zip(COLUMNS, columns, strict=False):
        if name == "sex":
            continue
        if name in NUMERIC:
            encoded.append(np.array(values, dtype=np.float64))
            names.append(name)
            continue
        kinds, codes = np.unique(np.array(values), return_inverse=True)  # alphabetical codes
        if one_hot:
            encoded.extend((codes == code).astype(np.float64) for code in range(len(kinds)))
            names.extend(f"{name}={kind}" for kind in kinds)
        else:
            encoded.append(codes.astype(np.float64))
            names.append(name)
    return np.stack(encoded, axis=1), names
