"""A backbone as a function of what is trained of it. What two parties do with one is in test_parties.py."""

import pytest
import torch

from fairtuning.vision import backbones, small
from fairtuning.vision.network import Network

PIXELS = torch.randint(256, (9, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
ROWS = torch.tensor([5, 0, 8])


def test_the_whole_backbone_is_trained_where_no_rank_is_given():
    backbone = small.load(classes=2)
    expected = backbone.model(backbone.prepare(PIXELS[ROWS]))
    network = Network(backbone, PIXELS, rank=None)
    assert network.trained.keys() == backbone.model.state_dict().keys()
    torch.testing.assert_close(network.forward(network.trained, ROWS), expected, rtol=1e-5, atol=1e-5)
    moved = {name: value + 0.01 for name, value in network.trained.items()}
    backbone.model.load_state_dict(moved)
    expected = backbone.model(backbone.prepare(PIXELS[ROWS]))
    torch.testing.assert_close(network.forward(moved, ROWS), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="blocks is 2 without a rank; allowed: None"):
        Network(backbone, PIXELS, rank=None, blocks=2)


def test_adapters_are_trained_with_the_classifier_alone_and_have_gradients():
    network = Network(small.load(classes=2), PIXELS, rank=3, blocks=1)
    shapes = {name.rpartition("model.")[2]: shape for name, (shape, dtype) in network.shapes.items()}
    assert shapes == {
        "blocks.3.attn.qkv.lora_A.weight": (3, 48),
        "blocks.3.attn.qkv.lora_B.weight": (144, 3),
        "head.modules_to_save.weight": (2, 48),
        "head.modules_to_save.bias": (2,),
    }
    values = {name: value.clone().requires_grad_() for name, value in network.trained.items()}
    network.forward(values, ROWS).square().sum().backward()
    assert all(value.grad.isfinite().all() for value in values.values())
    assert not any(value.requires_grad for value in network.module.parameters())


def test_many_images_are_the_same_in_parts():
    network = Network(small.load(classes=0), PIXELS, rank=2)
    rows = torch.arange(9)
    whole, parts = (network.forward_all(network.adapter(0), rows, at_once=number) for number in (9, 2))
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-5)
    assert whole.shape == (9, 48) == (9, network.width)


def test_the_classrooms_backbone_is_made_once_and_copied():
    one, other = small.load(classes=2, seed=0), small.load(classes=2, seed=1)
    assert not torch.equal(one.model.head.weight, other.model.head.weight)
    assert torch.equal(one.model.pos_embed, other.model.pos_embed) and one.model is not small.pretrained()[0]
    assert isinstance(one, backbones.Backbone) and small.pretrained()[0].num_classes == 10
