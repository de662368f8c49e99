"""Archives of images: found or fetched, known by their digest, and read once from front to back, never extracted.

A data set comes in *editions*: the official archive, or one somebody resized. Which edition a file is, its digest says:
by the table in the data set's module, or by a ``MANIFEST.json``, a list of ``{"file", "sha256", "edition"}``, beside
the data sets' folders in the data folder or in the mirror. A file that neither knows is refused until it is accepted.
"""

import gzip
import hashlib
import json
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from fairtuning.datasets import DataError, files
from fairtuning.paths import data_folder

MANIFEST = "MANIFEST.json"
#: No picture or list of these data sets is near this size; an archive whose member is larger is not one of them.
LARGEST_MEMBER = 256 * 2**20
MOST_MEMBERS = 2_000_000


@dataclass(frozen=True)
class Origin:
    """The files of a data set and how they are had.

    ``sets``: alternative sets of files, best first, each complete by itself. ``known``: file -> {digest: edition}, the
    digest a SHA-256, or an MD5 where only that is published. ``address``: file -> official address; a file without one
    must be put in place by hand, as ``manual`` says.
    """

    name: str
    sets: tuple[tuple[str, ...], ...]
    known: Mapping[str, Mapping[str, str]]
    manual: str
    address: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Archive:
    """A file that is here, with its SHA-256 and edition."""

    path: Path
    digest: str
    edition: str


def present(origin: Origin) -> list[Path]:
    """The first complete set of files in the data folder, [] where there is none; nothing is read."""
    folder = data_folder() / origin.name
    for names in origin.sets:
        if all((folder / name).is_file() for name in names):
            return [folder / name for name in names]
    return []


def find(origin: Origin) -> list[Archive]:
    """The files of ``origin`` in the data folder, checked: already there, else from the mirror, else fetched.

    DataError, in one line, for what is missing, unknown, an HTML page, or cannot be had without a person's consent.
    """
    if here := present(origin):
        return [identify(origin, path) for path in here]
    folder = data_folder() / origin.name
    mirror = os.environ.get("FAIRTUNING_MIRROR", "")
    if mirror and "://" not in mirror:
        for names in origin.sets:
            paths = [Path(mirror) / origin.name / name for name in names]
            if all(path.is_file() for path in paths):
                found = [identify(origin, path) for path in paths]
                folder.mkdir(parents=True, exist_ok=True)
                for archive in found:
                    files._copy(archive.path, folder / archive.path.name, archive.digest)
                    _remember(origin, archive.path.name, archive.digest, archive.edition)
                return [Archive(folder / archive.path.name, archive.digest, archive.edition) for archive in found]
    problems = []
    for names in origin.sets:
        urls = [_url(origin, name, mirror) for name in names]
        if all(urls):
            try:
                return [_fetch(origin, name, url) for name, url in zip(names, urls, strict=True)]
            except DataError as error:
                problems.append(str(error))
    if problems:
        raise DataError("; ".join(problems))
    raise missing(origin)


def missing(origin: Origin) -> DataError:
    """What is not here, and what to do about it."""
    wanted = " or ".join(" + ".join(names) for names in origin.sets)
    mirror = os.environ.get("FAIRTUNING_MIRROR", "")
    where = f"{data_folder() / origin.name}" + (f" nor in {Path(mirror) / origin.name}" if mirror else "")
    return DataError(f"{origin.name}: {wanted} is not in {where}; {origin.manual}")


def _url(origin: Origin, name: str, mirror: str) -> str | None:
    if mirror:
        return f"{mirror.rstrip('/')}/{origin.name}/{name}" if "://" in mirror else None
    return origin.address.get(name)


def _is_page(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(512).lstrip().lower().startswith((b"<!doctype html", b"<html"))


def identify(origin: Origin, path: Path, *, name: str | None = None) -> Archive:
    """Which edition of the file ``name`` (default: its own name) lies at ``path``; DataError where nobody knows it."""
    name = name or path.name
    if _is_page(path):
        raise DataError(
            f"{path} is an HTML page, not data (Google Drive's quota page, a log-in or an error page?); delete it; "
            f"{origin.manual}"
        )
    digest = files.sha256(path)
    known = origin.known.get(name, {})
    edition = known.get(digest) or _manifest().get((f"{origin.name}/{name}", digest))
    if edition is None and any(len(key) == 32 for key in known):
        with open(path, "rb") as file:
            edition = known.get(hashlib.file_digest(file, "md5").hexdigest())
    if edition is None:
        editions = ", ".join(sorted(set(known.values()))) or "none has a published digest"
        raise DataError(
            f"{path} is truncated, changed or of no known edition ({editions}): {path.stat().st_size} bytes with "
            f"SHA-256 {digest[:12]}…; delete it and fetch again, or, if it is what you want, name its edition with "
            f"python data_scripts/{origin.name}.py --accept EDITION"
        )
    return Archive(path, digest, edition)


def accept(origin: Origin, edition: str) -> list[Archive]:
    """Takes the files now in the data folder for ``edition``: writes their digests into its MANIFEST.json."""
    if not (here := present(origin)):
        raise missing(origin)
    if not edition.replace("-", "").replace(".", "").isalnum():
        raise DataError(f"edition is {edition!r}; allowed: letters, digits, '-' and '.'")
    for path in here:
        try:
            identify(origin, path)
        except DataError as error:
            if "HTML page" in str(error):
                raise
            _remember(origin, path.name, files.sha256(path), edition)
    return find(origin)


def _manifest() -> dict[tuple[str, str], str]:
    """(file, SHA-256) -> edition, from the manifests of the data folder and of a mirror folder."""
    places = [data_folder()]
    mirror = os.environ.get("FAIRTUNING_MIRROR", "")
    if mirror and "://" not in mirror:
        places.append(Path(mirror))
    entries = {}
    for path in (place / MANIFEST for place in places):
        if not path.is_file():
            continue
        try:
            entries |= {
                (entry["file"], entry["sha256"]): str(entry["edition"]) for entry in json.loads(path.read_text())
            }
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f'{path} is not a list of {{"file", "sha256", "edition"}}: {error!r}') from None
    return entries


def _remember(origin: Origin, name: str, digest: str, edition: str) -> None:
    if edition in origin.known.get(name, {}).values():
        return
    path = data_folder() / MANIFEST
    entries = json.loads(path.read_text()) if path.is_file() else []
    entry = {"file": f"{origin.name}/{name}", "sha256": digest, "edition": edition}
    if entry not in entries:
        part = files._part(path)
        part.write_text(json.dumps([*entries, entry], indent=1) + "\n")
        os.replace(part, path)


def _fetch(origin: Origin, name: str, url: str) -> Archive:
    path = data_folder() / origin.name / name
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{name}.part")
    _download(url, part)
    try:
        # Where no digest is published, what came whole from the official address is the official edition.
        published = "official" in origin.known.get(name, {}).values()
        if url == origin.address.get(name) and not published and not _is_page(part):
            _remember(origin, name, files.sha256(part), "official")
        archive = identify(origin, part, name=name)
        os.replace(part, path)
    except DataError as error:
        raise DataError(str(error).replace(str(part), url)) from None
    finally:
        part.unlink(missing_ok=True)
    return Archive(path, archive.digest, archive.edition)


def _download(url: str, part: Path) -> None:
    """Fetches ``url`` into ``part``, going on where an earlier attempt broke off."""
    import requests
    from tqdm import tqdm

    start = part.stat().st_size if part.is_file() else 0
    advice = f"or put the file into a folder {part.parent.name}/ and name its parent in FAIRTUNING_MIRROR"
    try:
        headers = {"Range": f"bytes={start}-"} if start else {}
        with requests.get(url, stream=True, timeout=20, headers=headers) as answer:
            if answer.status_code == 416:  # the rest of a file that has none: an attempt of another file's
                part.unlink()
                raise DataError(f"{url}: what an earlier attempt left does not fit; try again")
            answer.raise_for_status()
            if answer.status_code != 206:
                start = 0
            length = answer.headers.get("Content-Length")
            total = start + int(length) if length else None
            with (
                open(part, "ab" if start else "wb") as file,
                tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem, disable=None) as bar,
            ):
                for piece in answer.iter_content(2**16):
                    file.write(piece)
                    bar.update(len(piece))
    except (requests.RequestException, OSError) as error:
        got = part.stat().st_size if part.is_file() else 0
        state = f"after {got / 1e6:.1f} MB; run again to go on from there" if got else "try again"
        raise DataError(f"could not fetch {url} ({type(error).__name__}), {state}, {advice}") from error
    if total is not None and part.stat().st_size < total:
        raise DataError(f"{url} broke off after {part.stat().st_size} of {total} bytes; run again to go on from there")


# ----------------------------------------------------------------------------------------------------------- reading
def members(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """(name, function that gives its bytes) of each regular file in a tar or zip, in the archive's order; the function
    is good until the next member is asked for.

    ``path`` may be a text file that belongs to a data set: it is its own only member. Nothing is written to disk.
    Hidden files and macOS's resource folders are passed over. DataError names a member that points outside the
    archive, is too large, or breaks off.
    """
    if path.suffix == ".txt":
        yield path.name, path.read_bytes
        return

    def reading(read: Callable[[], bytes]) -> bytes:
        with _broken(path):
            return read()

    with _broken(path), zipfile.ZipFile(path) if zipfile.is_zipfile(path) else tarfile.open(path) as archive:
        entries = archive.infolist() if isinstance(archive, zipfile.ZipFile) else archive
        for count, entry in enumerate(entries):
            if isinstance(entry, zipfile.ZipInfo):
                if not entry.is_dir() and _allowed(path, entry.filename, entry.file_size, count):
                    yield entry.filename, lambda entry=entry: reading(lambda: archive.read(entry))
                continue
            tarfile.data_filter(entry, str(path.parent))
            if entry.isfile() and _allowed(path, entry.name, entry.size, count):
                yield entry.name, lambda entry=entry: reading(lambda: archive.extractfile(entry).read())
            archive.members = []  # a TarInfo for each of 200,000 images is better not kept
        if isinstance(archive, tarfile.TarFile):
            while archive.fileobj.read(2**20):  # to the end: only there is a gzip file's checksum compared
                pass


@contextmanager
def _broken(path: Path) -> Iterator[None]:
    try:
        yield
    except tarfile.FilterError as error:
        raise DataError(f"{path}: refused, {error}") from None
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        reason = " ".join(str(error).split())[:80]
        raise DataError(f"{path} cannot be read to its end ({reason}); delete it and fetch again") from None
    except (RuntimeError, NotImplementedError) as error:  # how zipfile names a password or an unknown compression
        raise DataError(f"{path} cannot be read: {error}") from None


def _allowed(path: Path, name: str, size: int, count: int) -> bool:
    parts = PurePosixPath(name.replace("\\", "/")).parts or (".",)
    if ".." in parts or name.startswith(("/", "\\")) or ":" in parts[0]:
        raise DataError(f"{path}: refused, member {name!r} points outside the archive")
    if size > LARGEST_MEMBER or count > MOST_MEMBERS:
        raise DataError(
            f"{path}: refused, member {name!r} ({size} bytes, number {count}); allowed: {LARGEST_MEMBER} bytes each, "
            f"{MOST_MEMBERS} members"
        )
    return not parts[-1].startswith(".") and "__MACOSX" not in parts
