"""GeoDE: 61,940 photographs of 40 objects, asked for in six regions of the world (Ramaswamy et al. 2023, 2301.02560).

Label: the object; group: the region. There is no official split. arXiv 2410.17358 has 80 : 20 and names no seed; here
20 % are the test part and an eighth of the rest is the validation part, by seed 0.
"""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from fairtuning.datasets import DataError, GroupedData, images

GROUPS = ("Africa", "Americas", "EastAsia", "Europe", "SouthEastAsia", "WestAsia")


def _image(member: PurePosixPath) -> str | None:
    """The path below the folder ``images``, as index.csv gives it."""
    parts = member.parts
    return "/".join(parts[parts.index("images") + 1 :]) if "images" in parts[:-1] else None


def _labels(texts: images.Texts, names: Sequence[str]) -> tuple[list[str], images.Columns]:
    listed, objects, regions = [], [], []
    for where, row in images.rows(texts["index.csv"], "geode: index.csv", "file_path", "object", "region"):
        region = row["region"].replace(" ", "")
        if region not in GROUPS:
            raise DataError(f"{where}region {region!r}, expected one of {', '.join(GROUPS)}")
        if not row["object"]:
            raise DataError(f"{where}no object")
        listed.append(row["file_path"].removeprefix("./").removeprefix("images/"))
        objects.append(row["object"].strip().replace("_", " "))
        regions.append(GROUPS.index(region))
    return listed, {"object": np.array(objects), "group": np.array(regions, dtype=np.int64)}


RECIPE = images.Recipe(
    name="geode",
    sets=(("geode.zip",),),
    known={},
    address={"geode.zip": "https://geodiverse-data-collection.cs.princeton.edu/geode.zip"},
    manual="download it from https://geodiverse-data-collection.cs.princeton.edu (CC BY)",
    labels=_labels,
    size=224,
    texts=("index.csv",),
    image=_image,
)


def read(*, split_seed: int = 0, **how: Any) -> GroupedData:
    """GeoDE as grouped data: inputs ``[N, 3, height, width]`` uint8, label = object, group = region.

    ``how``: as for `images.read`.
    """
    packed = images.read(RECIPE, **how)
    names, label = np.unique(packed.columns["object"], return_inverse=True)
    return packed.grouped((label, names), (packed.columns["group"], GROUPS), packed.random_split(split_seed))
