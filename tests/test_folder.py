"""Messages and transcripts as files in a folder: whole, one per round, waited for, or made by a stand-in; and what
somebody who can write there may plant."""

import errno
import os
import stat
import threading

import pytest
import torch

from fairtuning.collaboration import ExchangeError
from fairtuning.collaboration import folder as transport
from fairtuning.collaboration.folder import put, put_transcript, wait_for, wait_for_transcript
from fairtuning.collaboration.messages import Message, Refused, encode
from fairtuning.collaboration.transcript import Transcript, compare

NAME = "blocks.0.attn.qkv.lora_A.weight"


def message(value=0.0, sender="auditor", round=0):
    receiver = {"auditor": "developer", "developer": "auditor"}[sender]
    return encode(Message(sender, receiver, round, {NAME: torch.full((2, 3), value)}))


def test_a_message_arrives_as_it_was_sent_and_only_one_of_a_round(tmp_path):
    path = put(tmp_path / "new", message())
    assert put(tmp_path / "new", message()) == path  # the same again is no other message
    assert wait_for(tmp_path / "new", "auditor", 0) == message()
    with pytest.raises(ExchangeError, match="other content; take another folder"):
        put(tmp_path / "new", message(1.0))
    put(tmp_path / "new", message(1.0, round=1))
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["auditor-0.safetensors", "auditor-1.safetensors"]
    with pytest.raises(Refused):
        put(tmp_path, b"no message")


def test_who_waits_gets_what_comes_later(tmp_path):
    later = threading.Timer(0.1, put, (tmp_path, message()))
    later.start()
    assert wait_for(tmp_path, "auditor", 0, seconds=30) == message()
    later.join()


def test_a_stand_in_is_asked_only_by_who_does_not_wait(tmp_path):
    asked = []

    def stand_in():
        asked.append(True)
        return message()

    with pytest.raises(ExchangeError, match="did not come within 0.01 seconds"):
        wait_for(tmp_path, "auditor", 0, seconds=0.01, otherwise=stand_in)
    with pytest.raises(ExchangeError, match="did not come within 0 seconds"):
        wait_for(tmp_path, "auditor", 0)
    assert not asked
    assert wait_for(tmp_path, "auditor", 0, otherwise=stand_in) == message()
    assert wait_for(tmp_path, "auditor", 0, otherwise=stand_in) == message()  # it is there now
    assert len(asked) == 1


def test_transcripts_are_handed_over_and_compared(tmp_path):
    own = Transcript(tmp_path / "developer/transcript.jsonl", party="developer")
    other = Transcript(tmp_path / "auditor/transcript.jsonl", party="auditor")
    other.append("sent", message())
    own.append("received", message())
    with pytest.raises(ExchangeError, match="auditor-transcript.jsonl did not come"):
        wait_for_transcript(tmp_path / "shared", "auditor", seconds=0.01, otherwise=lambda: other)
    path = wait_for_transcript(tmp_path / "shared", "auditor", otherwise=lambda: other)
    assert compare(own, path) == 1
    other.append("sent", message(round=1))
    with pytest.raises(ExchangeError, match="other content"):
        put_transcript(tmp_path / "shared", other)


# ---------------------------------------------------------------------------------------- what somebody else put there
def soon(call):
    """What ``call`` returns or raises, within ten seconds: a regression must not hang the tests."""
    found = []

    def run():
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    assert found, "it hangs"
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def victim(tmp_path):
    """A file of the writing party, outside the folder."""
    (tmp_path / "own").mkdir()
    path = tmp_path / "own" / "thesis.txt"
    path.write_text("years of work")
    yield path
    assert path.read_text() == "years of work" and names(path.parent) == ["thesis.txt"]


def test_a_link_or_a_pipe_under_a_passing_name_is_not_written_to(tmp_path, victim):
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "auditor-0.safetensors.part").symlink_to(victim)
    os.mkfifo(folder / "developer-0.safetensors.part")
    for sender in ("auditor", "developer"):
        soon(lambda sender=sender: put(folder, message(sender=sender)))
        assert wait_for(folder, sender, 0) == message(sender=sender)
    planted = ["auditor-0.safetensors.part", "developer-0.safetensors.part"]
    assert names(folder) == sorted(["auditor-0.safetensors", "developer-0.safetensors", *planted])


def test_even_a_foreseen_passing_name_is_not_followed(tmp_path, victim, monkeypatch):
    monkeypatch.setattr(transport.secrets, "token_hex", lambda n: "0" * n)
    (tmp_path / ".auditor-0.safetensors.00000000.part").symlink_to(victim)
    with pytest.raises(FileExistsError):
        soon(lambda: put(tmp_path, message()))


@pytest.mark.parametrize("target", ["own/thesis.txt", "own/nothing-yet.txt", "own", "shared/auditor-0.safetensors"])
def test_a_link_in_the_place_of_a_message_is_neither_written_to_nor_read(tmp_path, victim, target):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "auditor-0.safetensors").symlink_to(tmp_path / target)
    for call in (
        lambda: put(tmp_path / "shared", message()),
        lambda: wait_for(tmp_path / "shared", "auditor", 0, seconds=1),
        lambda: wait_for(tmp_path / "shared", "auditor", 0, otherwise=message),
    ):
        with pytest.raises(ExchangeError, match=r"auditor-0.safetensors is a link; allowed: a regular file") as caught:
            soon(call)
        assert "\n" not in str(caught.value)
    assert names(tmp_path / "shared") == ["auditor-0.safetensors"]


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "auditor-0.safetensors")
    (tmp_path / "auditor-1.safetensors").mkdir()
    for round in (0, 1):
        with pytest.raises(ExchangeError, match="is a folder, a pipe or a device; allowed: a regular file"):
            soon(lambda round=round: wait_for(tmp_path, "auditor", round, seconds=1))
        with pytest.raises(ExchangeError, match="is a folder, a pipe or a device"):
            soon(lambda round=round: put(tmp_path, message(round=round)))
    os.mkfifo(tmp_path / "auditor-transcript.jsonl")
    with pytest.raises(ExchangeError, match="is a folder, a pipe or a device"):
        soon(lambda: wait_for_transcript(tmp_path, "auditor", seconds=1))


def test_a_file_without_end_is_not_read(tmp_path):
    with open(tmp_path / "auditor-0.safetensors", "wb") as file:
        file.truncate(200 << 30)  # which takes no room on the disk
    with pytest.raises(ExchangeError, match=f"has {200 << 30} bytes; allowed: a regular file of {1 << 30} bytes"):
        wait_for(tmp_path, "auditor", 0)


def test_of_two_messages_put_at_once_exactly_one_arrives(tmp_path, monkeypatch):
    both = threading.Barrier(2, timeout=10)
    fsync = os.fsync

    def slow(descriptor):  # both are written before either has its name
        fsync(descriptor)
        both.wait()

    monkeypatch.setattr(os, "fsync", slow)
    for round in range(30):
        said = {}

        def say(value, round=round, said=said):
            try:
                said[value] = put(tmp_path, message(value, round=round))
            except ExchangeError as error:
                said[value] = error

        threads = [threading.Thread(target=say, args=(value,)) for value in (1.0, 2.0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        [first] = [value for value, answer in said.items() if not isinstance(answer, ExchangeError)]
        assert "other content" in str(said[3.0 - first])
        assert wait_for(tmp_path, "auditor", round) == message(first, round=round)
    assert len(names(tmp_path)) == 30


def test_where_a_file_has_one_name_only(tmp_path, monkeypatch):
    def link(*args, **rest):
        raise OSError(errno.EPERM, "Operation not permitted")  # as on a memory stick

    monkeypatch.setattr(os, "link", link)
    put(tmp_path, message())
    assert put(tmp_path, message()) == tmp_path / "auditor-0.safetensors"
    with pytest.raises(ExchangeError, match="other content"):
        put(tmp_path, message(1.0))
    assert wait_for(tmp_path, "auditor", 0) == message() and names(tmp_path) == ["auditor-0.safetensors"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        put(tmp_path, message())
    assert names(tmp_path) == []


def test_the_other_party_may_read_what_is_put(tmp_path):
    old = os.umask(0o022)
    try:
        path = put(tmp_path, message())
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644 and path.stat().st_nlink == 1
