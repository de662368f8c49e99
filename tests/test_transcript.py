"""Transcripts: whatever is done to one shows, against the chain, a published head or the other party's."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairtuning import cli, paths
from fairtuning.collaboration.messages import Message, encode
from fairtuning.collaboration.transcript import START, Transcript, TranscriptError, compare, verify

MESSAGES = [
    encode(Message(*parties, round, {"qkv.lora_A.weight": torch.full((2, 3), float(round))}))
    for round in range(4)
    for parties in (("auditor", "developer"), ("developer", "auditor"))
]


def written(party, path=None, messages=MESSAGES):
    transcript = Transcript(path, party=party)
    for data in messages:
        transcript.append("sent" if f'"sender":"{party}"'.encode() in data else "received", data)
    return transcript


WRITTEN = written("auditor")


@pytest.fixture
def path(tmp_path):
    return written("auditor", tmp_path / "auditor.jsonl").path


def wrong(act, *words):
    with pytest.raises(TranscriptError) as error:
        act()
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


# ------------------------------------------------------------------------------------------------------------ writing
def test_lines(path):
    lines = verify(path)
    assert [line["number"] for line in lines] == list(range(1, 9))
    assert [line["direction"] for line in lines] == ["sent", "received"] * 4
    assert [line["round"] for line in lines] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(line["size"] == len(data) for line, data in zip(lines, MESSAGES, strict=True))
    assert len({line["message"] for line in lines}) == 8 and len({line["tensors"] for line in lines}) == 1
    assert lines[0]["previous"] == START and lines[-1]["hash"] == Transcript(path, party="auditor").head


def test_in_memory_as_in_a_file(path):
    memory = written("auditor")
    assert memory.lines == verify(path) and memory.head == verify(path)[-1]["hash"]
    assert Transcript(None, party="auditor").head == START


def test_continued_and_a_torn_line_dropped(tmp_path, path):
    whole = path.read_bytes()
    for cut in (1, 40, len(whole.splitlines()[-1])):
        path.write_bytes(whole[:-cut])
        assert len(verify(path)) == 7
        again = Transcript(path, party="auditor")
        again.append("received", MESSAGES[7])
        assert path.read_bytes() == whole
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b'{"number":1')
    assert Transcript(empty, party="auditor").head == START and empty.read_bytes() == b""


def test_a_message_again_adds_nothing_and_another_one_is_refused(path):
    before = path.read_bytes()
    transcript = Transcript(path, party="auditor")
    transcript.append("sent", MESSAGES[0])
    transcript.append("received", MESSAGES[7])
    assert path.read_bytes() == before
    other = encode(Message("auditor", "developer", 1, {"qkv.lora_A.weight": torch.zeros(2, 3)}))
    wrong(lambda: transcript.append("sent", other), "already sent another message in round 1")
    assert path.read_bytes() == before


def test_only_the_party_s_own_messages(path):
    transcript = Transcript(path, party="auditor")
    wrong(lambda: transcript.append("received", MESSAGES[0]), "auditor cannot have received")
    wrong(lambda: Transcript(path, party="developer"), "transcript of auditor, not of developer")
    with pytest.raises(ValueError, match="allowed: sent, received"):
        transcript.append("seen", MESSAGES[0])


# ------------------------------------------------------------------------------------------------- changed afterwards
def test_every_changed_byte_is_found(path):
    """The last byte, a line end, apart: without it the last line counts as torn, which a published head shows."""
    whole = path.read_bytes()
    head = verify(path)[-1]["hash"]
    starts = [n + 1 for n, byte in enumerate(whole) if byte == 10]
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        line = 1 + sum(start <= place for start in starts)
        wrong(lambda: verify(path, head=head))
        if place < len(whole) - 1 and whole[place] != 10:
            wrong(lambda line=line: verify(path), f"line {line} ", "changed")
    changed = bytearray(whole)
    changed[-1] = 13
    path.write_bytes(changed)
    assert len(verify(path)) == 7
    wrong(lambda: verify(path, head=head), "ends at line 7")


@given(st.data())
def test_lines_dropped_repeated_or_moved(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("chain") / "auditor.jsonl"
    lines = [json.dumps(line, sort_keys=True, separators=(",", ":")).encode() + b"\n" for line in WRITTEN.lines]
    order = data.draw(st.lists(st.integers(0, 7), max_size=10))
    path.write_bytes(b"".join(lines[number] for number in order))
    if order == list(range(len(order))):
        assert len(verify(path)) == len(order)
    else:
        first = next(place for place, number in enumerate(order) if number != place) + 1
        wrong(lambda: verify(path), f"line {first} ", "missing, or was moved")


def test_a_published_head(path):
    head = verify(path)[-1]["hash"]
    assert len(verify(path, head=head.upper())) == 8
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]))  # a chain alone can be cut
    assert len(verify(path)) == 5
    wrong(lambda: verify(path, head=head), "ends at line 5", "cut, continued or rewritten", head)
    path.unlink()
    written("auditor", path, MESSAGES[:4] + MESSAGES[6:])  # or written anew
    assert len(verify(path)) == 6
    wrong(lambda: verify(path, head=head), "ends at line 6")
    path.write_bytes(b"")
    assert verify(path) == [] and verify(path, head=START) == []
    wrong(lambda: verify(path, head=head), "ends at line 0")


def test_a_line_rehashed_breaks_the_next(path):
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    forged = written("auditor", None, MESSAGES[:2])
    forged.append("sent", encode(Message("auditor", "developer", 1, {"qkv.lora_A.weight": torch.zeros(2, 3)})))
    lines[2] = forged.lines[2]
    path.write_text("".join(json.dumps(line, sort_keys=True, separators=(",", ":")) + "\n" for line in lines))
    wrong(lambda: verify(path), "line 4 does not follow the line before it")


@pytest.mark.parametrize(
    "text", [b"\n", b"{}\n", b"[]\n", b"null\n", b"\xff\n", b"[" * 5000 + b"\n", b'{"number": 1}\n']
)
def test_no_transcript(path, text):
    path.write_bytes(text)
    wrong(lambda: verify(path), "line 1 is not a line of a transcript")
    path.unlink()
    wrong(lambda: verify(path), "cannot read")


# ------------------------------------------------------------------------------------------------------- two of them
def test_two_that_agree(path, tmp_path):
    theirs = written("developer", tmp_path / "developer.jsonl")
    assert compare(path, theirs.path) == compare(theirs, written("auditor")) == 8
    assert compare(Transcript(None, party="auditor"), Transcript(None, party="developer")) == 0


@pytest.mark.parametrize("place", range(len(MESSAGES)))
def test_the_first_difference_of_two(place):
    ours = written("auditor")
    without = written("developer", messages=MESSAGES[:place] + MESSAGES[place + 1 :])
    sent = place % 2 == 0  # by the auditor
    wrong(lambda: compare(ours, without), f"line {place + 1} of auditor's", f"round {place // 2}")
    wrong(lambda: compare(without, ours), f"line {place + 1} of auditor's")
    pair = ("auditor", "developer") if sent else ("developer", "auditor")
    other = encode(Message(*pair, place // 2, {"qkv.lora_A.weight": torch.zeros(2, 3) - 1}))
    changed = written("developer", messages=[*MESSAGES[:place], other, *MESSAGES[place + 1 :]])
    wrong(lambda: compare(ours, changed), f"line {place + 1} of", "differ in message")


def test_two_of_one_party_and_one_cut(path):
    wrong(lambda: compare(path, written("auditor")), "both of auditor")
    wrong(lambda: compare(path, Transcript(None, party="developer")), "line 1 of", "is not in developer's transcript")


def test_verifying_needs_no_torch(path):
    code = (
        "import sys; from pathlib import Path; from fairtuning.collaboration.transcript import verify; "
        f"assert len(verify(Path({str(path)!r}))) == 8; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(paths.ROOT / "lib")})


# ------------------------------------------------------------------------------------------------------- command line
def command(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fairtuning", "transcript", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    captured = capsys.readouterr()
    return left.value.code or 0, captured.out, captured.err


def test_commands(path, tmp_path, capsys, monkeypatch):
    theirs = written("developer", tmp_path / "developer.jsonl", MESSAGES[:7])
    head = verify(path)[-1]["hash"]
    size = sum(map(len, MESSAGES))
    for published in ((), ("--head", head)):
        status, out, err = command(capsys, monkeypatch, "verify", path, *published)
        assert (status, err) == (0, "") and f"8 messages, {size} bytes, the chain is whole\nhead {head}" in out
    status, out, err = command(capsys, monkeypatch, "verify", path, "--head", START)
    assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    status, out, err = command(capsys, monkeypatch, "compare", path, theirs.path)
    assert (status, out) == (2, "") and "line 8 of" in err and err.count("\n") == 1
    theirs.append("sent", MESSAGES[7])
    assert "8 messages crossed" in command(capsys, monkeypatch, "compare", path, theirs.path)[1]
    path.write_bytes(path.read_bytes().replace(b"received", b"recieved", 1))
    status, out, err = command(capsys, monkeypatch, "verify", path)
    assert (status, out) == (2, "") and "line 2 " in err and err.count("\n") == 1
    for called in ((), ("verify",), ("compare",)):
        assert "Usage: fairtuning transcript" in command(capsys, monkeypatch, *called, "--help")[1]
