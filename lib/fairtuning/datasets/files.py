"""Official files: found or fetched once, known by their digest; archives are read from front to back, never extracted.

A data set comes in *editions*: the official archive, or one somebody resized. Which edition a file is, its digest says:
by the table in the data set's module, or by a ``MANIFEST.json``, a list of ``{"file", "sha256", "edition"}``, beside
the data sets' folders in the data folder or in the mirror. A file that neither knows is refused until it is accepted.

``$FAIRTUNING_MIRROR``, a folder or a base address with the layout ``<data set>/<file>``, stands in for the official
addresses.
"""

import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from fairtuning.datasets import DataError
from fairtuning.paths import data_folder

MANIFEST = "MANIFEST.json"
#: No picture or list of these data sets is near this size; an archive whose member is larger is not one of them.
LARGEST_MEMBER = 256 * 2**20
MOST_MEMBERS = 2_000_000


@dataclass(frozen=True, kw_only=True)
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


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_page(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(512).lstrip().lower().startswith((b"<!doctype html", b"<html"))


def check(path: Path, expected: str) -> None:
    """Raises DataError, in one line, unless the file at ``path`` has the SHA-256 ``expected``."""
    if not path.is_file():
        raise DataError(f"{path} is not there")
    if (found := sha256(path)) != expected:
        page = "is an HTML page, not data (a log-in or error page?)"
        raise DataError(
            f"{path} {page if _is_page(path) else 'is truncated or changed'}: {path.stat().st_size} bytes with SHA-256 "
            f"{found[:12]}…, expected {expected[:12]}…; delete it and fetch again"
        )


# ---------------------------------------------------------------------------------------------------------- fetching
def fetch(path: Path, right: Callable[[Path], object], *, address: str | None) -> None:
    """Brings ``path``, ``<data folder>/<data set>/<file>``, from the mirror, else from its official ``address``.

    It arrives under another name and gets its own once ``right`` of it raises no DataError, so nothing half-written
    stays. What a download that broke off has brought waits as ``<file>.part``: the next one goes on from there.
    """
    from filelock import FileLock

    place = _place(path, address)
    if isinstance(place, Path):
        if not place.is_file():
            raise DataError(f"{place} is not there; FAIRTUNING_MIRROR must hold <data set>/<file>, or be unset")
        right(place)
        part = _part(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(place, part)
            os.replace(part, path)
        except OSError as error:
            raise DataError(f"could not copy {place} to {path} ({error.strerror or error})") from error
        finally:
            part.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with FileLock(path.parent / ".lock"):
        with suppress(DataError, FileNotFoundError):
            return right(path)  # brought by another process meanwhile
        _download(place, part)
        try:
            right(part)
            os.replace(part, path)
        except DataError as error:
            text = str(error).replace(str(part), place).replace("delete it and fetch again", "try again")
            raise DataError(text) from None
        finally:
            part.unlink(missing_ok=True)


def _place(path: Path, address: str | None) -> Path | str | None:
    mirror = os.environ.get("FAIRTUNING_MIRROR", "")
    if "://" in mirror:
        return f"{mirror.rstrip('/')}/{path.parent.name}/{path.name}"
    return Path(mirror) / path.parent.name / path.name if mirror else address


def _part(path: Path) -> Path:
    """What a file is called until it is whole: a name of this process's own, for two may write at once."""
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def _download(url: str, part: Path) -> None:
    """Fetches ``url`` into ``part`` in at most three attempts, each going on where the one before broke off."""
    import requests

    for pause in (1, 2, None):
        try:
            return _attempt(url, part)
        except OSError as error:
            if pause and isinstance(error, requests.RequestException):
                time.sleep(pause)
                continue
            got = part.stat().st_size if part.is_file() else 0
            if not got:
                part.unlink(missing_ok=True)
            state = f"after {got / 1e6:.1f} MB; run again to go on from there" if got else "try again"
            raise DataError(
                f"could not fetch {url} ({type(error).__name__}), {state}, or put the file into a folder "
                f"{part.parent.name}/ and name its parent in FAIRTUNING_MIRROR"
            ) from error


def _attempt(url: str, part: Path) -> None:
    from pooch import HTTPDownloader

    with ExitStack() as answers, open(part, "ab") as file:

        def begin(answer, **_):
            answers.enter_context(answer)  # pooch leaves it open when it raises
            if answer.status_code in (200, 416):  # the whole file; or no rest of it, for what is here is another's
                file.truncate(0)

        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={file.tell()}-"} if file.tell() else {})
        options = {"chunk_size": 2**16, "timeout": 20, "headers": headers, "hooks": {"response": begin}}
        HTTPDownloader(progressbar=sys.stderr.isatty(), **options)(url, file, None)


# ---------------------------------------------------------------------------------------------------------- editions
def present(origin: Origin) -> list[Path]:
    """The first complete set of files in the data folder, [] where there is none; nothing is read."""
    folder = data_folder() / origin.name
    sets = ([folder / name for name in names] for names in origin.sets)
    return next((paths for paths in sets if all(path.is_file() for path in paths)), [])


def find(origin: Origin) -> list[Archive]:
    """The files of ``origin`` in the data folder, checked: already there, else from the mirror, else fetched.

    DataError, in one line, for what is missing, unknown, an HTML page, or cannot be had without a person's consent.
    """
    problems = []
    for names in origin.sets if not present(origin) else ():
        paths = [data_folder() / origin.name / name for name in names]
        places = [_place(path, origin.address.get(path.name)) for path in paths]
        if not all(place.is_file() if isinstance(place, Path) else place for place in places):
            continue
        try:
            for path in paths:
                right = partial(_recognise, origin, path.name)
                fetch(path, right, address=origin.address.get(path.name))
            break
        except DataError as error:
            if isinstance(places[0], Path):
                raise
            problems.append(str(error))
    if here := present(origin):
        return [identify(origin, path) for path in here]
    raise DataError("; ".join(problems)) if problems else missing(origin)


def missing(origin: Origin) -> DataError:
    """What is not here, and what to do about it."""
    wanted = " or ".join(" + ".join(names) for names in origin.sets)
    mirror = os.environ.get("FAIRTUNING_MIRROR", "")
    where = f"{data_folder() / origin.name}" + (f" nor in {Path(mirror) / origin.name}" if mirror else "")
    return DataError(f"{origin.name}: {wanted} is not in {where}; {origin.manual}")


def identify(origin: Origin, path: Path, *, name: str | None = None) -> Archive:
    """Which edition of the file ``name`` (default: its own name) lies at ``path``; DataError where nobody knows it."""
    name = name or path.name
    if _is_page(path):
        raise DataError(
            f"{path} is an HTML page, not data (Google Drive's quota page, a log-in or an error page?); delete it; "
            f"{origin.manual}"
        )
    digest = sha256(path)
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
        except DataError:
            if _is_page(path):
                raise
            _remember(origin, path.name, sha256(path), edition)
    return find(origin)


def _recognise(origin: Origin, name: str, path: Path) -> None:
    """``identify`` for a file that arrives; the manifest of the data folder remembers what it is."""
    published = "official" in origin.known.get(name, {}).values()
    if not published and not os.environ.get("FAIRTUNING_MIRROR") and not _is_page(path):
        _remember(origin, name, sha256(path), "official")  # from the official address, and whole
    found = identify(origin, path, name=name)
    _remember(origin, name, found.digest, found.edition)


def _manifest() -> dict[tuple[str, str], str]:
    """(file, SHA-256) -> edition, from the manifests of the data folder and of a mirror folder."""
    mirror = os.environ.get("FAIRTUNING_MIRROR", "")
    places = [data_folder(), *([Path(mirror)] if mirror and "://" not in mirror else [])]
    entries = {}
    for path in (place / MANIFEST for place in places):
        if not path.is_file():
            continue
        try:
            entries |= {(one["file"], one["sha256"]): str(one["edition"]) for one in json.loads(path.read_text())}
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
        write(path, lambda file: file.write((json.dumps([*entries, entry], indent=1) + "\n").encode()))


def write(path: Path, content: Callable[[io.BufferedWriter], object]) -> None:
    """Gives ``path`` what ``content`` writes, whole or not at all."""
    part = _part(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            content(file)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


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
