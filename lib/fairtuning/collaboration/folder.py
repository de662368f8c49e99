"""An exchange by hand: messages and transcripts as files in a folder that both parties can reach.

Each party takes its turns where and when it likes, in two notebooks for example (the labs "developer" and "auditor").
The folder is no more trusted than a network: who reads a message from it checks it (``messages.decode``), and whatever
else somebody put there, a link or a pipe, is neither followed nor waited on.
"""

import os
import secrets
import stat
import time
from collections.abc import Callable
from pathlib import Path

from fairtuning.collaboration import ExchangeError
from fairtuning.collaboration.messages import read_header
from fairtuning.collaboration.transcript import Transcript

LARGEST = 1 << 30  # bytes of a file; a rank of 64 in every linear layer of ViT-Large takes a fifth, in float64


def put(folder: Path, data: bytes) -> Path:
    """Writes the message ``data`` where its receiver looks for it; whole, or not at all.

    Raises ExchangeError where another message of this sender and round is there: a party says one thing once.
    """
    sender, _, round, _ = read_header(data)
    return _write(_message(folder, sender, round), data)


def put_transcript(folder: Path, transcript: Transcript) -> Path:
    """Writes a copy of ``transcript``, which has a file, for the other party to compare with its own."""
    return _write(_transcript(folder, transcript.party), Path(transcript.path).read_bytes())


def wait_for(
    folder: Path, sender: str, round: int, *, seconds: float = 0.0, otherwise: Callable[[], bytes] | None = None
) -> bytes:
    """The message of ``sender`` and ``round``, for which it waits so many seconds.

    ``otherwise`` makes it where nobody else will: it is called where ``seconds`` is 0 and the file is not there. Raises
    ExchangeError where nothing came.
    """
    path = _message(folder, sender, round)
    if not seconds and otherwise is not None and not os.path.lexists(path):
        put(folder, otherwise())
    return _read(path, seconds)


def wait_for_transcript(
    folder: Path, party: str, *, seconds: float = 0.0, otherwise: Callable[[], Transcript] | None = None
) -> Path:
    """The same for the transcript of ``party``; where it lies."""
    path = _transcript(folder, party)
    if not seconds and otherwise is not None and not os.path.lexists(path):
        put_transcript(folder, otherwise())
    _read(path, seconds)
    return path


def _message(folder: Path, sender: str, round: int) -> Path:
    return Path(folder) / f"{sender}-{round}.safetensors"


def _transcript(folder: Path, party: str) -> Path:
    return Path(folder) / f"{party}-transcript.jsonl"


def _write(path: Path, data: bytes) -> Path:
    """Written under a name that nobody can foresee, then linked to ``path``: no reader ever sees half a file, and what
    is there already stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _flag("NOFOLLOW") | _flag("BINARY"), 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _publish(part, path)
    except FileExistsError:
        if _content(path) != data:
            what = "is there with other content; take another folder for another exchange"
            raise ExchangeError(f"{path} {what}") from None
    finally:
        part.unlink(missing_ok=True)
    return path


def _publish(part: Path, path: Path) -> None:
    """Gives ``part`` the name ``path`` too. Of several at once exactly one can; FileExistsError for the others."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:
        # A file system without hard links (a memory stick, some network disks). A rename keeps the file whole, which
        # a reader needs, but replaces what another process put there between these two lines.
        if os.path.lexists(path):
            raise FileExistsError from None
        os.rename(part, path)


def _read(path: Path, seconds: float) -> bytes:
    end = time.monotonic() + seconds
    while not os.path.lexists(path):
        if time.monotonic() >= end:
            raise ExchangeError(f"{path} did not come within {seconds:g} seconds; is the other party at work there?")
        time.sleep(min(0.5, max(0.01, seconds)))
    return _content(path)


def _content(path: Path) -> bytes:
    """What a regular file holds. Nothing else is read: a link may lead anywhere, a pipe or a device may never end."""
    allowed = f"allowed: a regular file of {LARGEST} bytes or fewer; remove it, and let its sender write it again"
    try:
        descriptor = os.open(path, os.O_RDONLY | _flag("NOFOLLOW") | _flag("NONBLOCK") | _flag("BINARY"))
    except OSError as error:
        what = "a link" if path.is_symlink() else f"not readable ({error.strerror or error})"
        raise ExchangeError(f"{path} is {what}; {allowed}") from None
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise ExchangeError(f"{path} is a folder, a pipe or a device; {allowed}")
        if facts.st_size > LARGEST:
            raise ExchangeError(f"{path} has {facts.st_size} bytes; {allowed}")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(facts.st_size)
    finally:
        os.close(descriptor)


def _flag(name: str) -> int:
    """A flag of ``os.open``; Windows has no links to follow nor pipes to wait on, other systems no text mode."""
    return getattr(os, f"O_{name}", 0)
