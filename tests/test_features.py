"""Frozen features: what a backbone gives, computed once, mapped afterwards. Random weights, no network."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from fairtuning import paths
from fairtuning.datasets import GroupedData
from fairtuning.vision import features
from fairtuning.vision.backbones import FILES, BackboneError

RESNET = "resnet18.tv_in1k"


@pytest.fixture
def data(folders):
    pixels = torch.randint(256, (7, 3, 40, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    values = torch.tensor([0, 1, 0, 1, 0, 1, 1])
    names = ("no", "yes")
    return GroupedData("faces", "tiny", "d" * 64, pixels, values, 1 - values, values, names, names, ("one", "two"))


def by_hand(data, backbone):
    """The obvious twin: each image alone, in float64."""
    made = features.headless(backbone, size=tuple(data.inputs.shape[-2:]), weights="random")
    with torch.no_grad():
        return torch.cat([made.model.double()(made.prepare(image[None]).double()) for image in data.inputs])


def files():
    return sorted(paths.data_folder().glob("*/features/*.npy"))


def refused(call, *words):
    with pytest.raises(BackboneError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


# The paper's three networks, a transformer (whose patches do not fill 40 x 32) and the partial one.
@pytest.mark.parametrize(
    "backbone, width",
    [
        (RESNET, 512),
        ("resnet50.tv_in1k", 2048),
        ("densenet121.tv_in1k", 1024),
        ("vit-tiny", 192),
        (features.STAGES, 256),
    ],
)
def test_each_image_has_its_features_in_order(data, backbone, width):
    found = features.load(data, backbone, weights="random", precision="float32", batch_size=3)
    assert found.shape == (7, width) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), by_hand(data, backbone), rtol=1e-3, atol=1e-4)


def test_the_second_load_maps_the_file(data, monkeypatch):
    found = features.load(data, RESNET, weights="random").clone()
    (path,) = files()
    facts = json.loads(path.with_suffix(".json").read_text())
    assert (facts["digest"], facts["edition"], facts["weights"], facts["features"]) == ("d" * 64, "tiny", "random", 512)
    monkeypatch.setattr(features, "headless", lambda *_, **__: pytest.fail("the backbone was made again"))
    again = features.load(data, RESNET, weights="random", batch_size=1)
    assert torch.equal(again, found) and again.dtype == torch.float16
    again[0] = 0  # a copy on write: the file never changes
    assert torch.equal(features.load(data, RESNET, weights="random"), found)
    assert [path.name for path in files()[0].parent.iterdir() if path.suffix == ".part"] == []


def test_half_precision_is_close_and_a_file_of_its_own(data):
    half, full = (features.load(data, RESNET, weights="random", precision=one) for one in features.PRECISIONS)
    assert half.dtype == torch.float16 and len(files()) == 2
    torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.02)


def test_whatever_features_depend_on_makes_another_file(data):
    features.load(data, RESNET, weights="random")
    mirrored = features.load(data, RESNET, weights="random", view="mirrored", precision="float32")
    flipped = replace(data, inputs=data.inputs.flip(-1), digest="e" * 64)
    assert torch.equal(mirrored, features.load(flipped, RESNET, weights="random", precision="float32"))
    features.load(replace(data, edition="other"), RESNET, weights="random")
    assert len(files()) == 4
    other_task = replace(data, label=data.group, group=data.label)  # labels play no part
    features.load(other_task, RESNET, weights="random")
    assert len(files()) == 4


def test_the_partial_network_is_the_first_three_stages(data, tmp_path):
    import timm

    torch.manual_seed(3)
    stages = timm.create_model("resnet18", features_only=True, out_indices=(3,)).eval()
    save_file({key: value.contiguous() for key, value in stages.state_dict().items()}, tmp_path / "stages.safetensors")
    found = features.load(data, features.STAGES, weights=tmp_path / "stages.safetensors", precision="float32")
    prepared = features.headless(features.STAGES, size=(40, 32), weights="random").prepare(data.inputs)
    with torch.no_grad():
        expected = stages(prepared)[0].mean((-2, -1))
    torch.testing.assert_close(found.clone(), expected, rtol=1e-4, atol=1e-5)
    save_file({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "other.safetensors")
    refused(
        lambda: features.load(data, features.STAGES, weights=tmp_path / "other.safetensors"), "does not fit", "Missing"
    )
    assert len(files()) == 1  # nothing half-written stays


def test_bad_input_is_one_line(data):
    refused(lambda: features.load(data, RESNET, weights="random", view="upside down"), "plain, mirrored")
    refused(lambda: features.load(data, RESNET, weights="random", precision="int8"), "bfloat16, float32")
    refused(lambda: features.load(replace(data, inputs=torch.zeros(7, 3)), RESNET), "torch.float32 [7, 3]", "uint8")
    refused(lambda: features.load(data, "resnet19", weights="random"), "no model 'resnet19'")
    features.load(data, RESNET, weights="random")
    (path,) = files()
    path.write_bytes(path.read_bytes()[:100])
    refused(lambda: features.load(data, RESNET, weights="random"), str(path), "delete it")


def test_features_that_the_file_cannot_hold_are_refused(data, monkeypatch):
    monkeypatch.setattr(features.network, "forward", lambda model, inputs: torch.full((len(inputs), 2), 1e6))
    refused(lambda: features.load(data, RESNET, weights="random"), "float16 cannot hold", "float32")
    assert not files()


@pytest.mark.skipif(not os.environ.get("FAIRTUNING_WEIGHTS"), reason="FAIRTUNING_WEIGHTS names no folder of weights")
@pytest.mark.parametrize("backbone", ["vit-tiny", "mobilenetv2_100.onnxzoo_in1k", features.STAGES])
def test_the_weights_of_the_compact_profile(data, backbone):
    real = features.load(data, backbone, precision="float32")
    assert real.isfinite().all() and real.std() > 0
    assert not torch.allclose(real, features.load(data, backbone, weights="random", precision="float32"), atol=1e-2)
    digest = json.loads(files()[0].with_suffix(".json").read_text())["weights"]
    assert digest in {"random", *(expected for _, expected in FILES.values())}
