"""What crossed, as each party wrote it down: a hash-chained list of messages, and how two such lists are compared.

A line holds the SHA-256 of a message and of the line before. So a transcript whose last hash (its *head*) is known
cannot be changed, cut or extended unseen. A chain alone proves less: whoever holds it can cut or rewrite all of it.
That is why there are two, kept by parties who need not trust each other, and why heads should be published.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from fairtuning import FairtuningError
from fairtuning.runs import canonical

Line = dict[str, Any]
START = "0" * 64  # what stands for the hash of the line before the first
FIELDS = {
    "number": int,
    "direction": str,
    "sender": str,
    "receiver": str,
    "round": int,
    "message": str,
    "size": int,
    "tensors": str,
    "previous": str,
    "hash": str,
}


class TranscriptError(FairtuningError):
    """A transcript that is not whole, or two that do not agree."""


class Transcript:
    """The messages of one exchange as ``party`` sent and received them; in memory where ``path`` is None.

    An existing file is verified and continued; a torn last line (power lost while writing) is dropped.
    """

    def __init__(self, path: Path | None, *, party: str):
        self.path = Path(path) if path is not None else None
        self.party = party
        self.lines: list[Line] = []
        if self.path is not None and self.path.is_file():
            self.lines = verify(self.path)
            if self.lines and _party(self.lines[0]) != party:
                raise TranscriptError(f"{self.path} is the transcript of {_party(self.lines[0])}, not of {party}")
            whole = self.path.read_bytes().rfind(b"\n") + 1
            os.truncate(self.path, whole)

    @property
    def head(self) -> str:
        """The hash of the last line, which stands for the whole transcript; 64 zeros where there is none."""
        return self.lines[-1]["hash"] if self.lines else START

    def append(self, direction: str, data: bytes) -> None:
        """One line for the message ``data``, "sent" or "received", then fsync.

        The same message again, as after a resumed turn, adds nothing. Another one of the same round raises
        TranscriptError: a party says one thing once.
        """
        from fairtuning.collaboration.messages import read_header  # torch: verifying a transcript needs none

        if direction not in ("sent", "received"):
            raise ValueError(f"direction is {direction!r}; allowed: sent, received")
        sender, receiver, round, shapes = read_header(data)
        line: Line = {
            "number": len(self.lines) + 1,
            "direction": direction,
            "sender": sender,
            "receiver": receiver,
            "round": round,
            "message": hashlib.sha256(data).hexdigest(),
            "size": len(data),
            "tensors": hashlib.sha256(canonical(shapes).encode()).hexdigest(),
            "previous": self.head,
        }
        if _party(line) != self.party:
            raise TranscriptError(f"{self.party} cannot have {direction} a message from {sender} to {receiver}")
        for earlier in self.lines:
            if _place(earlier) == _place(line):
                if earlier["message"] == line["message"]:
                    return
                raise TranscriptError(
                    f"{self.party} has already {direction} another message in round {round} "
                    f"({earlier['message'][:12]}…, now {line['message'][:12]}…)"
                )
        line["hash"] = _hash(line)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(canonical(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        self.lines.append(line)


def verify(path: Path, *, head: str | None = None) -> list[Line]:
    """The lines of the transcript at ``path``, each checked against the one before.

    Raises TranscriptError naming the first line that was changed, dropped, repeated or moved. Lines cut from the end,
    and a transcript written anew, show only against a published ``head``.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise TranscriptError(f"cannot read {path} ({error.strerror or error}); it must be a transcript") from None
    lines: list[Line] = []
    places = set()
    for number, raw in enumerate(text.split(b"\n")[:-1], 1):
        where = f"{path}, line {number}"
        line = _read(raw, where)
        if line["hash"] != _hash(line):
            raise TranscriptError(f"{where} was changed: its hash is not that of its content")
        if line["number"] != number:
            raise TranscriptError(f"{where} says that it is line {line['number']}: a line is missing, or was moved")
        if line["previous"] != (lines[-1]["hash"] if lines else START):
            raise TranscriptError(f"{where} does not follow the line before it")
        if lines and _party(line) != _party(lines[0]):
            raise TranscriptError(f"{where} is of {_party(line)}, the lines before it of {_party(lines[0])}")
        if _place(line) in places:
            raise TranscriptError(f"{where} is a second message {line['direction']} in round {line['round']}")
        lines.append(line)
        places.add(_place(line))
    found = lines[-1]["hash"] if lines else START
    if head is not None and found != head.strip().lower():
        raise TranscriptError(
            f"{path} ends at line {len(lines)} with head {found}, published is {head}: it was cut, continued or "
            "rewritten"
        )
    return lines


def compare(ours: Path | Transcript, theirs: Path | Transcript) -> int:
    """How many messages crossed, when each that one party sent the other received: in order, the same bytes.

    Raises TranscriptError naming the first message on which the two transcripts differ.
    """
    names = [_name(one) for one in (ours, theirs)]
    both = [one.lines if isinstance(one, Transcript) else verify(one) for one in (ours, theirs)]
    parties = [_party(lines[0]) if lines else None for lines in both]
    if parties[0] is not None and parties[0] == parties[1]:
        raise TranscriptError(f"{names[0]} and {names[1]} are both of {parties[0]}; give one of each party")
    crossed = 0
    for one, other in ((0, 1), (1, 0)):
        sent = [line for line in both[one] if line["direction"] == "sent"]
        received = [line for line in both[other] if line["direction"] == "received"]
        for place in range(max(len(sent), len(received))):
            if place >= len(received):
                raise TranscriptError(f"{_said(names[one], sent[place])} is not in {names[other]}")
            if place >= len(sent):
                raise TranscriptError(f"{_said(names[other], received[place])} is not in {names[one]}")
            different = [f for f in ("sender", "receiver", "round", "message") if sent[place][f] != received[place][f]]
            if different:
                raise TranscriptError(
                    f"{_said(names[one], sent[place])} and {_said(names[other], received[place])} differ in "
                    f"{different[0]}: {sent[place][different[0]]}, {received[place][different[0]]}"
                )
            crossed += 1
    return crossed


def _read(raw: bytes, where: str) -> Line:
    try:
        line = json.loads(raw)
        right = line.keys() == FIELDS.keys() and all(type(line[name]) is kind for name, kind in FIELDS.items())
        right = right and line["direction"] in ("sent", "received") and canonical(line).encode() == raw
    except (ValueError, AttributeError, RecursionError):
        right = False
    if not right:
        raise TranscriptError(f"{where} is not a line of a transcript: it was changed")
    return line


def _hash(line: Line) -> str:
    content = {name: value for name, value in line.items() if name != "hash"}
    return hashlib.sha256(canonical(content).encode()).hexdigest()


def _party(line: Line) -> str:
    """Whose line it is."""
    return line["sender"] if line["direction"] == "sent" else line["receiver"]


def _place(line: Line) -> tuple[Any, ...]:
    """What can be said but once."""
    return line["direction"], line["sender"], line["receiver"], line["round"]


def _name(transcript: Path | Transcript) -> str:
    if isinstance(transcript, Transcript):
        return str(transcript.path) if transcript.path else f"{transcript.party}'s transcript"
    return str(transcript)


def _said(name: str, line: Line) -> str:
    return f"line {line['number']} of {name} ({line['direction']}, round {line['round']})"
