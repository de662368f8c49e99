"""LoRA through peft: which layers, how many parameters, the same function before, after merging and after loading."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from fairtuning import adapters, backbones, prefix
from fairtuning.adapters import AdapterError

# arXiv 2410.17358, Table 5: rank, classes of the data set behind the row (our decoding), trained parameters
TABLE_5 = [(8, 40, 325_672), (16, 100, 666_724), (32, 100, 1_256_548), (64, 100, 2_436_196), (128, 100, 4_795_492)]


def vit(*, name="vit_tiny_patch16_224", classes=3, seed=0):
    return backbones.load(name, classes=classes, size=(32, 48), weights="random", seed=seed).model


@pytest.fixture(scope="module")
def inputs():
    return torch.randn(4, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def trained(model, inputs, steps=3):
    """A few steps, so that B is no longer 0."""
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), torch.tensor([0, 1, 2, 0])).backward()
        optimiser.step()
    return model.eval()


@torch.no_grad()
def outputs(model, inputs):
    return model(inputs)


# ------------------------------------------------------------------------------------------------------------- Table 5
@pytest.mark.parametrize("layers", ["qkv", "query_value"])
@pytest.mark.parametrize("rank, classes, printed", TABLE_5)
def test_parameter_counts_of_table_5(rank, classes, printed, layers):
    with torch.device("meta"):  # ViT-B/16 without its weights
        model = adapters.add(backbones.load("dino", classes=classes, weights="random").model, rank=rank, layers=layers)
    count, total = adapters.parameters(model)
    assert count == printed == 12 * rank * (768 + 2304) + 769 * classes
    if rank == 8:
        assert total == 86_155_088  # which the paper prints in every row; the classifier counts twice
        assert round(100 * count / total, 2) == 0.38


def test_all_linear_layers_cost_four_times_as_much():
    with torch.device("meta"):
        model = adapters.add(backbones.load("dino", classes=40, weights="random").model, rank=8, layers="all")
    assert adapters.parameters(model)[0] == 12 * 8 * (3072 + 1536 + 2 * 3840) + 769 * 40


# ---------------------------------------------------------------------------------------------------- the same function
@pytest.mark.parametrize("layers", adapters.LAYERS)
def test_a_new_adapter_leaves_the_function_as_it_was(layers, inputs):
    model = vit()
    before = outputs(model, inputs)
    after = outputs(adapters.add(model, rank=4, layers=layers), inputs)
    torch.testing.assert_close(after, before, rtol=0, atol=0 if layers != "query_value" else 1e-5)


def test_split_projections_compute_the_same(inputs):
    fused = vit().double()
    split = adapters.split_projections(copy.deepcopy(fused))
    assert sum(isinstance(m, adapters.SplitProjection) for m in split.modules()) == 12
    assert sum(p.numel() for p in split.parameters()) == sum(p.numel() for p in fused.parameters())
    torch.testing.assert_close(outputs(split, inputs.double()), outputs(fused, inputs.double()), rtol=1e-12, atol=1e-12)
    assert adapters.split_projections(split) is split  # a second time nothing is left to split


@pytest.mark.parametrize("layers", adapters.LAYERS)
def test_merged_and_unmerged_agree(layers, inputs):
    model = trained(adapters.add(vit(), rank=4, layers=layers), inputs)
    apart = outputs(model, inputs)
    with model.disable_adapter():
        assert not torch.allclose(outputs(model, inputs), apart, atol=1e-2)  # the adapter does something
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged, inputs), apart, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in merged.named_parameters())


@pytest.mark.parametrize("layers, adapted", [("qkv", {"qkv"}), ("query_value", {"query", "value"})])
def test_adapters_and_classifier_are_trained_and_nothing_else(layers, adapted, inputs):
    model = adapters.add(vit(), rank=4, layers=layers)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names if "lora" in name} == adapted
    assert len([name for name in names if "lora_A" in name]) == 12 * len(adapted)
    assert {name for name in names if "lora" not in name} == {
        f"base_model.model.head.modules_to_save.default.{kind}" for kind in ("weight", "bias")
    }
    trained(model, inputs)
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in frozen.items())


def test_the_last_blocks_alone_and_their_frozen_prefix(inputs):
    model = trained(adapters.add(vit(), rank=4, last=2), inputs)
    assert {int(n.split("blocks.")[1].split(".")[0]) for n, _ in model.named_parameters() if "lora" in n} == {10, 11}
    with torch.no_grad():
        tokens = prefix.first_blocks(model, inputs, blocks=10)
        assert torch.equal(tokens, prefix.first_blocks(vit(), inputs, blocks=10))
        together = prefix.last_blocks(model, tokens, blocks=10)
        torch.testing.assert_close(together, model(inputs), rtol=1e-5, atol=1e-5)


def test_the_seed_decides_the_adapter_and_nothing_else_does():
    def first(**options):
        model = adapters.add(vit(), rank=4, **options)
        return next(p for name, p in model.named_parameters() if "lora_A" in name)

    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = first(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first(seed=1), one) and not torch.equal(first(seed=2), one)


# ---------------------------------------------------------------------------------------------------- peft's own format
@pytest.mark.parametrize("layers", adapters.LAYERS)
def test_what_is_saved_loads_here_and_in_stock_peft(layers, inputs, tmp_path):
    from peft import PeftModel

    model = trained(adapters.add(vit(), rank=4, layers=layers, last=3), inputs)
    adapters.save(model, tmp_path)
    expected = outputs(model, inputs)
    here = adapters.load(vit(), tmp_path).eval()
    base = adapters.split_projections(vit()) if layers == "query_value" else vit()
    stock = PeftModel.from_pretrained(base, tmp_path).eval()
    for loaded in (here, stock):
        torch.testing.assert_close(outputs(loaded, inputs), expected, rtol=0, atol=1e-6)
    assert not any(p.requires_grad for p in here.parameters())
    assert any(p.requires_grad for p in adapters.load(vit(), tmp_path, trainable=True).parameters())
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["r"] == 4 and settings["modules_to_save"] == ["head"]
    assert (
        sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values())
        == (adapters.parameters(model)[0])
    )


def test_an_adapter_of_another_model_is_refused(inputs, tmp_path):
    adapters.save(adapters.add(vit(), rank=4), tmp_path)
    shallow = vit()
    shallow.blocks = shallow.blocks[:6]
    for other in (vit(classes=2), vit(name="vit_small_patch16_224"), shallow):
        with pytest.raises(AdapterError, match="holds no adapter that fits this model") as raised:
            adapters.load(other, tmp_path)
        assert "\n" not in str(raised.value)


def test_a_folder_without_a_safe_adapter_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"a pickle")
    for folder in (tmp_path, "someone/adapter"):
        with pytest.raises(AdapterError, match="has no adapter_model.safetensors"):
            adapters.load(vit(), folder)


# ------------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    "options, line",
    [
        ({"rank": 193}, r"rank is 193; blocks.0.attn.qkv \(192 -> 576\) allows 1 to 192"),
        ({"rank": 0}, "rank is 0; .* allows 1 to 192"),
        ({"rank": 4, "layers": "q"}, "layers is 'q'; allowed: qkv, query_value, all"),
        ({"rank": 4, "last": 0}, "last is 0 of 12 blocks; allowed: 1 to 12"),
        ({"rank": 4, "last": 13}, "last is 13 of 12 blocks; allowed: 1 to 12"),
    ],
)
def test_bad_requests_give_one_line(options, line):
    with pytest.raises(AdapterError, match=line):
        adapters.add(vit(), **options)


def test_a_model_without_such_layers_is_refused():
    model = backbones.load("resnet18", classes=2, weights="random").model
    with pytest.raises(AdapterError, match="no layer for 'qkv'; its linear layers: none"):
        adapters.add(model, rank=2)


def test_a_backbone_without_classifier_gets_adapters_alone(inputs):
    model = adapters.add(vit(classes=0), rank=4)
    assert adapters.parameters(model)[0] == 12 * 4 * (192 + 576)
    assert outputs(model, inputs).shape == (4, 192)
