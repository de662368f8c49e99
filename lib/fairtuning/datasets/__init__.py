"""Grouped data: every data set gives inputs, a label, a group and a split, with names for their values."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fairtuning import FairtuningError


class DataError(FairtuningError):
    """Data that is missing, changed or malformed."""


def check_choice(what: str, value: str, allowed: Collection[str]) -> None:
    """Raises DataError, in one line, unless ``value`` is among ``allowed``."""
    if value not in allowed:
        raise DataError(f"{what} is {value!r}; allowed: {', '.join(allowed)}")


def check_task(label: str, group: str, labels: Collection[str], groups: Collection[str] | None = None) -> None:
    """Raises DataError unless label and group are different columns, each among those allowed (default: ``labels``)."""
    check_choice("label", label, labels)
    check_choice("group", group, labels if groups is None else groups)
    if label == group:
        raise DataError(f"label and group are both {label!r}; they must differ")


#: Values ``[N]`` and what they stand for: 1 is the second name.
Named = tuple[ArrayLike, Sequence[str]]


@dataclass(frozen=True, eq=False)
class GroupedData:
    """N examples of one edition of one data set.

    inputs ``[N, ...]`` (images: uint8 ``[N, 3, height, width]``, memory-mapped) · label ``[N]`` int64 · group ``[N]``
    int64 (the sensitive attribute) · split ``[N]`` int64; ``label_names[label]``, ``group_names[group]`` and
    ``split_names[split]`` say what the numbers mean. ``digest`` is the SHA-256 of what was read (of the generator and
    its seed, where the data is generated).
    """

    name: str
    edition: str
    digest: str
    inputs: Tensor
    label: Tensor
    group: Tensor
    split: Tensor
    label_names: tuple[str, ...]
    group_names: tuple[str, ...]
    split_names: tuple[str, ...]
    feature_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what was left out, and why

    def __post_init__(self):
        for values, names, what in (
            (self.label, self.label_names, "label"),
            (self.group, self.group_names, "group"),
            (self.split, self.split_names, "split"),
        ):
            if len(values) != len(self.inputs):
                raise DataError(f"{self.name}: {len(values)} {what} values for {len(self.inputs)} inputs")
            found = set(values.unique().tolist())
            if strange := found - set(range(len(names))):
                raise DataError(f"{self.name}: {what} {min(strange)}; allowed: 0 to {len(names) - 1}")
            if empty := sorted(set(range(len(names))) - found):
                raise DataError(f"{self.name}: no example with {what} {names[empty[0]]!r}; every {what} needs one")

    @classmethod
    def of(cls, name: str, edition: str, digest: str, inputs: ArrayLike, **columns: Any) -> Self:
        """The same, where ``label``, ``group`` and ``split`` are each values of any integer type and their names."""
        for what in ("label", "group", "split"):
            values, names = columns[what]
            columns[what] = torch.from_numpy(np.asarray(values, dtype=np.int64))
            columns[f"{what}_names"] = tuple(map(str, names))
        return cls(name, edition, digest, torch.as_tensor(inputs), **columns)

    def part(self, split: str) -> Tensor:
        """Indices ``[n]`` of the examples of one split."""
        if split not in self.split_names:
            raise DataError(f"{self.name} has no split {split!r}; it has {', '.join(self.split_names)}")
        return torch.nonzero(self.split == self.split_names.index(split)).squeeze(1)


@dataclass(frozen=True)
class Source:
    """What the command line says of a data set, and the module of this package that reads it."""

    title: str
    licence: str
    needs: str  # what a user must have: "nothing" for embedded data
    module: str
    reader: str = "read"
    images: bool = True  # then the module has a RECIPE

    def call(self, function: str) -> Callable:
        return getattr(import_module(f"fairtuning.datasets.{self.module}"), function)


CENSUS = "synthetic census with an adjustable bias"
DIGITS = "scikit-learn's digits with a background shortcut"
PARITY = "scikit-learn's digits, even or odd, on coloured grounds"
SOURCES: dict[str, Source] = {
    "adult": Source("Adult (census income, UCI)", "CC BY 4.0", "6 MB download", "adult", images=False),
    "census": Source(CENSUS, "MIT (generated)", "nothing", "embedded", "census", images=False),
    "digits": Source(DIGITS, "BSD-3-Clause", "nothing", "embedded", "digits", images=False),
    "parity": Source(PARITY, "BSD-3-Clause", "nothing", "embedded", "parity", images=False),
    "waterbirds": Source(
        "Waterbirds (birds on land and water backgrounds)",
        "non-commercial research (CUB-200-2011, Places)",
        "0.5 GB download",
        "waterbirds",
    ),
    "celeba": Source(
        "CelebA (faces of celebrities, 40 attributes)",
        "non-commercial research by agreement, no redistribution",
        "1.4 GB, put in place by hand after agreeing",
        "celeba",
    ),
    "utkface": Source(
        "UTKFace (faces with age, gender, race)", "non-commercial research", "0.1 GB, put in place by hand", "utkface"
    ),
    "lfw": Source(
        "LFW, deep-funneled (news photographs with attributes)",
        "research; the photographs stay those of their owners",
        "0.1 GB, put in place by hand",
        "lfw",
    ),
    "aircraft": Source("FGVC-Aircraft (100 variants)", "non-commercial research", "2.8 GB download", "aircraft"),
    "geode": Source("GeoDE (40 objects, 6 regions)", "CC BY 4.0", "download of many GB", "geode"),
}


def source(name: str) -> Source:
    if name not in SOURCES:
        raise DataError(f"unknown data set {name!r}; known: {', '.join(SOURCES)}")
    return SOURCES[name]


def load(name: str, **options) -> GroupedData:
    """The grouped data set ``name``; fetched first where it is not here yet. ``options`` go to its reader."""
    return source(name).call(source(name).reader)(**options)


def fetch(name: str) -> list[Path]:
    """Brings the official files of ``name`` into the data folder, checked by SHA-256; [] for embedded data."""
    from fairtuning.datasets import files

    if source(name).images:
        return [archive.path for archive in files.find(source(name).call("RECIPE"))]
    return source(name).call("fetch")() if source(name).needs != "nothing" else []


def verify(name: str) -> list[str]:
    """One line per file of ``name`` already here; raises DataError on a missing or changed one."""
    from fairtuning.datasets import images

    if source(name).images:
        return images.verify(source(name).call("RECIPE"))
    if source(name).needs != "nothing":
        return source(name).call("verify")()
    data = load(name)
    return [f"{name}: generated, {len(data.label)} examples, digest {data.digest[:12]}"]


def pack(name: str, **options) -> GroupedData:
    """Decodes the images of ``name`` into one memory-mapped uint8 file, where that is not done, and reads it.

    ``options`` (size, crop, faulty, edition) as for ``load``, which does the same; a packed edition can be carried to
    another machine, into ``<data folder>/<name>/packed/``, without its archive.
    """
    if not source(name).images:
        raise DataError(f"{name} has no images to pack")
    return load(name, **options)


def load_first(*names: str, **options) -> GroupedData:
    """The first of ``names`` that can be had here (cached, mirrored or reachable)."""
    for name in names[:-1]:
        try:
            return load(name, **options.get(name, {}))
        except DataError:
            continue
    return load(names[-1], **options.get(names[-1], {}))
