"""UTKFace: 23,708 aligned and cropped faces; a file's name says age, gender and race (Zhang, Song, Qi, CVPR 2017).

``<age>_<gender>_<race>_<date>.jpg.chip.jpg``. All three are guesses from a picture, an algorithm's that a
person checked; gender has two values, race five. There is no official split: 70 / 10 / 20 % by seed 0, files of one
content in one part. Names that lack a field give no label; they are counted and left out.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from fairtuning.datasets import DataError, GroupedData, check_choice, files, images

GENDERS = ("male", "female")
RACES = ("White", "Black", "Asian", "Indian", "Others")
SPLITS = ("training", "validation", "test")
SHARES = (0.7, 0.1, 0.2)
LABELS = ("age>=median", "age>=N", "gender", "race", "white")
GROUPS = ("gender", "race", "white")
NAME = re.compile(r"(\d{1,3})_([01])_([0-4])_[^_]*jpg")  # the date may have too few digits; a field may not be missing

ORIGIN = files.Origin(
    name="utkface",
    sets=(("UTKFace.tar.gz",),),
    known={"UTKFace.tar.gz": {"bd78806a7cffd6bbffb737d07e457e22ca0d6bb6f2170edcc3746829491d8cb6": "resized-112"}},
    manual=(
        "read the terms (non-commercial research) at https://susanqq.github.io/UTKFace, download 'Aligned&Cropped "
        "Faces' from there and put it into that folder"
    ),
)


def _image(member: PurePosixPath) -> str | None:
    return member.name


def _labels(texts: Mapping[str, str], names: Sequence[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    found = {name: match.groups() for name in names if (match := NAME.match(name))}
    columns = np.array(list(found.values()), dtype=np.int64).reshape(-1, 3).T
    return list(found), dict(zip(("age", "gender", "race"), columns, strict=True))


RECIPE = images.Recipe(ORIGIN, _image, (), _labels, unlabelled="age, gender or race is missing in the name")


def read(
    *,
    label: str = "age>=median",
    group: str = "gender",
    size: int | str | Sequence[int] = 80,
    crop: str = "center",
    split_seed: int = 0,
    faulty: str = "refuse",
    edition: str = "",
) -> GroupedData:
    """UTKFace as grouped data: inputs ``[N, 3, height, width]`` uint8.

    ``label``: "age>=median" (of the training part), "age>=30" or another age, "gender" (1 = female), "race" (five
    values) or "white" (1 = White); ``group``: "gender", "race" or "white".
    """
    check_choice("group", group, GROUPS)
    if not re.fullmatch(r"age>=\d{1,3}", label):
        check_choice("label", label, LABELS)
    if label == group:
        raise DataError(f"label and group are both {label!r}; they must differ")
    packed = images.read(RECIPE, size=size, crop=crop, faulty=faulty, edition=edition)
    age, gender, race = (packed.columns[name] for name in ("age", "gender", "race"))
    split = images.random_split(packed.columns["name"], packed.columns["content"], shares=SHARES, seed=split_seed)
    values = {
        "gender": (gender, GENDERS),
        "race": (race, RACES),
        "white": (1 - race.clip(0, 1), ("not White", "White")),
    }
    if label.startswith("age"):
        bound = int(np.median(age[split == 0]) if label.endswith("median") else label[5:])
        values[label] = (age >= bound).astype(np.int64), (f"under {bound}", f"{bound} or older")
    return packed.grouped(
        name="utkface",
        label=torch.from_numpy(values[label][0]),
        group=torch.from_numpy(values[group][0]),
        split=split,
        label_names=values[label][1],
        group_names=values[group][1],
        split_names=SPLITS,
    )


def fetch() -> list[Path]:
    return [archive.path for archive in files.find(ORIGIN)]


def verify() -> list[str]:
    return images.verify(RECIPE)
