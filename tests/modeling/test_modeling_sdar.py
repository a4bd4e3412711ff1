"""SDAR against numbers of the published code: its logits, its keys and values in effect, and its generation."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dparallel.modeling import SDARConfig, SDARForCausalLM
from tests.golden import FIXTURES, load_cases

MODELS = ("sdar_tiny", "sdar_tiny_tied")
UNMASKING = {
    "sequential": "leftmost",
    "static": "confidence",
    "eval_static": "confidence",
    "dynamic": "confidence_threshold",
    "eval_dynamic": "confidence_threshold",
}
LOGITS = [
    pytest.param(name, case, id=f"{name}-{case['id']}")
    for name in MODELS
    for case in load_cases(f"logits_{name}")[0]
    if case["kind"] == "full"
]
CASES = [
    pytest.param(name, case, id=f"{name}-{case['id']}")
    for name in MODELS
    for case in load_cases(f"generate_{name}")[0]
    if case["family"] in UNMASKING and case["robust_to_3e4_logit_noise"] and not case["topk_reaches_beyond_masks"]
]


def load(name, block_length, **kwargs):
    return SDARForCausalLM.from_pretrained(FIXTURES / name, block_size=block_length, **kwargs).eval()


@torch.no_grad()
@pytest.mark.parametrize("attention", ["block_sdpa", "eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "case"), LOGITS)
def test_published_logits(name, case, attention):
    _, tensors = load_cases(f"logits_{name}")
    model = load(name, case["block_length"], attn_implementation=attention)
    ids = tensors[f"{case['id']}.input_ids"].long()
    torch.testing.assert_close(model(ids).logits, tensors[f"{case['id']}.logits"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("cache", ["exact", pytest.param("none", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_published_tokens_and_passes(name, case, cache):
    """Up to the first stop id: what the published loop leaves behind it is its own affair."""
    _, tensors = load_cases(f"generate_{name}")
    ids, fill = (tensors[f"{case['id']}.{part}"].long().view(-1) for part in ("ids", "fill_pass"))
    prompt_length, stop_ids = case["prompt_length"], case["stop_ids"] or []
    settings = {"unmasking": UNMASKING[case["family"]], "steps_per_block": case["denoising_steps"]}
    if "dynamic" in case["family"]:
        settings["threshold"] = case["threshold"]
    output = load(name, case["block_length"]).generate(
        ids[None, :prompt_length],
        max_new_tokens=case["returned_length"] - prompt_length,
        eos_token_id=stop_ids or None,
        pad_token_id=318,
        stop_at_eos=bool(stop_ids),
        do_sample=False,
        block_cache=cache,
        return_dict_in_generate=True,
        **settings,
    )
    answer, fill = ids[prompt_length:], fill[prompt_length:]
    end = next((i + 1 for i, token in enumerate(answer.tolist()) if token in stop_ids), len(answer))
    assert torch.equal(output.sequences[0, prompt_length : prompt_length + end], answer[:end])
    assert torch.equal(output.unmasking_step[0, :end], fill[:end])
    if not case["stopped"]:
        assert output.num_forward_passes.item() == case["denoise_passes"]


def test_files_are_the_official_ones(tmp_path):
    """Keys of config.json, names of tensors; and what some official files leave out has a default."""
    model = load("sdar_tiny", 4)
    model.save_pretrained(tmp_path)
    official, saved = (load_file(folder / "model.safetensors") for folder in (FIXTURES / "sdar_tiny", tmp_path))
    assert saved.keys() == official.keys() and all(torch.equal(saved[name], official[name]) for name in saved)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architectures"], config["rope_theta"], config["head_dim"]) == (["SDARForCausalLM"], 1e6, 32)
    again = SDARForCausalLM.from_pretrained(tmp_path)
    assert again.config.block_causal_length == 4 and again.config._attn_implementation == "block_sdpa"
    config = SDARConfig()
    assert (config.block_size, config.mask_token_id, config.head_dim) == (4, 151669, 128)
    assert SDARConfig(block_causal_length=8).block_size == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, "`block_size=0` is not allowed"),
        ({"use_sliding_window": True}, "`use_sliding_window=True` is not supported"),
        ({"attention_bias": True}, "`attention_bias=True` is not supported"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "must be a multiple of 4"),
    ],
)
def test_what_no_model_of_the_family_has_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SDARConfig(**settings)
