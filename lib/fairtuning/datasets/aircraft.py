"""FGVC-Aircraft: 10,000 photographs of 100 aircraft variants (Maji et al. 2013, arXiv 1306.5151).

The official split has 3,334 / 3,333 / 3,333 images. (arXiv 2410.17358 trains on the first two together, which leaves
nothing to choose by but the test images; here the second stays the validation part.) The lowest 20 rows of each image
are a banner with its photographer's name, and are cut off, as the authors of the data ask.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from fairtuning.datasets import DataError, GroupedData, check_choice, files, images

LEVELS = ("variant", "family", "manufacturer")
SPLITS = ("training", "validation", "test")
PARTS = ("train", "val", "test")  # as the lists call them
TEXTS = tuple(f"images_{level}_{part}.txt" for level in LEVELS for part in PARTS)

ORIGIN = files.Origin(
    name="aircraft",
    sets=(("fgvc-aircraft-2013b.tar.gz",),),
    known={"fgvc-aircraft-2013b.tar.gz": {"d4acdd33327262359767eeaa97a4f732": "official"}},
    address={
        "fgvc-aircraft-2013b.tar.gz": (
            "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"
        )
    },
    manual="download it from https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft (non-commercial research)",
)


def _image(member: PurePosixPath) -> str | None:
    return member.stem if "images" in member.parts else None


def _labels(texts: Mapping[str, str], names: Sequence[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    found = {level: {} for level in LEVELS}
    split = {}
    for level in LEVELS:
        for number, part in enumerate(PARTS):
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
    listed = list(split)
    columns = {level: np.array([found[level][image] for image in listed]) for level in LEVELS}
    return listed, columns | {"split": np.array([split[image] for image in listed], dtype=np.int64)}


RECIPE = images.Recipe(ORIGIN, _image, TEXTS, _labels, trim=20)


def read(
    *,
    label: str = "variant",
    group: str = "",
    size: int | str | Sequence[int] = 224,
    crop: str = "center",
    faulty: str = "refuse",
    edition: str = "",
) -> GroupedData:
    """FGVC-Aircraft as grouped data: inputs ``[N, 3, height, width]`` uint8; label and group are of ``LEVELS``.

    No attribute of this data set is sensitive: by default the groups are the classes, as in arXiv 2410.17358.
    """
    group = group or label
    check_choice("label", label, LEVELS)
    check_choice("group", group, LEVELS)
    packed = images.read(RECIPE, size=size, crop=crop, faulty=faulty, edition=edition)
    label_names, labels = np.unique(packed.columns[label], return_inverse=True)
    group_names, groups = np.unique(packed.columns[group], return_inverse=True)
    return packed.grouped(
        name="aircraft",
        label=torch.from_numpy(labels),
        group=torch.from_numpy(groups),
        split=torch.from_numpy(packed.columns["split"]),
        label_names=tuple(label_names.tolist()),
        group_names=tuple(group_names.tolist()),
        split_names=SPLITS,
    )


def fetch() -> list[Path]:
    return [archive.path for archive in files.find(ORIGIN)]


def verify() -> list[str]:
    return images.verify(RECIPE)
