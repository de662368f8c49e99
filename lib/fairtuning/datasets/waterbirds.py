"""Waterbirds: birds of CUB-200-2011 pasted onto land and water backgrounds of Places (Sagawa et al. 2020).

Label: landbird or waterbird, or the kind of bird; group: the background. In the training part 95 % of the birds lie on
"their" background, in the other two parts half of each. The official split is used: 4,795 / 1,199 / 5,794 images.
(arXiv 2410.17358 prints 4,795 / 2,400 / 2,800, which cannot be had from the 11,788 images; its numbers fit the official
one.)
"""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from fairtuning.datasets import DataError, GroupedData, check_choice, files, images

BIRDS = ("landbird", "waterbird")
LABELS = ("bird", "kind")
GROUPS = ("land", "water")
SPLITS = ("training", "validation", "test")
#: Images by (label, group): landbirds on land, on water, waterbirds on land, on water, as published.
COUNTS = {"training": (3498, 184, 56, 1057), "validation": (467, 466, 133, 133), "test": (2255, 2255, 642, 642)}

ORIGIN = files.Origin(
    name="waterbirds",
    sets=(("waterbirds_v1.0.tar.gz",), ("waterbird_complete95_forest2water2.tar.gz",)),
    known={
        "waterbirds_v1.0.tar.gz": {"f6cc3da4fb3d706132577fbf32d651f72ad44ddccc2b3443f6ad104d7047df32": "resized-128"}
    },
    address={
        "waterbirds_v1.0.tar.gz": (  # WILDS' bundle
            "https://worksheets.codalab.org/rest/bundles/0x505056d5cdea4e4eaa0e242cbfe2daa4/contents/blob/"
        ),
        "waterbird_complete95_forest2water2.tar.gz": (
            "https://nlp.stanford.edu/data/dro/waterbird_complete95_forest2water2.tar.gz"
        ),
    },
    manual="download it from https://wilds.stanford.edu/datasets or https://github.com/kohpangwei/group_DRO",
)


def _image(member: PurePosixPath) -> str | None:
    return "/".join(member.parts[-2:])  # 001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg


def _labels(texts: Mapping[str, str], names: Sequence[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    rows = csv.DictReader(texts["metadata.csv"].splitlines())
    if missing := {"img_filename", "y", "place", "split"} - set(rows.fieldnames or ()):
        raise DataError(f"waterbirds: metadata.csv has no column {', '.join(sorted(missing))}")
    listed, values = [], []
    for number, row in enumerate(rows, 2):
        where = f"waterbirds: metadata.csv, line {number}: "
        listed.append(row["img_filename"])
        allowed = {"y": range(2), "place": range(2), "split": range(3)}
        values.append([images.whole_number(row[name], values_of, where + name) for name, values_of in allowed.items()])
    columns = np.array(values, dtype=np.int64).reshape(-1, 3).T
    return listed, dict(zip(("label", "group", "split"), columns, strict=True))


RECIPE = images.Recipe(ORIGIN, _image, ("metadata.csv",), _labels)


def kind_of(image: str) -> str:
    """The last word of the species by which CUB's folders are named: its 200 species are of 70 kinds.

    >>> kind_of("001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg"), kind_of("070.Violetear/1.jpg")
    ('albatross', 'violetear')
    """
    return re.split(r"[._]", image.partition("/")[0])[-1].lower()


def read(
    *,
    label: str = "bird",
    group: str = "background",
    size: int | str | Sequence[int] = 112,
    crop: str = "center",
    faulty: str = "refuse",
    edition: str = "",
) -> GroupedData:
    """Waterbirds as grouped data: inputs ``[11788, 3, height, width]`` uint8.

    ``label``: "bird" (1 = waterbird) or "kind" (70 of them, with 18 to 581 training images: `kind_of`, ours);
    ``group``: "background" (1 = water).
    """
    check_choice("label", label, LABELS)
    check_choice("group", group, ("background",))
    packed = images.read(RECIPE, size=size, crop=crop, faulty=faulty, edition=edition)
    bird, place, split = (torch.from_numpy(packed.columns[name]) for name in ("label", "group", "split"))
    for number, (part, expected) in enumerate(COUNTS.items()):
        found = tuple(torch.bincount((2 * bird + place)[split == number], minlength=4).tolist())
        if found != expected and faulty == "refuse":
            raise DataError(f"waterbirds: (label, group) counts of {part} are {found}, expected {expected}")
    label_names, values = BIRDS, bird
    if label == "kind":
        kinds, found = np.unique([kind_of(name) for name in packed.columns["name"].tolist()], return_inverse=True)
        label_names, values = tuple(kinds.tolist()), torch.from_numpy(found)
    return packed.grouped(
        name="waterbirds",
        label=values,
        group=place,
        split=split,
        label_names=label_names,
        group_names=GROUPS,
        split_names=SPLITS,
    )


def fetch() -> list[Path]:
    return [archive.path for archive in files.find(ORIGIN)]


def verify() -> list[str]:
    return images.verify(RECIPE)
