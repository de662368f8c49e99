"""Waterbirds: birds of CUB-200-2011 pasted onto land and water backgrounds of Places (Sagawa et al. 2020).

Label: landbird or waterbird, or the kind of bird; group: the background. In the training part 95 % of the birds lie on
"their" background, in the other two parts half of each. The official split is used: 4,795 / 1,199 / 5,794 images.
(arXiv 2410.17358 prints 4,795 / 2,400 / 2,800, which cannot be had from the 11,788 images; its numbers fit the official
one.)
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from fairtuning.datasets import DataError, GroupedData, check_choice, images

BIRDS = ("landbird", "waterbird")
LABELS = ("bird", "kind")
GROUPS = ("land", "water")
COLUMNS = {"y": 1, "place": 1, "split": 2}  # label, background and part, each with its largest value
#: Images by (label, group): landbirds on land, on water, waterbirds on land, on water, as published.
COUNTS = {"training": (3498, 184, 56, 1057), "validation": (467, 466, 133, 133), "test": (2255, 2255, 642, 642)}


def _labels(texts: images.Texts, names: Sequence[str]) -> tuple[list[str], images.Columns]:
    listed, columns = [], {"label": [], "group": [], "split": []}
    for where, row in images.rows(texts["metadata.csv"], "waterbirds: metadata.csv", "img_filename", *COLUMNS):
        listed.append(row["img_filename"])
        for values, (name, most) in zip(columns.values(), COLUMNS.items(), strict=True):
            if (value := row[name].strip()) not in map(str, range(most + 1)):
                raise DataError(f"{where}{name} is {value!r}; allowed: 0 to {most}")
            values.append(int(value))
    return listed, {name: np.array(values, dtype=np.int64) for name, values in columns.items()}


RECIPE = images.Recipe(
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
    labels=_labels,
    size=112,
    texts=("metadata.csv",),
    image=lambda member: "/".join(member.parts[-2:]),  # 001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg
)


def kind_of(image: str) -> str:
    """The last word of the species by which CUB's folders are named: its 200 species are of 70 kinds.

    >>> kind_of("001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg"), kind_of("070.Violetear/1.jpg")
    ('albatross', 'violetear')
    """
    return re.split(r"[._]", image.partition("/")[0])[-1].lower()


def read(*, label: str = "bird", group: str = "background", **how: Any) -> GroupedData:
    """Waterbirds as grouped data: inputs ``[11788, 3, height, width]`` uint8; ``how``: as for `images.read`.

    ``label``: "bird" (1 = waterbird) or "kind" (70 of them, with 18 to 581 training images: `kind_of`, ours);
    ``group``: "background" (1 = water).
    """
    check_choice("label", label, LABELS)
    check_choice("group", group, ("background",))
    packed = images.read(RECIPE, **how)
    bird, place, split = (packed.columns[name] for name in ("label", "group", "split"))
    for number, (part, expected) in enumerate(COUNTS.items()):
        found = tuple(np.bincount((2 * bird + place)[split == number], minlength=4).tolist())
        if found != expected and how.get("faulty", "refuse") == "refuse":
            raise DataError(f"waterbirds: (label, group) counts of {part} are {found}, expected {expected}")
    names, values = BIRDS, bird
    if label == "kind":
        names, values = np.unique([kind_of(name) for name in packed.columns["name"].tolist()], return_inverse=True)
    return packed.grouped((values, names), (place, GROUPS), split)
