"""LFW, deep-funneled: 13,233 news photographs of 5,749 people (Huang et al. 2007, 2012), with attributes ("LFW+a").

Gender is read from two lists checked by hand (Afifi and Abdelhamed, arXiv 1706.04277); the attributes are values that a
model of Kumar et al. (ICCV 2009) predicted for 13,143 of the images, positive where present. The compact edition knows
them as booleans only, which are true for the two thirds of an attribute's positive images with the highest value:
there, "not Heavy_Makeup" means "no, or less surely". Images without attributes, and eight whose gender the lists leave
open, are left out. The split has the sizes of arXiv 2403.00625 and no person in two parts.
"""

import io
import zipfile
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairtuning.datasets import DataError, GroupedData, images

GENDERS = ("male", "female")
LISTS = ("male_names.txt", "female_names.txt")
#: arXiv 2403.00625, Table 1: all 13,143 images with attributes; those of open gender are missing from our test part.
SIZES = (6885, 1000, 5258)
VALUES, BOOLEANS, ROWS = "lfw_attributes.txt", "lfw_binary_attributes2.npz", "filelist.txt"


def _labels(texts: images.Texts, names: Sequence[str]) -> tuple[list[str], images.Columns]:
    listed, columns = _values(texts[VALUES]) if VALUES in texts else _booleans(texts)
    male, female = ({line.strip() for line in texts[name].splitlines()} for name in LISTS)
    known = np.array([(name in male) != (name in female) for name in listed])
    columns["gender"] = np.array([name in female for name in listed], dtype=np.int8)
    return [name for name, kept in zip(listed, known, strict=True) if kept], {k: v[known] for k, v in columns.items()}


def _values(text: str) -> tuple[list[str], images.Columns]:
    """The official list: a comment, a header, then person, number of the image and 73 values, tab-separated."""
    lines = text.splitlines()
    header = lines[1].lstrip("#\t").split("\t") if len(lines) > 1 else []
    if header[:2] != ["person", "imagenum"]:
        raise DataError(f"lfw: {VALUES}, line 2 begins with {header[:2]}; expected person, imagenum")
    try:
        rows = [line.split("\t") for line in lines[2:]]
        values = np.array([row[2:] for row in rows], dtype=np.float64).reshape(len(rows), len(header) - 2)
        listed = [f"{row[0].replace(' ', '_')}_{int(row[1]):04d}.jpg" for row in rows]
    except (ValueError, IndexError) as error:
        raise DataError(f"lfw: {VALUES} cannot be read ({' '.join(str(error).split())})") from None
    return listed, _columns(header[2:], values > 0)


def _booleans(texts: images.Texts) -> tuple[list[str], images.Columns]:
    if missing := [name for name in (BOOLEANS, ROWS) if name not in texts]:
        raise DataError(f"lfw: neither {VALUES} nor {', '.join(missing)} is in the archive")
    listed = [line.strip().rsplit("/", 1)[-1] for line in texts[ROWS].splitlines()]
    try:
        with np.load(io.BytesIO(texts[BOOLEANS]), allow_pickle=False) as file:
            names, values = [name.decode() for name in file["attrname"]], file["data"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"lfw: {BOOLEANS} cannot be read ({' '.join(str(error).split())})") from None
    if values.dtype != bool or values.shape != (len(listed), len(names)):
        raise DataError(f"lfw: {BOOLEANS} holds {values.dtype} {values.shape}; expected bool {len(listed), len(names)}")
    return listed, _columns(names, values)


def _columns(names: Sequence[str], values: np.ndarray) -> images.Columns:
    return {name.replace(" ", "_"): values[:, column].astype(np.int8) for column, name in enumerate(names)}


RECIPE = images.Recipe(
    name="lfw",
    sets=(("lfw-deepfunneled.tgz", VALUES, *LISTS), ("lfw-deepfunneled.tar.gz",)),
    known={
        "lfw-deepfunneled.tgz": {"68331da3eb755a505a502b5aacb3c201": "official"},
        "lfw-deepfunneled.tar.gz": {
            "e521c255a8811d41fdfc91fae4b88fb578feb08854a455829b0656cca5e27bce": "resized-80-boolean"
        },
    },
    manual=(
        "for research: find the deep-funneled images and the two lists of gender (Afifi and Abdelhamed) by way of "
        "http://vis-www.cs.umass.edu/lfw and the attribute values at "
        "https://www.cs.columbia.edu/CAVE/databases/pubfig/download/lfw_attributes.txt, and put them into that folder"
    ),
    labels=_labels,
    size=80,
    texts=LISTS,
    optional=(VALUES, BOOLEANS, ROWS),
    unlabelled="without attributes, or named in both or in neither list of gender",
)


def split_people(names: Sequence[str], sizes: Sequence[int], *, seed: int = 0) -> Tensor:
    """``[N]`` int64, the part of each image ``<Person>_NNNN.jpg``: ``sizes`` images each, the last part takes the rest.

    People are drawn at random; one whose images do not all fit into what is left of a part goes to a later one.
    """
    person = [name.rsplit("_", 1)[0] for name in names]
    images_of = Counter(person)
    people = sorted(images_of)
    waiting = [people[i] for i in np.random.default_rng(seed).permutation(len(people))]
    part = dict.fromkeys(people, len(sizes) - 1)
    for number, room in enumerate(sizes[:-1]):
        for one in list(waiting):
            if images_of[one] <= room:
                part[one], room = number, room - images_of[one]
                waiting.remove(one)
    return torch.tensor([part[one] for one in person])


def read(*, label: str = "gender", group: str = "Heavy_Makeup", split_seed: int = 0, **how: Any) -> GroupedData:
    """LFW as grouped data: inputs ``[N, 3, height, width]`` uint8; ``how``: as for `images.read`.

    ``label`` and ``group`` are "gender" (1 = female) or an attribute, 1 = present (see above for the compact edition).
    The training and the validation part have the sizes of SIZES (their shares, where images are missing).
    """
    packed = images.read(RECIPE, **how)
    n, whole = len(packed.pixels), sum(SIZES)
    sizes = SIZES if 0 <= whole - n <= 8 else [round(n * size / whole) for size in SIZES]
    split = split_people(packed.columns["name"].tolist(), sizes, seed=split_seed)
    return packed.by_attributes(label, group, split, gender=GENDERS)
