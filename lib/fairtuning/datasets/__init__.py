"""Grouped data: every data set gives inputs, a label, a group and a split, with names for their values."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor

from fairtuning import FairtuningError


class DataError(FairtuningError):
    """Data that is missing, changed or malformed."""


def check_choice(what: str, value: str, allowed: Collection[str]) -> None:
    """Raises DataError, in one line, unless ``value`` is among ``allowed``."""
    if value not in allowed:
        raise DataError(f"{what} is {value!r}; allowed: {', '.join(allowed)}")


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

    def part(self, split: str) -> Tensor:
        """Indices ``[n]`` of the examples of one split."""
        if split not in self.split_names:
            raise DataError(f"{self.name} has no split {split!r}; it has {', '.join(self.split_names)}")
        return torch.nonzero(self.split == self.split_names.index(split)).squeeze(1)


@dataclass(frozen=True)
class Source:
    """What the command line says of a data set, and the module of this package that reads it."""

    title: str
    module: str
    reader: str
    licence: str
    needs: str  # what a user must have: "nothing" for embedded data

    def call(self, function: str) -> Callable:
        return getattr(import_module(f"fairtuning.datasets.{self.module}"), function)


SOURCES: dict[str, Source] = {
    "adult": Source("Adult (census income, UCI)", "adult", "read", "CC BY 4.0", "6 MB download"),
    "census": Source("synthetic census with an adjustable bias", "embedded", "census", "MIT (generated)", "nothing"),
    "digits": Source(
        "scikit-learn's digits with a background shortcut", "embedded", "digits", "BSD-3-Clause", "nothing"
    ),
    "parity": Source(
        "scikit-learn's digits, even or odd, on coloured grounds", "embedded", "parity", "BSD-3-Clause", "nothing"
    ),
    "waterbirds": Source(
        "Waterbirds (birds on land and water backgrounds)",
        "waterbirds",
        "read",
        "non-commercial research (CUB-200-2011, Places)",
        "0.5 GB download",
    ),
    "celeba": Source(
        "CelebA (faces of celebrities, 40 attributes)",
        "celeba",
        "read",
        "non-commercial research by agreement, no redistribution",
        "1.4 GB, put in place by hand after agreeing",
    ),
    "utkface": Source(
        "UTKFace (faces with age, gender, race)",
        "utkface",
        "read",
        "non-commercial research",
        "0.1 GB, put in place by hand",
    ),
    "lfw": Source(
        "LFW, deep-funneled (news photographs with attributes)",
        "lfw",
        "read",
        "research; the photographs stay those of their owners",
        "0.1 GB, put in place by hand",
    ),
    "aircraft": Source(
        "FGVC-Aircraft (100 variants)", "aircraft", "read", "non-commercial research", "2.8 GB download"
    ),
    "geode": Source("GeoDE (40 objects, 6 regions)", "geode", "read", "CC BY 4.0", "download of many GB"),
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
    return source(name).call("fetch")() if source(name).needs != "nothing" else []


def verify(name: str) -> list[str]:
    """One line per file of ``name`` already here; raises DataError on a missing or changed one."""
    if source(name).needs == "nothing":
        data = load(name)
        return [f"{name}: generated, {len(data.label)} examples, digest {data.digest[:12]}"]
    return source(name).call("verify")()


def pack(name: str, **options) -> GroupedData:
    """Decodes the images of ``name`` into one memory-mapped uint8 file, where that is not done, and reads it.

    ``options`` (size, crop, faulty, edition) as for ``load``, which does the same; a packed edition can be carried to
    another machine, into ``<data folder>/<name>/packed/``, without its archive.
    """
    if "size" not in signature(source(name).call(source(name).reader)).parameters:
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
