"""LLaDA against the published code's logits, and as a citizen of transformers."""

import json

import pytest
import torch
from golden import FIXTURES, load_cases
from safetensors.torch import load_file, save_file

from dparallel.modeling import LLaDAConfig, LLaDAModelLM

TINY = {"d_model": 32, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 64, "vocab_size": 50, "mask_token_id": 49}
TINY |= {"eos_token_id": 48, "pad_token_id": 48}


@pytest.mark.parametrize("name", ["llada_tiny", "llada_tiny_gqa"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_the_published_ones(name, attention):
    model = LLaDAModelLM.from_pretrained(FIXTURES / name, attn_implementation=attention)
    cases, tensors = load_cases(f"logits_{name}")
    assert cases
    for case in cases:
        logits = model(tensors[f"{case['id']}.input_ids"]).logits
        torch.testing.assert_close(logits, tensors[f"{case['id']}.logits"], atol=1e-3, rtol=0)


def test_hidden_states_are_the_published_ones(llada):
    _, tensors = load_cases("logits_llada_tiny")
    output = llada(tensors["prompt12_mask64.input_ids"], output_hidden_states=True)
    assert len(output.hidden_states) == 4
    for i, hidden_states in enumerate(output.hidden_states):
        torch.testing.assert_close(hidden_states, tensors[f"prompt12_mask64.hidden_{i}"], atol=1e-3, rtol=0)


def test_attentions_are_distributions_over_all_positions(prompt):
    model = LLaDAModelLM.from_pretrained(FIXTURES / "llada_tiny", attn_implementation="eager")
    attentions = model(prompt, output_attentions=True).attentions
    assert len(attentions) == 3 and attentions[0].shape == (1, 4, 9, 9)
    torch.testing.assert_close(attentions[0].sum(dim=-1), torch.ones(1, 4, 9))
    assert (attentions[0] > 0).all()  # bidirectional


def test_config_keeps_the_official_keys(tmp_path):
    official = json.loads((FIXTURES / "llada_tiny" / "config.json").read_text())
    LLaDAConfig.from_pretrained(FIXTURES / "llada_tiny").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for key in set(official) - {"torch_dtype", "transformers_version"}:
        assert saved[key] == official[key], key
    assert saved["auto_map"]["AutoModelForCausalLM"] == "modeling_llada.LLaDAModelLM"


def test_standard_names_are_aliases():
    config = LLaDAConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, tie_word_embeddings=True)
    assert (config.d_model, config.n_layers, config.n_heads, config.weight_tying) == (64, 3, 4, True)
    assert (
        config.num_key_value_heads == 4 and config.intermediate_size == 256 and config.max_position_embeddings == 4096
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"alibi": True},
        {"block_type": "sequential"},
        {"layer_norm_type": "default"},
        {"include_bias": True},
        {"include_qkv_bias": True},
        {"activation_type": "gelu"},
        {"rope": False},
        {"attention_layer_norm": True},
        {"scale_logits": True},
        {"input_emb_norm": True},
        {"attention_dropout": 0.1},
        {"block_group_size": 2},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"n_heads": 5},
        {"n_kv_heads": 3},
        {"embedding_size": 49},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_no_llada_has_is_refused(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"`{name}={value!r}`".replace("[", r"\[").replace("{", r"\{")):
        LLaDAConfig(**(TINY | wrong))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_mask_hides_padding(attention):
    """A left-padded row has the logits of the row alone; pads change nothing."""
    model = LLaDAModelLM.from_pretrained(FIXTURES / "llada_tiny", attn_implementation=attention)
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


def test_position_ids_are_honoured(llada, prompt):
    shifted = llada(prompt, position_ids=torch.arange(9)[None] + 40).logits
    torch.testing.assert_close(shifted, llada(prompt).logits, atol=1e-4, rtol=1e-4)  # rotary sees differences
    assert (llada(prompt, position_ids=2 * torch.arange(9)[None]).logits - shifted).abs().max() > 1e-2


def test_logits_to_keep(llada):
    ids = torch.randint(0, 317, (2, 12), generator=torch.Generator().manual_seed(0))
    full = llada(ids).logits
    rows = torch.tensor([[3, 5, 1], [11, 0, 0]])
    for keep, expected in (
        (0, full),
        (4, full[:, -4:]),
        (torch.tensor([2, 7]), full[:, [2, 7]]),
        (rows, torch.stack([full[0, rows[0]], full[1, rows[1]]])),
    ):
        torch.testing.assert_close(llada(ids, logits_to_keep=keep).logits, expected, atol=1e-5, rtol=1e-5)


def test_tied_embeddings_load_and_save(tmp_path):
    """Official tied checkpoints have no head weight; ours neither, and it follows the embedding."""
    model = LLaDAModelLM(LLaDAConfig(**TINY, weight_tying=True))
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head.data_ptr() == embedding.data_ptr()
    model.save_pretrained(tmp_path)
    assert "model.transformer.ff_out.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = LLaDAModelLM.from_pretrained(tmp_path)
    ids = torch.arange(10)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    untied = LLaDAModelLM(LLaDAConfig(**TINY))
    assert untied.get_output_embeddings().weight.data_ptr() != untied.get_input_embeddings().weight.data_ptr()


def test_state_dict_has_the_official_names(llada):
    official = set(load_file(FIXTURES / "llada_tiny" / "model.safetensors"))
    assert set(llada.state_dict()) == official


def test_missing_weight_is_noticed(tmp_path):
    weights = load_file(FIXTURES / "llada_tiny" / "model.safetensors")
    del weights["model.transformer.blocks.1.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((FIXTURES / "llada_tiny" / "config.json").read_text())
    _, info = LLaDAModelLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"model.transformer.blocks.1.up_proj.weight"}


def test_resized_embeddings_survive_a_round_trip(tmp_path):
    model = LLaDAModelLM(LLaDAConfig(**TINY))
    model.resize_token_embeddings(60)
    model.save_pretrained(tmp_path)
    loaded = LLaDAModelLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == loaded.config.embedding_size == 60
    assert loaded(torch.tensor([[1, 59]])).logits.shape == (1, 2, 60)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    torch.manual_seed(0)
    model = LLaDAModelLM(LLaDAConfig(**TINY)).train()
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


def test_bfloat16_is_close(prompt):
    exact = LLaDAModelLM.from_pretrained(FIXTURES / "llada_tiny")(prompt).logits
    model = LLaDAModelLM.from_pretrained(FIXTURES / "llada_tiny", dtype=torch.bfloat16)
    logits = model(prompt).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).norm() / exact.norm() < 0.06


def test_device_map_and_low_memory_loading(prompt, tmp_path):
    """Through the meta device and with layers on disk: nothing in the model is lost on the way."""
    expected = LLaDAModelLM.from_pretrained(FIXTURES / "llada_tiny")(prompt).logits
    model = LLaDAModelLM.from_pretrained(FIXTURES / "llada_tiny", device_map="cpu")
    torch.testing.assert_close(model(prompt).logits, expected)
    device_map = {"model.transformer.wte": "cpu", "model.transformer.ln_f": "cpu", "model.transformer.ff_out": "cpu"}
    device_map |= {f"model.transformer.blocks.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    model = LLaDAModelLM.from_pretrained(FIXTURES / "llada_tiny", device_map=device_map, offload_folder=tmp_path)
    torch.testing.assert_close(model(prompt).logits, expected)


def test_compiles_into_one_graph(prompt):
    model = LLaDAModelLM.from_pretrained(FIXTURES / "llada_tiny")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(prompt).logits, model(prompt).logits)


def test_labels_and_double_inputs_are_refused(llada, prompt):
    with pytest.raises(ValueError, match="`labels`"):
        llada(prompt, labels=prompt)
    with pytest.raises(ValueError, match="`input_ids` and `inputs_embeds`"):
        llada(prompt, inputs_embeds=torch.zeros(1, 9, 64))
    embeds = llada.get_input_embeddings()(prompt)
    torch.testing.assert_close(llada(inputs_embeds=embeds).logits, llada(prompt).logits)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2", "sdpa"])
def test_attention_implementations_agree_on_a_gpu(attention):
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    config = LLaDAConfig(**(TINY | {"d_model": 128}))
    torch.manual_seed(0)
    model = LLaDAModelLM(config).cuda().bfloat16()
    ids = torch.randint(0, 48, (2, 40), device="cuda")
    mask = (torch.arange(40, device="cuda") >= torch.tensor([[0], [9]], device="cuda")).long()
    model.set_attn_implementation("eager")
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation(attention)
    logits = model(ids, attention_mask=mask).logits
    assert (logits - expected)[mask.bool()].norm() / expected[mask.bool()].norm() < 0.02


@torch.no_grad()  # on a CPU, flex attention only goes forward
def test_flex_attention_agrees(prompt):
    ids = torch.cat((prompt, prompt.flip(1)))
    mask = (torch.arange(9) >= torch.tensor([[0], [4]])).long()
    expected = LLaDAModelLM.from_pretrained(FIXTURES / "llada_tiny")(ids, attention_mask=mask).logits
    model = LLaDAModelLM.from_pretrained(FIXTURES / "llada_tiny", attn_implementation="flex_attention")
    logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)
