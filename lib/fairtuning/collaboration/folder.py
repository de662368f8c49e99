"""An exchange by hand: messages and transcripts as files in a folder that both parties can reach.

Each party takes its turns where and when it likes, in two notebooks for example (the labs "developer" and "auditor").
The folder is no more trusted than a network: who reads a message from it checks it (``messages.decode``).
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

from fairtuning.collaboration import ExchangeError
from fairtuning.collaboration.messages import read_header
from fairtuning.collaboration.transcript import Transcript


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
    if not seconds and otherwise is not None and not path.exists():
        put(folder, otherwise())
    return _read(path, seconds)


def wait_for_transcript(
    folder: Path, party: str, *, seconds: float = 0.0, otherwise: Callable[[], Transcript] | None = None
) -> Path:
    """The same for the transcript of ``party``; where it lies."""
    path = _transcript(folder, party)
    if not seconds and otherwise is not None and not path.exists():
        put_transcript(folder, otherwise())
    _read(path, seconds)
    return path


def _message(folder: Path, sender: str, round: int) -> Path:
    return Path(folder) / f"{sender}-{round}.safetensors"


def _transcript(folder: Path, party: str) -> Path:
    return Path(folder) / f"{party}-transcript.jsonl"


def _write(path: Path, data: bytes) -> Path:
    if path.exists() and path.read_bytes() != data:
        raise ExchangeError(f"{path} is there with other content; take another folder for another exchange")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")  # on a shared disk the other party must never see half a file
    part.write_bytes(data)
    os.replace(part, path)
    return path


def _read(path: Path, seconds: float) -> bytes:
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() >= end:
            raise ExchangeError(f"{path} did not come within {seconds:g} seconds; is the other party at work there?")
        time.sleep(min(0.5, max(0.01, seconds)))
    return path.read_bytes()
