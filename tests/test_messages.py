"""Messages: what crosses is an adapter, bit for bit; everything else is refused in one line."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairtuning import paths
from fairtuning.collaboration.messages import (
    DTYPES,
    LONGEST_HEADER,
    Message,
    Refused,
    decode,
    encode,
    read_header,
    shapes_of,
)

A, B = "blocks.0.attn.qkv.lora_A.weight", "blocks.0.attn.qkv.lora_B.weight"


def adapter(rank=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {
        B: torch.randn(6, rank, generator=generator).to(dtype),
        A: torch.randn(rank, 4, generator=generator).to(dtype),
    }


def message(tensors=None, **changed):
    given = {"sender": "auditor", "receiver": "developer", "round": 3, "tensors": tensors or adapter()}
    return Message(**given | changed)


def read(data, *, allowed=None, sender="auditor", receiver="developer", round=3):
    return decode(data, allowed=allowed or shapes_of(adapter()), sender=sender, receiver=receiver, round=round)


def written(header, values=b"", *, length=None):
    """A safetensors file by hand, so that it may say anything."""
    text = header if isinstance(header, bytes) else json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + values


def parts(data):
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def refused(data, *words, **expected):
    with pytest.raises(Refused) as error:
        read(data, **expected)
    text = str(error.value)
    assert text.startswith("message refused: ") and "\n" not in text and len(text) < 300
    assert all(word in text for word in words), text


# ----------------------------------------------------------------------------------------------------------- crossing
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_crosses_bit_for_bit(dtype):
    sent = adapter(dtype=getattr(torch, dtype))
    received = read(encode(message(sent)), allowed=shapes_of(sent))
    assert (received.sender, received.receiver, received.round) == ("auditor", "developer", 3)
    assert received.tensors.keys() == sent.keys()
    for name, value in sent.items():
        assert received.tensors[name].dtype == value.dtype and torch.equal(received.tensors[name], value)
        received.tensors[name].add_(1)  # memory of its own


@given(
    st.dictionaries(
        st.integers(0, 11).map(lambda block: f"blocks.{block}.lora_A.weight"),
        st.tuples(st.lists(st.integers(1, 4), max_size=3), st.sampled_from(sorted(DTYPES)), st.integers(0, 99)),
        min_size=1,
    ),
    st.integers(0, 1000),
)
def test_any_adapter_and_one_byte_string_for_it(drawn, round):
    tensors = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))
        for name, (shape, dtype, seed) in drawn.items()
    }
    data = encode(message(tensors, round=round))
    assert data == encode(message(dict(reversed(tensors.items())), round=round))
    received = read(data, allowed=shapes_of(tensors), round=round)
    assert encode(received) == data and all(torch.equal(received.tensors[name], tensors[name]) for name in tensors)
    assert read_header(data) == ("auditor", "developer", round, shapes_of(tensors))


def test_the_same_bytes_in_another_process():
    code = (
        "import sys, torch; from fairtuning.collaboration.messages import Message, encode; "
        f"tensors = {{'{B}': torch.ones(6, 2), '{A}': torch.arange(8.0).reshape(2, 4)}}; "
        "sys.stdout.buffer.write(encode(Message('auditor', 'developer', 3, tensors)))"
    )
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": str(paths.ROOT / "lib")}
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment).stdout
    assert there == encode(message({A: torch.arange(8.0).reshape(2, 4), B: torch.ones(6, 2)}))


def test_any_safetensors_reader_can_read_it(tmp_path):
    data = encode(message())
    for name, value in safetensors.torch.load(data).items():
        assert torch.equal(value, adapter()[name])
    (tmp_path / "message.safetensors").write_bytes(data)
    with safetensors.safe_open(tmp_path / "message.safetensors", framework="pt") as file:
        assert file.metadata() == {"protocol": "1", "sender": "auditor", "receiver": "developer", "round": "3"}


def test_peft_names_an_adapter_so():
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    net = torch.nn.Sequential()
    net.qkv, net.head = torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"]))
    state = get_peft_model_state_dict(model)
    heads = {name: value for name, value in state.items() if "lora" not in name}
    tensors = {name: value for name, value in state.items() if name not in heads}
    assert heads and read(encode(message(tensors)), allowed=shapes_of(tensors)).tensors.keys() == tensors.keys()
    trained = {name: value for name, value in model.named_parameters() if "lora" in name}
    assert shapes_of(trained)  # parameters have the adapter's own name inside
    for name, value in heads.items():
        with pytest.raises(Refused, match="no adapter's tensor"):
            shapes_of(tensors | {name: value})


# ------------------------------------------------------------------------------------------------------------ refused
def test_another_sender_receiver_or_round():
    data = encode(message())
    refused(data, "sender is 'auditor', expected 'evaluator'", sender="evaluator")
    refused(data, "receiver is 'developer', expected 'evaluator'", receiver="evaluator")
    refused(data, "round is 3, expected 4", round=4)
    refused(encode(message(sender="developer", receiver="auditor")), "sender is 'developer'")


def test_other_tensors_than_agreed():
    extra = adapter() | {"blocks.1.lora_A.weight": torch.ones(2, 4)}
    refused(encode(message(extra)), "'blocks.1.lora_A.weight' is not one of the 2 agreed")
    refused(encode(message()), "'blocks.1.lora_A.weight' is missing", allowed=shapes_of(extra))
    refused(encode(message(adapter(rank=3))), f"{A!r} is float32 [3, 4], agreed: float32 [2, 4]")
    refused(encode(message(adapter(dtype=torch.float64))), "is float64 [2, 4], agreed: float32 [2, 4]")
    transposed = adapter() | {A: adapter()[A].T}
    refused(encode(message(transposed)), "float32 [4, 2]")


NO_ADAPTERS = [
    "head.weight",
    "head.bias",
    "classifier.lora_A.weight",
    "base_model.model.head.lora_B.default.weight",
    "fc.modules_to_save.default.weight",
    "blocks.0.attn.qkv.weight",
    "blocks.0.xlora_A.weight",
    "lora_A.weight.s",
    "sensitive",
    "",
    "a\nlora_A.weight",
    "x" * 300 + ".lora_A.weight",
]


@pytest.mark.parametrize("name", NO_ADAPTERS)
def test_what_is_no_adapter_neither_leaves_nor_enters_nor_is_agreed(name):
    tensors = adapter() | {name: torch.ones(2, 4)}
    for act in (lambda: shapes_of(tensors), lambda: encode(message(tensors))):
        with pytest.raises(Refused, match="no adapter's tensor"):
            act()
    header, values = parts(encode(message()))
    header[name] = {"dtype": "F32", "shape": [2, 4], "data_offsets": [len(values), len(values) + 32]}
    refused(written(header, values + bytes(32)), "no adapter's tensor")
    with pytest.raises(Refused, match="no adapter's tensor"):
        read(encode(message()), allowed=shapes_of(adapter()) | {name: ((2, 4), "float32")})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite(value, dtype):
    tensors = adapter(dtype=getattr(torch, dtype))
    tensors[B][3, 1] = value
    with pytest.raises(Refused, match="not finite"):
        encode(message(tensors))
    header, values = parts(encode(message(adapter(dtype=getattr(torch, dtype)))))
    bad = tensors[B].reshape(-1).view(torch.uint8).numpy().tobytes()
    refused(
        written(header, values[: -len(bad)] + bad), f"{B!r} has a value that is not finite", allowed=shapes_of(tensors)
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes(dtype):
    with pytest.raises(Refused, match="allowed: float64, float32"):
        shapes_of({A: torch.zeros(2, 4, dtype=dtype)})


@pytest.mark.parametrize(
    "changed", [{"sender": ""}, {"sender": "developer"}, {"receiver": "A b"}, {"round": -1}, {"round": True}]
)
def test_what_encode_refuses(changed):
    with pytest.raises(Refused):
        encode(message(**changed))
    with pytest.raises(Refused, match="no tensor"):
        shapes_of({})
    with pytest.raises(Refused, match="sizes of 1 or more"):
        shapes_of({A: torch.ones(0, 4)})


def test_metadata():
    header, values = parts(encode(message()))
    for changed, word in [
        ({"note": "s = 0110"}, "metadata"),
        ({"round": "03"}, "not written as encode()"),
        ({"round": 3}, "not written as encode()"),
        ({"round": "three"}, "ValueError"),
        ({"protocol": "2"}, "protocol '2', here it is '1'"),
        ({"sender": ["auditor"]}, "a party is called"),
    ]:
        refused(written(header | {"__metadata__": header["__metadata__"] | changed}, values), word)
    del header["__metadata__"]["round"]
    refused(written(header, values), "metadata")
    refused(written({**header, "__metadata__": {}}, values), "metadata")
    refused(written({A: header[A], B: header[B]}, values), "KeyError")


def entry(**changed):
    header, values = parts(encode(message()))
    return written(header | {A: header[A] | changed}, values)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04\x95.",
        b"<!doctype html>" * 9,
        written(b"[" * 5000 + b"]" * 5000),
        written(b"[1, 2]"),
        written(b'{"__metadata__": null}'),
        written({}, length=LONGEST_HEADER + 1),
        written({}, length=2**63),
        written(b"{" + b" " * (LONGEST_HEADER + 8) + b"}"),
        entry(shape=[2, 10**15]),
        entry(shape=[2, -4]),
        entry(shape=[True, 4]),
        entry(shape=[2.0, 4]),
        entry(shape="24"),
        entry(dtype="I8"),
        entry(dtype=["F32"]),
        entry(data_offsets=[32, 64]),
        entry(data_offsets=[0, 64]),
        entry(more=1),
        written(b'{"__metadata__": {}, "__metadata__": {}}'),
    ],
    ids=lambda data: None,
)
def test_no_message_at_all(data):
    refused(data)


def test_headers_that_mean_the_same_are_refused():
    """Spaces, order, escapes and repeated keys could carry something; there is one way to write a message."""
    data = encode(message())
    header, values = parts(data)
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    assert written(text.encode(), values) == data
    for other in (
        text + " " * 8,
        " " + text[:-1] + " }",
        text.replace("blocks", "\\u0062locks"),
        json.dumps(dict(reversed(header.items())), separators=(",", ":")),
        text[:-1] + ',"__metadata__":' + json.dumps(header["__metadata__"]) + "}",
    ):
        refused(written(other.encode(), values), "header")


def test_every_cut_and_every_added_byte():
    data = encode(message())
    for length in range(len(data)):
        refused(data[:length])
    for more in (b"\0", data):
        refused(data + more, f"{len(data) + len(more)} bytes")


def test_every_changed_byte_changes_a_value_or_is_refused():
    data = encode(message())
    start = len(data) - sum(value.numel() * 4 for value in adapter().values())
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        if place < start:
            refused(bytes(changed))
        else:
            assert encode(read(bytes(changed))) == changed


@given(st.binary(max_size=300))
def test_noise(data):
    refused(data)


@given(st.binary(max_size=200))
def test_noise_with_a_length(data):
    refused(written(data))


def test_a_huge_claim_costs_nothing(monkeypatch):
    """The header is read before memory is taken for what it announces."""
    monkeypatch.setattr(torch, "frombuffer", lambda *_, **__: pytest.fail("a tensor was made"))
    refused(entry(shape=[2, 10**15]))
    refused(encode(message(adapter(rank=3))))
    refused(encode(message())[:-1])
