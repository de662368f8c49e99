"""Backbones without a network: random weights, and small files made here that stand for checkpoints."""

import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fairtuning import FairtuningError
from fairtuning.vision import backbones, network
from fairtuning.vision.backbones import BackboneError

NAME = "vit_tiny_patch16_224"
FULL = f"{NAME}.augreg_in21k_ft_in1k"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """The hub is not asked, nor what was fetched from it before."""
    import huggingface_hub

    def unreachable(*arguments, **named):
        raise ConnectionError("no network in the tests")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *arguments: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.delenv("FAIRTUNING_WEIGHTS", raising=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint in timm's keys and in float16: ViT-Tiny, 5 classes, 64 px."""
    model = backbones.load(NAME, classes=1000, size=(64, 64), weights="random", seed=7).model
    file = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_file({key: value.half().contiguous() for key, value in model.state_dict().items()}, file)
    return file


def images(*shape, seed=0):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def logits(backbone, n=2):
    with torch.no_grad():
        return backbone.model(backbone.prepare(images(n, 3, *backbone.size)))


# -------------------------------------------------------------------------------------------------- names and settings
@pytest.mark.parametrize(
    "name, patch, mean",
    [
        ("clip", 32, (0.48145466, 0.4578275, 0.40821073)),
        ("dino", 16, (0.485, 0.456, 0.406)),
        ("vit", 16, (0.5, 0.5, 0.5)),
        ("vit-tiny", 16, (0.5, 0.5, 0.5)),
    ],
)
def test_each_backbone_has_its_own_normalisation(name, patch, mean):
    with torch.device("meta"):  # shapes only
        backbone = backbones.load(name, classes=3, weights="random")
    assert backbone.name == backbones.BACKBONES[name] and backbone.mean == mean and backbone.digest == "random"
    assert backbone.model.patch_embed.patch_size == (patch, patch) and backbone.size == (224, 224)
    assert backbone.model.get_classifier().out_features == 3


def test_images_are_normalised_with_the_checkpoints_mean_and_spread():
    backbone = backbones.load("resnet18", classes=2, weights="random")
    pictures = images(2, 3, 224, 224)
    expected = (pictures.double() / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    torch.testing.assert_close(backbone.prepare(pictures).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [NAME, "mobilenetv2_100", "resnet18"])
def test_any_size_will_do(name):
    backbone = backbones.load(name, classes=3, size=(80, 50), weights="random")
    assert logits(backbone).shape == (2, 3) and backbone.size == (80, 50)
    assert backbone.padded == ((80, 64) if name == NAME else (80, 50))
    if name == NAME:
        assert backbone.model.pos_embed.shape == (1, 1 + 5 * 4, 192)
        filled = backbone.prepare(images(1, 3, 80, 50))
        assert filled.shape == (1, 3, 80, 64) and not filled[..., 50:].any()


def test_images_of_another_size_or_kind_are_refused():
    backbone = backbones.load(NAME, classes=3, size=(32, 48), weights="random")
    for wrong in (images(1, 3, 48, 32), images(1, 1, 32, 48), images(1, 3, 32, 48).float()):
        with pytest.raises(ValueError, match=r"permitted: torch.uint8 \[n, 3, 32, 48\]"):
            backbone.prepare(wrong)


def test_no_classes_gives_pooled_features():
    backbone = backbones.load(NAME, classes=0, size=(32, 32), weights="random")
    assert logits(backbone).shape == (2, 192)


def test_the_seed_decides_the_weights_and_nothing_else_does():
    def head(**options):
        return backbones.load(NAME, classes=3, size=(32, 32), weights="random", **options).model.head.weight

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = head(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(head(seed=1), first) and not torch.equal(head(seed=2), first)


# ------------------------------------------------------------------------------------------------------------- weights
def test_a_checkpoint_gives_its_weights_in_float32_and_a_new_head(checkpoint):
    state = load_file(checkpoint)
    backbone = backbones.load(NAME, classes=2, size=(64, 64), weights=checkpoint, seed=3)
    mine = backbone.model.state_dict()
    for key, value in state.items():
        if key.startswith("head."):
            assert mine[key].shape[0] == 2
        else:
            assert torch.equal(mine[key], value.float()), key
    assert {value.dtype for value in mine.values()} == {torch.float32} and not backbone.model.training
    assert backbone.digest == weights_digest(checkpoint) and "state_dict" not in backbone.model.pretrained_cfg
    other = backbones.load(NAME, classes=2, size=(64, 64), weights=checkpoint, seed=4).model
    assert not torch.equal(other.head.weight, mine["head.weight"])


def weights_digest(file):
    import hashlib

    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_position_embeddings_are_resampled_to_a_rectangle(checkpoint):
    from timm.layers import resample_abs_pos_embed

    backbone = backbones.load(NAME, classes=2, size=(96, 32), weights=checkpoint)
    expected = resample_abs_pos_embed(
        load_file(checkpoint)["pos_embed"].float(), new_size=[6, 2], old_size=[4, 4], num_prefix_tokens=1
    )
    assert backbone.model.pos_embed.shape == (1, 13, 192)
    torch.testing.assert_close(backbone.model.pos_embed.detach(), expected)
    assert logits(backbone).isfinite().all()


def test_weights_come_from_the_folder_that_the_environment_names(checkpoint, tmp_path, monkeypatch):
    shutil.copy(checkpoint, tmp_path / "vit_base_patch16_224.dino.safetensors")
    monkeypatch.setenv("FAIRTUNING_WEIGHTS", str(tmp_path))
    assert backbones.find("vit_base_patch16_224.dino", repository=None).parent == tmp_path
    with pytest.raises(BackboneError, match="224.dino.safetensors does not fit .*another architecture"):
        backbones.load("dino", classes=2)


def test_a_changed_file_is_refused(checkpoint, tmp_path, monkeypatch):
    shutil.copy(checkpoint, tmp_path / backbones.FILES[FULL][0])
    monkeypatch.setenv("FAIRTUNING_WEIGHTS", str(tmp_path))
    with pytest.raises(FairtuningError, match="truncated or changed: .* expected 41ed9fa53d10"):
        backbones.load("vit-tiny", classes=2)


def test_weights_found_nowhere_give_one_line(tmp_path, monkeypatch):
    with pytest.raises(
        BackboneError, match="FAIRTUNING_WEIGHTS names no folder .*timm/vit_base_patch16_224.dino"
    ) as one:
        backbones.load("dino", classes=2)
    assert "\n" not in str(one.value)
    monkeypatch.setenv("FAIRTUNING_WEIGHTS", str(tmp_path))
    with pytest.raises(BackboneError, match=f"{re.escape(str(tmp_path))} has no {FULL}.safetensors"):
        backbones.load("vit-tiny", classes=2)
    with pytest.raises(BackboneError, match="timm names no hub repository"):  # a file of ours, not of timm's
        backbones.load("mobilenetv2_100.onnxzoo_in1k", classes=2)
    monkeypatch.setenv("FAIRTUNING_WEIGHTS", str(tmp_path / "absent"))
    with pytest.raises(BackboneError, match="absent', no folder"):
        backbones.load("vit-tiny", classes=2)


def test_a_checkpoint_of_another_architecture_is_refused(checkpoint, tmp_path):
    for name in ("vit_small_patch16_224", "resnet18"):
        with pytest.raises(BackboneError, match=f"small.safetensors .*another architecture.*{name}|{name}.*another"):
            backbones.load(name, classes=2, size=(64, 64), weights=checkpoint)
    # every weight of a shallower network is in a deeper one: the surplus gives it away
    state = {k: v for k, v in load_file(checkpoint).items()} | {"blocks.12.norm1.weight": torch.ones(192)}
    save_file(state, tmp_path / "deep.safetensors")
    with pytest.raises(BackboneError, match=r"0 weights missing \(\), 1 unknown \(blocks.12.norm1.weight\)"):
        backbones.load(NAME, classes=2, size=(64, 64), weights=tmp_path / "deep.safetensors")


def test_what_is_no_safetensors_file_is_refused(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "model.bin")
    for file in (tmp_path / "model.bin", tmp_path / "absent"):
        with pytest.raises(BackboneError, match="must be a safetensors file"):
            backbones.load(NAME, classes=2, weights=file)


@pytest.mark.parametrize(
    "name, options, line",
    [
        ("vit_tiny_patch16_225", {}, "no model 'vit_tiny_patch16_225'; allowed: clip, dino, vit, vit-tiny, vit_tiny_p"),
        (f"{NAME}.dino", {}, "no checkpoint 'dino'; allowed: augreg_in21k, augreg_in21k_ft_in1k"),
        (NAME, {"classes": -1}, "classes -1, size"),
        (NAME, {"size": (0, 32)}, r"size \(0, 32\): allowed are"),
        (NAME, {"size": (32,)}, r"size \(32,\): allowed are"),
    ],
)
def test_bad_requests_give_one_line(name, options, line):
    with pytest.raises(BackboneError, match=line) as raised:
        backbones.load(name, **{"classes": 2, "weights": "random"} | options)
    assert "\n" not in str(raised.value)


# -------------------------------------------------------------------------------------------------------- frozen blocks
@pytest.mark.parametrize("blocks", [0, 5, 11, 12])
@pytest.mark.parametrize("name", [NAME, "clip", "deit_tiny_distilled_patch16_224"])
def test_the_first_and_the_last_blocks_make_the_whole(name, blocks):
    backbone = backbones.load(name, classes=3, size=(32, 64), weights="random")
    model, inputs = backbone.model.double(), backbone.prepare(images(2, 3, 32, 64)).double()
    tokens = network.first_blocks(model, inputs, blocks=blocks)
    together = network.last_blocks(model, tokens, blocks=blocks)
    torch.testing.assert_close(together, model(inputs), rtol=1e-11, atol=1e-11)


def test_gradients_are_those_of_the_whole_model():
    backbone = backbones.load(NAME, classes=3, size=(32, 48), weights="random")
    model, inputs = backbone.model.double(), backbone.prepare(images(2, 3, 32, 48)).double()
    gradients = []
    for way in (model, lambda x: network.forward(model, x)):
        model.zero_grad()
        torch.nn.functional.cross_entropy(way(inputs), torch.tensor([0, 2])).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_attention_written_out_gives_the_same_numbers_and_gradients():
    backbone = backbones.load(NAME, classes=3, size=(32, 48), weights="random")
    model, inputs = backbone.model.double(), backbone.prepare(images(2, 3, 32, 48)).double()
    found = []
    for way in (lambda model: model, backbones.write_out_attention):
        logits = way(model)(inputs)
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2])).backward()
        found.append({"logits": logits.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()})
    assert not any(block.attn.fused_attn for block in model.blocks)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_mean_pooling_needs_every_token():
    import timm

    model = timm.create_model(NAME, img_size=32, global_pool="avg", num_classes=3).eval().double()
    inputs = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(network.forward(model, inputs), model(inputs), rtol=1e-11, atol=1e-11)


def test_blocks_that_a_model_does_not_have():
    model = backbones.load(NAME, classes=3, size=(32, 32), weights="random").model
    with pytest.raises(BackboneError, match="first 13 blocks of a VisionTransformer; allowed: 0 to 12"):
        network.first_blocks(model, torch.zeros(1, 3, 32, 32), blocks=13)
    model = backbones.load("resnet18", classes=3, weights="random").model
    assert torch.equal(network.forward(model, torch.ones(1, 3, 32, 32)), model(torch.ones(1, 3, 32, 32)))
    with pytest.raises(BackboneError, match="1 blocks of a ResNet; allowed: 0 to 0"):
        network.last_blocks(model, torch.zeros(1, 3, 32, 32), blocks=1)


# -------------------------------------------------------------------------------------------------- the real checkpoint
REAL = os.path.join(os.environ.get("FAIRTUNING_WEIGHTS", ""), backbones.FILES[FULL][0])


@pytest.mark.skipif(
    not os.path.isfile(REAL), reason=f"FAIRTUNING_WEIGHTS names no folder with {backbones.FILES[FULL][0]}"
)
def test_the_real_vit_tiny(monkeypatch):
    monkeypatch.setenv("FAIRTUNING_WEIGHTS", os.path.dirname(REAL))
    backbone = backbones.load("vit-tiny", classes=0, size=(112, 80))
    assert backbone.digest == backbones.FILES[FULL][1] and backbone.mean == backbone.std == (0.5, 0.5, 0.5)
    assert float(backbone.prepare(torch.full((1, 3, 112, 80), 255, dtype=torch.uint8)).max()) == 1
    features = logits(backbone, n=4)
    assert features.shape == (4, 192) and features.isfinite().all()
    # two photographs that come with scikit-learn: a palace in China, a flower; wrong weights or keys would not see them
    whole = backbones.load("vit-tiny", classes=1000)
    seen = [int(whole.model(whole.prepare(photograph(name, 224))).argmax()) for name in ("china.jpg", "flower.jpg")]
    assert seen == [698, 985]  # ImageNet's "palace" and "daisy"


def photograph(name, side):
    from sklearn.datasets import load_sample_image

    picture = torch.tensor(load_sample_image(name)).permute(2, 0, 1)[None, :, :, 106:533]  # the middle 427 x 427
    smaller = torch.nn.functional.interpolate(picture.float(), (side, side), mode="bicubic", antialias=True)
    return smaller.clamp(0, 255).round().byte()
