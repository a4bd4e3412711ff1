"""LLaDA's own: its configuration, and hidden states of the published code."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from dparallel.modeling import LLaDAConfig, LLaDAModelLM
from tests.families import FAMILIES
from tests.golden import load_cases

TINY = FAMILIES["llada"].shape


def test_hidden_states_are_the_published_ones():
    llada = FAMILIES["llada"].load()
    _, tensors = load_cases("logits_llada_tiny")
    output = llada(tensors["prompt12_mask64.input_ids"], output_hidden_states=True)
    assert len(output.hidden_states) == 4
    for i, hidden_states in enumerate(output.hidden_states):
        torch.testing.assert_close(hidden_states, tensors[f"prompt12_mask64.hidden_{i}"], atol=1e-3, rtol=0)


def test_standard_names_are_aliases():
    config = LLaDAConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, tie_word_embeddings=True)
    assert (config.d_model, config.n_layers, config.n_heads, config.weight_tying) == (64, 3, 4, True)
    assert config.num_key_value_heads == 4 and config.max_position_embeddings == 4096


def test_defaults_are_those_of_llada_8b():
    with torch.device("meta"):
        model = LLaDAModelLM(LLaDAConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_015_581_184
    assert LLaDAConfig(d_model=64, n_heads=4, mlp_hidden_size=None).intermediate_size == 256


def test_another_mask(tmp_path, prompt):
    """iLLaDA has `[MASK]` at 5, by its configuration alone: the same weights in another order give the same text."""
    llada = FAMILIES["llada"].load()
    expected = llada.generate(prompt, max_new_tokens=20, return_dict_in_generate=True)
    order = torch.arange(320)
    order[[5, 319]] = order[[319, 5]]
    for matrix in (llada.get_input_embeddings(), llada.get_output_embeddings()):
        matrix.weight.data = matrix.weight.data[order].clone()
    llada.config.mask_token_id = 5
    llada.generation_config.mask_token_id = None
    llada.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    output = model.generate(order[prompt], max_new_tokens=20, return_dict_in_generate=True)
    assert torch.equal(output.sequences, order[expected.sequences]) and (output.sequences != 5).all()
    assert torch.equal(output.unmasking_step, expected.unmasking_step)
    with pytest.raises(ValueError, match="`mask_token_id=5`: a prompt must not contain"):
        model.generate(torch.tensor([[4, 5, 6]]))


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


def test_the_configuration_is_known_by_transformers_names(tmp_path):
    """In `to_dict()`, where peft looks for them; files hold the official keys alone."""
    config = FAMILIES["llada"].config(d_model=32, n_heads=4, n_layers=2, mlp_hidden_size=64, weight_tying=True)
    found = config.to_dict()
    assert {name: found[name] for name in ("hidden_size", "num_attention_heads", "tie_word_embeddings")} == {
        "hidden_size": 32, "num_attention_heads": 4, "tie_word_embeddings": True,
    }  # fmt: skip
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert not set(config.attribute_map) & set(saved) and saved["weight_tying"] is True
    assert type(config).from_pretrained(tmp_path).to_dict() | {"_name_or_path": ""} == found | {"_name_or_path": ""}
    assert type(config)(**found).to_diff_dict() == config.to_diff_dict()
