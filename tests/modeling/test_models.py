"""Each family against the published code's logits, and as a citizen of transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families import FAMILIES, MOSTLY_SLOW
from tests.golden import FIXTURES, load_cases


@pytest.mark.parametrize("name", ["llada_tiny", "llada_tiny_gqa", "dream_tiny"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_the_published_ones(name, attention):
    model = FAMILIES[name.split("_")[0]].model.from_pretrained(FIXTURES / name, attn_implementation=attention)
    cases, tensors = load_cases(f"logits_{name}")
    cases = [case for case in cases if case["id"] != "leftpad3"]  # see test_modeling_dream.py
    assert cases
    for case in cases:
        logits = model(tensors[f"{case['id']}.input_ids"]).logits
        torch.testing.assert_close(logits, tensors[f"{case['id']}.logits"], atol=1e-3, rtol=0)


def test_attentions_are_distributions_over_all_positions(family, prompt):
    model = family.load()
    model.set_attn_implementation("eager")
    attentions = model(prompt, output_attentions=True).attentions
    assert len(attentions) == model.config.num_hidden_layers and attentions[0].shape == (1, 4, 9, 9)
    torch.testing.assert_close(attentions[0].sum(dim=-1), torch.ones(1, 4, 9))
    assert (attentions[0] > 0).all()  # bidirectional


def test_config_keeps_the_official_keys(family, tmp_path):
    official = json.loads((family.golden / "config.json").read_text())
    family.config.from_pretrained(family.golden).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for key in set(official) - {"torch_dtype", "transformers_version", "attn_implementation"}:
        assert saved[key] == official[key], key
    assert set(saved) - set(official) == {"auto_map", "dtype", *({"pad_token_id"} - set(official))}
    assert saved["auto_map"]["AutoModelForCausalLM"] == f"modeling_{family.name}.{family.model.__name__}"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_mask_hides_padding(family, attention):
    """A left-padded row has the logits of the row alone; pads change nothing."""
    model = family.load(attn_implementation=attention)
    ids = torch.randint(0, 317, (1, 12), generator=torch.Generator().manual_seed(0))
    alone = model(ids).logits
    for pad in (318, 7):
        padded = torch.cat((torch.full((1, 5), pad), ids), dim=1)
        mask = (torch.arange(17) >= 5).long()[None]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = model(padded, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(logits[:, 5:], alone, atol=1e-4, rtol=1e-4)
        assert logits.isfinite().all()
        unmasked = model(padded, position_ids=positions).logits
        assert (unmasked[:, 5:] - alone).abs().max() > 1e-2


def test_position_ids_are_honoured(model, prompt):
    shifted = model(prompt, position_ids=torch.arange(9)[None] + 40).logits
    torch.testing.assert_close(shifted, model(prompt).logits, atol=1e-4, rtol=1e-4)  # rotary sees differences
    assert (model(prompt, position_ids=2 * torch.arange(9)[None]).logits - shifted).abs().max() > 1e-2


def test_logits_to_keep(model):
    ids = torch.randint(0, 317, (2, 12), generator=torch.Generator().manual_seed(0))
    full = model(ids).logits
    rows = torch.tensor([[3, 5, 1], [11, 0, 0]])
    for keep, expected in (
        (0, full),
        (4, full[:, -4:]),
        (torch.tensor([2, 7]), full[:, [2, 7]]),
        (rows, torch.stack([full[0, rows[0]], full[1, rows[1]]])),
    ):
        torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, expected, atol=1e-5, rtol=1e-5)


def test_tied_embeddings_load_and_save(family, tmp_path):
    """Official tied checkpoints have no head weight; ours neither, and it follows the embedding."""
    model = family.make(tie_word_embeddings=True)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head.data_ptr() == embedding.data_ptr()
    model.save_pretrained(tmp_path)
    assert f"{family.head}.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = family.model.from_pretrained(tmp_path)
    ids = torch.arange(10)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    untied = family.make()
    assert untied.get_output_embeddings().weight.data_ptr() != untied.get_input_embeddings().weight.data_ptr()


def test_state_dict_has_the_official_names(family, model):
    official = set(load_file(family.golden / "model.safetensors"))
    assert set(model.state_dict()) == official


def test_missing_weight_is_noticed(family, tmp_path):
    weights = load_file(family.golden / "model.safetensors")
    missing = f"{family.blocks}.1.{family.projections[5]}.weight"
    del weights[missing]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((family.golden / "config.json").read_text())
    _, info = family.model.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {missing}


def test_resized_embeddings_survive_a_round_trip(family, tmp_path):
    model = family.make()
    model.resize_token_embeddings(60)
    model.save_pretrained(tmp_path)
    loaded = family.model.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == loaded.get_output_embeddings().out_features == 60
    assert loaded(torch.tensor([[1, 59]])).logits.shape == (1, 2, 60)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(family, reentrant):
    model = family.make().train()
    ids = torch.arange(20).view(2, 10)

    def gradients():
        model.zero_grad()
        model(ids).logits.square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b)


def test_bfloat16_is_close(family, prompt):
    exact = family.load()(prompt).logits
    model = family.load(dtype=torch.bfloat16)
    logits = model(prompt).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).norm() / exact.norm() < 0.06


def test_device_map_and_low_memory_loading(family, prompt, tmp_path):
    """Through the meta device and with layers on disk: nothing in the model is lost on the way."""
    expected = family.load()(prompt).logits
    model = family.load(device_map="cpu")
    torch.testing.assert_close(model(prompt).logits, expected)
    device_map = dict.fromkeys((family.embedding, family.norm, family.head), "cpu")
    device_map |= {f"{family.blocks}.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    device_map |= {"model.rotary_emb": "cpu"} if family.name == "dream" else {}
    model = family.load(device_map=device_map, offload_folder=tmp_path)
    torch.testing.assert_close(model(prompt).logits, expected)


def test_compiles_into_one_graph(family, prompt):
    model = family.load()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(prompt).logits, model(prompt).logits)


def test_labels_and_double_inputs_are_refused(model, prompt):
    with pytest.raises(ValueError, match="`labels`"):
        model(prompt, labels=prompt)
    with pytest.raises(ValueError, match="`input_ids` and `inputs_embeds`"):
        model(prompt, inputs_embeds=torch.zeros(1, 9, 64))
    embeds = model.get_input_embeddings()(prompt)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(prompt).logits)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2", "sdpa"])
def test_attention_implementations_agree_on_a_gpu(family, attention):
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    model = family.make(hidden_size=128).cuda().bfloat16()
    ids = torch.randint(0, 48, (2, 40), device="cuda")
    mask = (torch.arange(40, device="cuda") >= torch.tensor([[0], [9]], device="cuda")).long()
    model.set_attn_implementation("eager")
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation(attention)
    logits = model(ids, attention_mask=mask).logits
    assert (logits - expected)[mask.bool()].norm() / expected[mask.bool()].norm() < 0.02


@torch.no_grad()  # on a CPU, flex attention only goes forward
@pytest.mark.parametrize("family", MOSTLY_SLOW, indirect=True)
def test_flex_attention_agrees(family, prompt):
    ids = torch.cat((prompt, prompt.flip(1)))
    mask = (torch.arange(9) >= torch.tensor([[0], [4]])).long()
    expected = family.load()(ids, attention_mask=mask).logits
    model = family.load(attn_implementation="flex_attention")
    logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)
