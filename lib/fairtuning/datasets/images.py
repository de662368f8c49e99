"""Images as one uint8 tensor: decoded once, cached as a memory-mapped file, read as grouped data.

A data set module gives a ``Recipe``: where its files come from, which members of its archives are images, and how its
lists give each image its labels. ``read`` does the rest: the archive is read once from front to back, each image is
resized and cropped to one size and appended to ``data/<data set>/packed/<edition>-<size>….npy``; beside it lie the
columns of its labels (``.npz``) and what was read (``.json``: edition, digests, what was left out). Each later reading
maps the file, in milliseconds, and needs neither the archive nor a network.
"""

import csv
import hashlib
import io
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fairtuning.datasets import DataError, GroupedData, Named, check_choice, check_task, files
from fairtuning.paths import data_folder

#: "center": scaled until it covers the size, the middle kept. "stretch": scaled to the size, the aspect ratio lost.
CROPS = ("center", "stretch")
#: What to do with images that cannot be decoded, have no label, or are listed and not there.
FAULTY = ("refuse", "skip")
ENDINGS = (".jpg", ".jpeg", ".png")
#: What is opened, whatever a file is called. Pillow reads some 40 formats more: their decoders fail in ways of their
#: own, and that of EPS runs Ghostscript on whatever program the file holds.
FORMATS = ("JPEG", "PNG")
#: Raised by hand when decoding changes its meaning, so that older files are made again.
VERSION = 1

SPLITS = ("training", "validation", "test")

Texts = Mapping[str, Any]  # str, or bytes of an .npz
Columns = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Recipe(files.Origin):
    """Where one data set comes from, and how it is read.

    ``labels(texts, names)``: of the images ``names`` or of all, the names that have labels, and columns of one value
    each. ``texts``: base names of the lists that it needs; ``optional``: of those that it uses where they are there (an
    ``.npz`` comes as bytes). ``size``: what images are read at unless another one is asked for. ``image(member)``: the
    name under which a member's labels are listed, None for what is no image of this data set. ``version``: raised by
    hand when ``labels`` changes its meaning. ``trim``: rows of the original image to cut off at the bottom.
    ``all_listed``: a listed image that is not there is a fault. ``unlabelled``: why images without a label are known to
    exist and are left out; "" makes each one a fault. ``subset``: the name of the part of the images that ``image``
    lets through; "" for all.
    """

    labels: Callable[[Texts, Sequence[str]], tuple[Sequence[str], Columns]]
    size: int | str
    texts: tuple[str, ...] = ()
    image: Callable[[PurePosixPath], str | None] = lambda member: member.name
    version: int = 1
    trim: int = 0
    all_listed: bool = True
    unlabelled: str = ""
    subset: str = ""
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class Packed:
    """pixels ``[N, 3, height, width]`` uint8, memory-mapped; columns of N values each (``name`` and ``content``, the
    beginning of the file's SHA-256, among them); edition, digest, and notes on what was left out."""

    name: str
    edition: str
    digest: str
    pixels: Tensor
    columns: Columns
    notes: tuple[str, ...]

    def grouped(self, label: Named, group: Named, split: ArrayLike) -> GroupedData:
        """These images as grouped data; label and group are values ``[N]`` and what they stand for."""
        made = self.name, self.edition, self.digest, self.pixels
        return GroupedData.of(*made, label=label, group=group, split=(split, SPLITS), notes=self.notes)

    def by_attributes(self, label: str, group: str, split: ArrayLike, **named: Sequence[str]) -> GroupedData:
        """The same by two different attributes, 1 where above 0; ``named``: what some of them are called, 0 and 1."""
        check_task(label, group, sorted(set(self.columns) - {"split", "name", "content"}))
        both = [(self.columns[name] > 0, named.get(name, (f"not {name}", name))) for name in (label, group)]
        return self.grouped(*both, split)

    def random_split(self, seed: int) -> Tensor:
        """`random_split` of these images into 70 / 10 / 20 %."""
        return random_split(self.columns["name"], self.columns["content"], shares=(0.7, 0.1, 0.2), seed=seed)


def parse_size(size: int | str | Sequence[int]) -> tuple[int, int]:
    """(height, width) from 112, "112", "80x64" or (80, 64).

    >>> parse_size("80x64"), parse_size(112)
    ((80, 64), (112, 112))
    """
    try:
        numbers = [int(n) for n in (size.split("x") if isinstance(size, str) else np.atleast_1d(size))]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) not in (1, 2) or not all(8 <= number <= 4096 for number in numbers):
        raise DataError(f"size is {size!r}; allowed: a side such as 112 or height x width such as 80x64, 8 to 4096")
    return numbers[0], numbers[-1]


def decode(content: bytes, size: tuple[int, int], *, crop: str = "center", trim: int = 0) -> np.ndarray:
    """One JPEG or PNG file as ``[3, height, width]`` uint8 RGB, bicubic; grey, CMYK, palette and 16 bits included.

    ``trim`` rows of the original are cut off at its bottom first. OSError or ValueError where it is no whole image.
    """
    from PIL import Image, ImageOps

    with _open(content) as image:
        original = image.size
        height, width = size
        shrink = max if crop == "center" else min
        scale = shrink(width / original[0], height / (original[1] - trim))
        # A JPEG more than twice too large is decoded at a half, a quarter … already: many times faster.
        image.draft(None, (round(2 * scale * original[0]), round(2 * scale * original[1])))
        image.load()
        if image.mode == "P":  # its transparency, if any, cannot go to RGB directly
            image = image.convert("RGBA")
        if image.mode.startswith("I"):  # 16 bits of grey, which convert() clips; the upper 8, as Pillow reads colour
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("RGB")
        if trim:
            image = image.crop((0, 0, image.width, int(image.height * (1 - trim / original[1]))))
        if crop == "center":
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        else:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _open(content: bytes) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise OSError(f"no {' or '.join(FORMATS)} file, whatever its name; convert it") from None


# ----------------------------------------------------------------------------------------------------------- reading
def read(
    recipe: Recipe,
    *,
    size: int | str | Sequence[int] | None = None,
    crop: str = "center",
    faulty: str = "refuse",
    edition: str = "",
) -> Packed:
    """The images of a data set at one size: mapped where they are packed already, else packed first.

    ``edition``: which of several packed ones; default: the one of the files in the data folder, or the only one.
    ``faulty="skip"`` leaves out what cannot be decoded or has no label, and says so in the notes; "refuse" raises.
    """
    size = parse_size(recipe.size if size is None else size)
    check_choice("crop", crop, CROPS)
    check_choice("faulty", faulty, FAULTY)
    path, facts = _packed(recipe, size, crop, edition) or _pack(recipe, size, crop, faulty, edition)
    if facts["faulty"] and faulty == "refuse":
        raise DataError(_refusal(path, facts["faulty"]))
    try:
        # Copy on write: torch wants memory it may write to, and the file must never change.
        pixels = torch.from_numpy(np.load(path.with_suffix(".npy"), mmap_mode="c"))
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as columns:
            columns = dict(columns)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path.with_suffix('.npy')} cannot be read ({error}); delete {path} and read again") from None
    if pixels.shape != (facts["images"], 3, *size) or {len(column) for column in columns.values()} != {len(pixels)}:
        raise DataError(f"{path.with_suffix('.npy')} does not fit {path.name}; delete {path} and read again")
    sized = f"{facts['edition']} at {size[0]}x{size[1]}" + (" stretched" if crop == "stretch" else "")
    return Packed(recipe.name, sized, facts["digest"], pixels, columns, tuple(facts["notes"]))


def verify(recipe: Recipe) -> list[str]:
    """One line per file that is here, archives by their digest, packed ones by that of their pixels."""
    lines = []
    for path in files.present(recipe):
        archive = files.identify(recipe, path)
        lines.append(f"{path}: edition {archive.edition}, SHA-256 {archive.digest[:12]}…")
    for path, facts in _all_packed(recipe):
        pixels = np.load(path.with_suffix(".npy"), mmap_mode="r")
        if _digest_pixels(pixels) != facts["pixels"]:
            raise DataError(f"{path.with_suffix('.npy')} is changed; delete {path} and read again")
        lines.append(f"{path.with_suffix('.npy')}: {len(pixels)} images, edition {facts['edition']}, as packed")
        lines += [f"  {note}" for note in facts["notes"]]
    if not lines:
        raise files.missing(recipe)
    return lines


def _all_packed(recipe: Recipe) -> list[tuple[Path, dict]]:
    found = []
    for path in sorted((data_folder() / recipe.name / "packed").glob("*.json")):
        try:
            facts = json.loads(path.read_text())
        except (OSError, ValueError):
            raise DataError(f"{path} is not JSON; delete it and read again") from None
        if facts["version"] == [VERSION, recipe.version]:
            found.append((path, facts))
    return found


def _packed(recipe: Recipe, size: tuple[int, int], crop: str, edition: str) -> tuple[Path, dict] | None:
    """The packed file that fits; None where there is none. Files in the data folder decide among editions."""
    fitting = [
        (path, facts)
        for path, facts in _all_packed(recipe)
        if [facts["size"], facts["crop"], facts["subset"]] == [list(size), crop, recipe.subset]
        and edition in ("", facts["edition"])
    ]
    here = files.present(recipe)
    if not here or edition:
        if len(fitting) > 1:
            editions = ", ".join(sorted(facts["edition"] for _, facts in fitting))
            raise DataError(f"{recipe.name}: packed in several editions; name one with edition: {editions}")
        if fitting or not here:
            return fitting[0] if fitting else None
    # Hashing gigabytes at each reading would take longer than reading: same name, size and time is the same file.
    seen = [_stamp(path) for path in here]
    for path, facts in sorted(fitting, key=lambda one: one[1]["stamps"] != seen):
        if facts["stamps"] == seen:
            return path, facts
        if facts["archives"] == [files.identify(recipe, path).digest for path in here]:
            facts["stamps"] = seen
            files.write(path, lambda file, facts=facts: file.write(json.dumps(facts, indent=1).encode()))
            return path, facts
    return None


def digest_of(recipe: Recipe, edition: str, *, size: int | str | Sequence[int], crop: str = "center") -> str | None:
    """The digest that ``read`` gives of an edition whose files' SHA-256 are published, where no image is faulty.

    Nothing is read. None for another edition: its digest is known where its files are.
    """
    for names in recipe.sets:
        known = [{e: d for d, e in recipe.known.get(name, {}).items() if len(d) == 64} for name in names]
        if all(edition in of for of in known):
            return _digest(_key(recipe, parse_size(size), crop, [of[edition] for of in known]), ())
    return None


def _key(recipe: Recipe, size: tuple[int, int], crop: str, digests: Sequence[str]) -> list:
    return [recipe.name, VERSION, recipe.version, recipe.subset, *size, crop, *digests]


def _digest(key: list, faults: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps([key, sorted(faults)]).encode()).hexdigest()


def _stamp(path: Path) -> list:
    return [path.name, path.stat().st_size, path.stat().st_mtime_ns]


# ----------------------------------------------------------------------------------------------------------- packing
def _pack(recipe: Recipe, size: tuple[int, int], crop: str, faulty: str, wanted: str) -> tuple[Path, dict]:
    from filelock import FileLock

    found = files.find(recipe)
    editions = sorted({archive.edition for archive in found})
    if len(editions) > 1:
        raise DataError(f"{recipe.name}: files of different editions: {', '.join(editions)}")
    edition = editions[0] + (f"-{recipe.subset}" if recipe.subset else "")
    if wanted not in ("", edition):
        raise DataError(f"{recipe.name}: edition {wanted!r} is not here; here is {edition!r}")
    key = _key(recipe, size, crop, [file.digest for file in found])
    mark = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:8]
    folder = data_folder() / recipe.name / "packed"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # two runs that start together pack once
        path = folder / f"{edition}-{size[0]}x{size[1]}-{crop}-{mark}.json"
        if path.is_file():
            return path, json.loads(path.read_text())
        start = time.perf_counter()
        part = files._part(path.with_suffix(".npy"))
        try:
            names, contents, texts, faults = _decode_all(recipe, found, part, size, crop)
            listed, columns = recipe.labels(texts, names)
            rows, notes = _match(recipe, names, listed, faults)
            if faults and faulty == "refuse":
                raise DataError(_refusal(found[0].path, faults))
            if not len(rows):
                raise DataError(f"{found[0].path}: no image with a label; is it {recipe.name}?")
            kept = np.flatnonzero(rows >= 0)
            pixels = _keep(part, kept)
            columns = {name: values[rows[kept]] for name, values in columns.items()}
            columns |= {"name": np.array(names)[kept], "content": np.array(contents)[kept]}
            if faults:
                notes.append(f"{len(faults)} faulty images left out: {_some(faults)}")
            facts = {
                "edition": edition,
                "subset": recipe.subset,
                "archives": [archive.digest for archive in found],
                "size": size,
                "crop": crop,
                "version": [VERSION, recipe.version],
                "digest": _digest(key, faults),
                "images": len(kept),
                "files": hashlib.sha256("\n".join(columns["name"].tolist()).encode()).hexdigest(),
                "pixels": _digest_pixels(pixels),
                "notes": notes,
                "faulty": faults,
                "stamps": [_stamp(archive.path) for archive in found],
                "seconds": round(time.perf_counter() - start, 1),
            }
            del pixels
            files.write(path.with_suffix(".npz"), lambda file: np.savez(file, **columns))
            os.replace(part, path.with_suffix(".npy"))
            files.write(path, lambda file: file.write(json.dumps(facts, indent=1).encode()))  # last: it says "whole"
        except OSError as error:
            raise DataError(f"could not write {path.with_suffix('.npy')} ({error.strerror or error})") from error
        finally:
            part.unlink(missing_ok=True)
    return path, facts


def _decode_all(
    recipe: Recipe, found: Sequence[files.Archive], part: Path, size: tuple[int, int], crop: str
) -> tuple[list[str], list[int], dict[str, str | bytes], dict[str, str]]:
    """Appends each image to ``part``; gives their names and contents, the lists, and {image: why it is faulty}."""
    from PIL import Image
    from tqdm import tqdm

    names, contents, texts, faults = [], [], {}, {}
    seen = set()
    with open(part, "wb") as file, tqdm(desc=recipe.name, unit=" images", disable=None) as bar, _strict():
        _header(file, 0, size)
        for archive in found:
            for member, content in files.members(archive.path):
                member = PurePosixPath(member)
                if member.name in recipe.texts + recipe.optional:
                    text = content()
                    texts[member.name] = text if member.suffix == ".npz" else text.decode("utf-8", errors="replace")
                    continue
                name = recipe.image(member) if member.suffix.lower() in ENDINGS else None
                if name is None:
                    continue
                if name in seen:
                    raise DataError(f"{archive.path}: image {name!r} is there twice")
                seen.add(name)
                content = content()
                try:
                    pixels = decode(content, size, crop=crop, trim=recipe.trim)
                except (OSError, ValueError, SyntaxError, ZeroDivisionError, Image.DecompressionBombError) as error:
                    faults[name] = f"cannot be decoded ({' '.join(str(error).split())[:80]})"
                    continue
                except Image.DecompressionBombWarning:
                    faults[name] = "has too many pixels"
                    continue
                file.write(pixels.tobytes())
                names.append(name)
                contents.append(int.from_bytes(hashlib.sha256(content).digest()[:7]))
                bar.update()
        _header(file, len(names), size)
    if missing := [name for name in recipe.texts if name not in texts]:
        raise DataError(f"{found[0].path}: {', '.join(missing)} is not in it")
    return names, contents, texts, faults


@contextmanager
def _strict() -> Iterable[None]:
    """Pillow's alarm for a small file of enormous extent is an error here, its other warnings mean nothing."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _match(recipe: Recipe, names: list[str], listed: Sequence[str], faults: dict) -> tuple[np.ndarray, list[str]]:
    """The row of each image in the lists, -1 for none, and notes; faults are added to ``faults``."""
    place = {name: row for row, name in enumerate(listed)}
    notes = []
    unlabelled = [name for name in names if name not in place]
    if recipe.unlabelled and unlabelled:
        notes.append(f"{len(unlabelled)} of {len(names)} images left out: {recipe.unlabelled} ({_some(unlabelled)})")
    elif unlabelled:
        faults |= dict.fromkeys(unlabelled, "has no label")
    if recipe.all_listed:
        there = {*names, *faults}
        faults |= {name: "is listed and not there" for name in listed if name not in there}
    return np.array([place.get(name, -1) for name in names], dtype=np.int64), notes


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


def _refusal(path: Path, faults: Mapping[str, str]) -> str:
    first = [f"{name} {faults[name]}" for name in sorted(faults)[:3]]
    count = f"{len(faults)} faulty image{'s' if len(faults) > 1 else ''}"
    return f"{path}: {count}: {'; '.join(first)}{' …' if len(faults) > 3 else ''}; faulty='skip' leaves them out"


def _header(file: io.BufferedWriter, images: int, size: tuple[int, int]) -> None:
    """Writes (or writes over) the .npy header; NumPy leaves room in it for the first axis to grow."""
    file.seek(0)
    facts = {"descr": "|u1", "fortran_order": False, "shape": (images, 3, *size)}
    np.lib.format.write_array_header_1_0(file, facts)


def _keep(part: Path, kept: np.ndarray) -> np.ndarray:
    """Moves the images ``kept`` (ascending) to the front of ``part`` and cuts off the rest."""
    pixels = np.load(part, mmap_mode="r+")
    if len(kept) < len(pixels):
        for row, old in enumerate(kept):
            pixels[row] = pixels[old]
        pixels.flush()
        size, end = pixels.shape[2:], pixels.offset + len(kept) * pixels[0].nbytes
        del pixels
        with open(part, "r+b") as file:
            _header(file, len(kept), size)
            file.truncate(end)
    return np.load(part, mmap_mode="r")


def _digest_pixels(pixels: np.ndarray) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(pixels), 1024):
        digest.update(np.ascontiguousarray(pixels[start : start + 1024]))
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------- labels and splits
def rows(text: str, where: str, *columns: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Where each row of a CSV stands, for messages, and its values in ``columns``, "" where it is too short."""
    table = csv.DictReader(text.splitlines())
    if missing := set(columns) - set(table.fieldnames or ()):
        raise DataError(f"{where} has no column {', '.join(sorted(missing))}")
    for number, row in enumerate(table, 2):
        yield f"{where}, line {number}: ", {name: row[name] or "" for name in columns}


def random_split(names: np.ndarray, content: np.ndarray, *, shares: Sequence[float], seed: int = 0) -> Tensor:
    """``[N]`` int64, the number of the part that each image belongs to, drawn at random with ``shares`` (sum 1).

    Images of one content go to one part, so that none is trained on and tested on; the order of the archive plays no
    role, only the names do.
    """
    values, first, size = np.unique(content[np.argsort(names)], return_index=True, return_counts=True)
    order = np.argsort(first)[np.random.default_rng(seed).permutation(len(values))]
    middle = (np.cumsum(size[order]) - size[order] / 2) / len(names)
    part = np.empty(len(values), dtype=np.int64)
    part[order] = np.searchsorted(np.cumsum(shares)[:-1], middle, side="right")
    return torch.from_numpy(part[np.searchsorted(values, content)])
