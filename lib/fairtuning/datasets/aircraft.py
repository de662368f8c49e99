"""FGVC-Aircraft: 10,000 photographs of 100 aircraft variants (Maji et al. 2013, arXiv 1306.5151).

The official split has 3,334 / 3,333 / 3,333 images. (arXiv 2410.17358 trains on the first two together, which leaves
nothing to choose by but the test images; here the second stays the validation part.) The lowest 20 rows of each image
are a banner with its photographer's name, and are cut off, as the authors of the data ask.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from fairtuning.datasets import DataError, GroupedData, check_choice, images

LEVELS = ("variant", "family", "manufacturer")
PARTS = ("train", "val", "test")  # as the lists call them
TEXTS = tuple(f"images_{level}_{part}.txt" for level in LEVELS for part in PARTS)

ARCHIVE = "fgvc-aircraft-2013b.tar.gz"


def _labels(texts: images.Texts, names: Sequence[str]) -> tuple[list[str], images.Columns]:
    found, split = {level: {} for level in LEVELS}, {}
    for level, (number, part) in product(LEVELS, enumerate(PARTS)):
        file = f"images_{level}_{part}.txt"
        for line, text in enumerate(texts[file].splitlines(), 1):
            image, _, value = text.strip().partition(" ")  # 1025794 707-320
            if not value:
                raise DataError(f"aircraft: {file}, line {line}: {text!r}, expected an image and its {level}")
            found[level][image] = value
            if split.setdefault(image, number) != number:
                raise DataError(f"aircraft: {file}, line {line}: image {image} is in two parts")
    for level in LEVELS:
        if missing := sorted(split.keys() - found[level].keys()):
            raise DataError(f"aircraft: image {missing[0]} has no {level}")
    columns = {level: np.array([found[level][image] for image in split]) for level in LEVELS}
    return list(split), columns | {"split": np.array(list(split.values()), dtype=np.int64)}


RECIPE = images.Recipe(
    name="aircraft",
    sets=((ARCHIVE,),),
    known={ARCHIVE: {"d4acdd33327262359767eeaa97a4f732": "official"}},
    address={ARCHIVE: f"https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/{ARCHIVE}"},
    manual="download it from https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft (non-commercial research)",
    labels=_labels,
    size=224,
    texts=TEXTS,
    image=lambda member: member.stem if "images" in member.parts else None,
    trim=20,
)


def read(*, label: str = "variant", group: str = "", **how: Any) -> GroupedData:
    """FGVC-Aircraft as grouped data: inputs ``[N, 3, height, width]`` uint8; label and group are of ``LEVELS``.

    No attribute of this data set is sensitive: by default the groups are the classes, as in arXiv 2410.17358. ``how``:
    as for `images.read`.
    """
    group = group or label
    check_choice("label", label, LEVELS)
    check_choice("group", group, LEVELS)
    packed = images.read(RECIPE, **how)
    named = [np.unique(packed.columns[level], return_inverse=True)[::-1] for level in (label, group)]
    return packed.grouped(*named, packed.columns["split"])
