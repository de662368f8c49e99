"""CelebA: 202,599 aligned faces of 10,177 celebrities with 40 binary attributes (Liu, Luo, Wang, Tang, ICCV 2015).

Any attribute can be the label and any other the group; the official partition (162,770 / 19,867 / 19,962 images, no
identity in two parts) is the split. The attributes are annotators' guesses from a picture, "Male" among them.
The lists name all images; only the rows whose image is there are kept, so a subset is read like the whole.
"""

import base64
import io
import re
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from fairtuning.datasets import DataError, GroupedData, check_choice, images

TEXTS = ("list_attr_celeba.txt", "list_eval_partition.txt")
#: Committed lists of image numbers (never images), so that anyone with the official archive can make the same subset.
SUBSETS = ("celeba-20000",)


def numbers(subset: str) -> np.ndarray:
    """The image numbers of a committed subset, ascending: 34 stands for 000034.jpg."""
    check_choice("subset", subset, SUBSETS)
    text = resources.files("fairtuning.datasets").joinpath("editions", f"{subset}.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    bits = np.frombuffer(zlib.decompress(base64.b64decode("".join(lines))), dtype=np.uint8)
    return np.flatnonzero(np.unpackbits(bits)) + 1


def _labels(texts: images.Texts, names: Sequence[str]) -> tuple[list[str], images.Columns]:
    attributes, partition = _table(texts, TEXTS[0], header=True), _table(texts, TEXTS[1], header=False)
    split = partition.reindex(attributes.index).to_numpy()[:, 0]
    if np.isnan(split).any():
        raise DataError(f"celeba: list_eval_partition.txt does not name {attributes.index[np.isnan(split)][0]}")
    for values, allowed, what in ((split, (0, 1, 2), "partition"), (attributes.to_numpy(), (-1, 1), "attribute")):
        if strange := sorted(set(np.unique(values).tolist()) - set(allowed)):
            raise DataError(f"celeba: {what} is {strange[0]}; allowed: {', '.join(map(str, allowed))}")
    columns = {name: attributes[name].to_numpy(np.int8) for name in attributes}
    return list(attributes.index), {"split": split.astype(np.int64)} | columns


def _table(texts: images.Texts, name: str, *, header: bool):
    import pandas as pd

    lines = texts[name].splitlines()
    try:
        # The attribute list opens with the number of images and the 40 names, one fewer than each row has fields.
        rows = io.StringIO("\n".join(lines[2:] if header else lines))
        table = pd.read_csv(rows, sep=r"\s+", header=None, index_col=0)
        if header and len(table) != int(lines[0]):
            raise ValueError(f"{len(table)} rows, the first line promises {lines[0]}")
        table.columns = lines[1].split() if header else ["partition"]
        if table.isna().to_numpy().any():
            raise ValueError("a row has too few values")
        return table.astype(float)
    except (ValueError, IndexError, pd.errors.ParserError) as error:
        raise DataError(f"celeba: {name} cannot be read ({' '.join(str(error).split())})") from None


RECIPE = images.Recipe(
    name="celeba",
    sets=(("img_align_celeba.zip", *TEXTS), ("celeba.tar.gz",)),
    known={
        "img_align_celeba.zip": {"00d2c5bc6d35e252742224ab0c1e8fcb": "official"},
        "list_attr_celeba.txt": {"75e246fa4810816ffd6ee81facbd244c": "official"},
        "list_eval_partition.txt": {"d32c9cbf5e040fd4025c592c306e6668": "official"},
        "celeba.tar.gz": {"6d0689fd67e69cb1b281e926d3ababc6c74ba175935f117e2085d0ea700dce86": "resized-64-20000"},
    },
    manual=(
        "read the CelebA agreement (non-commercial research, no redistribution) at "
        "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html, download them from there in a browser (Google Drive often "
        "answers with a quota page: try again a day later) and put them into that folder"
    ),
    labels=_labels,
    size="80x64",
    texts=TEXTS,
    image=lambda member: member.name if re.fullmatch(r"\d{6}", member.stem) else None,
    all_listed=False,
)


@cache
def _subset(name: str) -> images.Recipe:
    chosen = frozenset(f"{number:06d}.jpg" for number in numbers(name))
    return replace(RECIPE, subset=name, image=lambda member: member.name if member.name in chosen else None)


def read(*, label: str = "Blond_Hair", group: str = "Male", subset: str = "", **how: Any) -> GroupedData:
    """CelebA as grouped data: inputs ``[N, 3, height, width]`` uint8; label and group are attributes, 1 = present.

    ``subset="celeba-20000"`` keeps the images of the compact edition out of the official archive. ``how``: as for
    `images.read`.
    """
    packed = images.read(_subset(subset) if subset else RECIPE, **how)
    return packed.by_attributes(label, group, packed.columns["split"])
