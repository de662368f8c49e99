"""UTKFace: 23,708 aligned and cropped faces; a file's name says age, gender and race (Zhang, Song, Qi, CVPR 2017).

``<age>_<gender>_<race>_<date>.jpg.chip.jpg``. All three are guesses from a picture, an algorithm's that a
person checked; gender has two values, race five. There is no official split: 70 / 10 / 20 % by seed 0, files of one
content in one part. Names that lack a field give no label; they are counted and left out.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from fairtuning.datasets import GroupedData, check_task, images

GENDERS = ("male", "female")
RACES = ("White", "Black", "Asian", "Indian", "Others")
LABELS = ("age>=median", "age>=N", "gender", "race", "white")
GROUPS = ("gender", "race", "white")
NAME = re.compile(r"(\d{1,3})_([01])_([0-4])_[^_]*jpg")  # the date may have too few digits; a field may not be missing


def _labels(texts: images.Texts, names: Sequence[str]) -> tuple[list[str], images.Columns]:
    found = {name: match.groups() for name in names if (match := NAME.match(name))}
    columns = np.array(list(found.values()), dtype=np.int64).reshape(-1, 3).T
    return list(found), dict(zip(("age", "gender", "race"), columns, strict=True))


RECIPE = images.Recipe(
    name="utkface",
    sets=(("UTKFace.tar.gz",),),
    known={"UTKFace.tar.gz": {"bd78806a7cffd6bbffb737d07e457e22ca0d6bb6f2170edcc3746829491d8cb6": "resized-112"}},
    manual=(
        "read the terms (non-commercial research) at https://susanqq.github.io/UTKFace, download 'Aligned&Cropped "
        "Faces' from there and put it into that folder"
    ),
    labels=_labels,
    size=80,
    unlabelled="age, gender or race is missing in the name",
)


def read(*, label: str = "age>=median", group: str = "gender", split_seed: int = 0, **how: Any) -> GroupedData:
    """UTKFace as grouped data: inputs ``[N, 3, height, width]`` uint8; ``how``: as for `images.read`.

    ``label``: "age>=median" (of the training part), "age>=30" or another age, "gender" (1 = female), "race" (five
    values) or "white" (1 = White); ``group``: "gender", "race" or "white".
    """
    check_task(label, group, LABELS if not re.fullmatch(r"age>=\d{1,3}", label) else (label,), GROUPS)
    packed = images.read(RECIPE, **how)
    age, gender, race = (packed.columns[name] for name in ("age", "gender", "race"))
    split = packed.random_split(split_seed)
    values = {"gender": (gender, GENDERS), "race": (race, RACES), "white": (race == 0, ("not White", "White"))}
    if label.startswith("age"):
        bound = int(np.median(age[split.numpy() == 0]) if label.endswith("median") else label[5:])
        values[label] = age >= bound, (f"under {bound}", f"{bound} or older")
    return packed.grouped(values[label], values[group], split)
