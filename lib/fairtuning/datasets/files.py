"""Official files, fetched once and checked by SHA-256; a mirror can stand in for the network."""

import hashlib
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from fairtuning.datasets import DataError
from fairtuning.paths import data_folder


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path, expected: str) -> None:
    """Raises DataError, in one line, unless the file at ``path`` has the SHA-256 ``expected``."""
    if not path.is_file():
        raise DataError(f"{path} is not there")
    found = sha256(path)
    if found != expected:
        with open(path, "rb") as file:
            start = file.read(512).lstrip().lower()
        page = start.startswith((b"<!doctype html", b"<html"))
        what = "is an HTML page, not data (a log-in or error page?)" if page else "is truncated or changed"
        raise DataError(
            f"{path} {what}: {path.stat().st_size} bytes with SHA-256 {found[:12]}…, expected {expected[:12]}…; "
            "delete it and fetch again"
        )


def fetch(name: str, files: Mapping[str, str], *, address: str) -> list[Path]:
    """Brings ``files`` (name -> SHA-256) of data set ``name`` into the data folder and returns their paths.

    A file already there and right is kept. ``$FAIRTUNING_MIRROR``, a folder or a base address with the layout
    ``<data set>/<file>``, stands in for the official ``address``. A file arrives under another name and is renamed
    once its SHA-256 is right, so nothing half-written stays.
    """
    folder = data_folder() / name
    mirror = os.environ.get("FAIRTUNING_MIRROR", "")
    paths = []
    for file, expected in files.items():
        path = folder / file
        paths.append(path)
        if path.is_file() and sha256(path) == expected:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        if mirror and "://" not in mirror:
            _copy(Path(mirror) / name / file, path, expected)
        else:
            _download(f"{mirror.rstrip('/')}/{name}/{file}" if mirror else f"{address}/{file}", path, expected)
    return paths


def _copy(origin: Path, path: Path, expected: str) -> None:
    if not origin.is_file():
        raise DataError(f"{origin} is not there; FAIRTUNING_MIRROR must hold <data set>/<file>, or be unset")
    check(origin, expected)
    part = _part(path)
    try:
        shutil.copyfile(origin, part)
        os.replace(part, path)
    except OSError as error:
        raise DataError(f"could not copy {origin} to {path} ({error.strerror or error})") from error
    finally:
        part.unlink(missing_ok=True)


def _part(path: Path) -> Path:
    """What a file is called until it is whole: a name of this process's own, for two may fetch at once."""
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def _download(url: str, path: Path, expected: str) -> None:
    import pooch
    import requests

    part = _part(path)
    part.unlink(missing_ok=True)
    pooch.get_logger().setLevel(logging.ERROR)
    pup = pooch.create(
        path=path.parent, base_url="", urls={part.name: url}, registry={part.name: None}, retry_if_failed=2
    )
    answers: list[requests.Response] = []  # which pooch leaves open when it raises
    hooks = {"response": lambda answer, **_: answers.append(answer)}
    try:
        pup.fetch(part.name, downloader=pooch.HTTPDownloader(progressbar=True, timeout=20, hooks=hooks))
        check(part, expected)
        os.replace(part, path)
    except (requests.RequestException, OSError, ValueError) as error:
        raise DataError(
            f"could not fetch {url} ({type(error).__name__}); try again, or put the file into a folder "
            f"{path.parent.name}/ and name its parent in FAIRTUNING_MIRROR"
        ) from error
    except DataError as error:
        raise DataError(str(error).replace(str(part), url).replace("delete it and fetch again", "try again")) from None
    finally:
        for answer in answers:
            answer.close()
        part.unlink(missing_ok=True)
