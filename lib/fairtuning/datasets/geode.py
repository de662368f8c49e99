"""GeoDE: 61,940 photographs of 40 objects, asked for in six regions of the world (Ramaswamy et al. 2023, 2301.02560).

Label: the object; group: the region. There is no official split. arXiv 2410.17358 has 80 : 20 and names no seed; here
20 % are the test part and an eighth of the rest is the validation part, by seed 0.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from fairtuning.datasets import DataError, GroupedData, files, images

GROUPS = ("Africa", "Americas", "EastAsia", "Europe", "SouthEastAsia", "WestAsia")
SPLITS = ("training", "validation", "test")
SHARES = (0.7, 0.1, 0.2)

ORIGIN = files.Origin(
    name="geode",
    sets=(("geode.zip",),),
    known={},
    address={"geode.zip": "https://geodiverse-data-collection.cs.princeton.edu/geode.zip"},
    manual="download it from https://geodiverse-data-collection.cs.princeton.edu (CC BY)",
)


def _image(member: PurePosixPath) -> str | None:
    """The path below the folder ``images``, as index.csv gives it."""
    parts = member.parts
    return "/".join(parts[parts.index("images") + 1 :]) if "images" in parts[:-1] else None


def _labels(texts: Mapping[str, str], names: Sequence[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    rows = csv.DictReader(texts["index.csv"].splitlines())
    if missing := {"file_path", "object", "region"} - set(rows.fieldnames or ()):
        raise DataError(f"geode: index.csv has no column {', '.join(sorted(missing))}")
    listed, objects, regions = [], [], []
    for number, row in enumerate(rows, 2):
        region = (row["region"] or "").replace(" ", "")
        if region not in GROUPS:
            raise DataError(f"geode: index.csv, line {number}: region {region!r}, expected one of {', '.join(GROUPS)}")
        if not row["object"]:
            raise DataError(f"geode: index.csv, line {number}: no object")
        listed.append(row["file_path"].removeprefix("./").removeprefix("images/"))
        objects.append(row["object"].strip().replace("_", " "))
        regions.append(GROUPS.index(region))
    return listed, {"object": np.array(objects), "group": np.array(regions, dtype=np.int64)}


RECIPE = images.Recipe(ORIGIN, _image, ("index.csv",), _labels)


def read(
    *,
    size: int | str | Sequence[int] = 224,
    crop: str = "center",
    split_seed: int = 0,
    faulty: str = "refuse",
    edition: str = "",
) -> GroupedData:
    """GeoDE as grouped data: inputs ``[N, 3, height, width]`` uint8, label = object, group = region."""
    packed = images.read(RECIPE, size=size, crop=crop, faulty=faulty, edition=edition)
    names, label = np.unique(packed.columns["object"], return_inverse=True)
    return packed.grouped(
        name="geode",
        label=torch.from_numpy(label),
        group=torch.from_numpy(packed.columns["group"]),
        split=images.random_split(packed.columns["name"], packed.columns["content"], shares=SHARES, seed=split_seed),
        label_names=tuple(names.tolist()),
        group_names=GROUPS,
        split_names=SPLITS,
    )


def fetch() -> list[Path]:
    return [archive.path for archive in files.find(ORIGIN)]


def verify() -> list[str]:
    return images.verify(RECIPE)
