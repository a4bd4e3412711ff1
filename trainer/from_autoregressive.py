"""Autoregressive checkpoints made into block-causal diffusion models, to be trained to fill in blocks."""

import copy
import re

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from dparallel.modeling import DreamConfig, DreamModel, SDARConfig, SDARForCausalLM

logger = logging.get_logger(__name__)

# By `config.model_type`: the family with the same layers.
TARGETS: dict[str, tuple[type, type]] = {
    "llama": (DreamConfig, DreamModel),
    "qwen2": (DreamConfig, DreamModel),
    "qwen3": (SDARConfig, SDARForCausalLM),
}
KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "initializer_range", "rope_parameters",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
# What layers of these families do not have, and what a configuration says where it has it.
UNKNOWN_PARTS = {
    "attention_bias": "biases of the output projection",
    "mlp_bias": "biases of the MLP",
    "use_sliding_window": "attention in a sliding window",
    "attention_dropout": "dropout",
}
ZERO_BIAS = re.compile(r"model\.layers\.\d+\.self_attn\.[qkv]_proj\.bias")
MASK_TOKEN = "[MASK]"
RESERVED = re.compile("reserved|unused|extra", re.IGNORECASE)


def from_autoregressive(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    block_length: int = 32,
    mask_token: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A block-causal diffusion model with the weights of an autoregressive one, to be trained by
    `MaskedDiffusionTrainer`.

    Models of the shapes of Llama and Qwen2 become a `DreamModel`, where Llama's missing biases are zeros; those of the
    shape of Qwen3 an `SDARForCausalLM`. The logits at a position still predict the next token (`logits_shift` of 1).
    Tokens of a prompt see their whole block, too, as in SDAR, and not only what is before them, as in the checkpoint:
    so the blocks of a text do not depend on where its prompt ended, and what is kept of a conversation stays valid.
    With `block_length=1`, the result is the autoregressive model: attention is causal, and `generate()` writes what
    transformers' greedy `generate()` does. Of the generation configuration, only the special tokens are kept.

    Args:
        model (`PreTrainedModel`): a causal language model of the type llama, qwen2 or qwen3, in any dtype. It must not
            be quantized, which what transformers has loaded from a GGUF file is not any more. It is left as it is.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, which is left as it is.
        block_length (`int`, defaults to 32): tokens of a block, which see each other.
        mask_token (`str`, *optional*): the token that is to be `[MASK]`: a special token that means nothing to the
            model, or a new one. If unset: the tokenizer's own; or a new one, if the embedding has an unused row; or a
            special token without a role, which the chat template does not write; or a new one with a new row.

    Returns:
        The model, on the same device and in the same dtype, and the tokenizer, with its `mask_token`.

    Raises:
        ValueError: naming what cannot be converted, and why; for a `block_length` or `mask_token` that is not allowed.
    """
    if not isinstance(block_length, int) or isinstance(block_length, bool) or block_length < 1:
        raise ValueError(f"`block_length={block_length!r}` is not allowed: it must be an integer of at least 1.")
    config_class, model_class = _target_of(model)
    tokenizer = copy.deepcopy(tokenizer)
    vocab_size = model.config.vocab_size
    if len(tokenizer) > vocab_size:
        raise ValueError(f"`tokenizer` has {len(tokenizer)} tokens, but `model` has embeddings of only {vocab_size}.")
    mask_token_id = _set_mask_token(tokenizer, mask_token, vocab_size, _ids_with_a_role(model))
    fields = {name: getattr(model.config, name) for name in KEPT}
    if fields["pad_token_id"] is not None and fields["pad_token_id"] < 0:  # as old files say that there is none
        fields["pad_token_id"] = None
    fields |= {"mask_token_id": mask_token_id, "block_causal_length": block_length}
    if config_class is SDARConfig:
        fields |= {"head_dim": model.config.head_dim, "logits_shift": 1}
    result = model_class._from_config(config_class(**fields), dtype=model.dtype).to(model.device)
    _copy_weights(model, result)
    if mask_token_id >= vocab_size:
        result.resize_token_embeddings(mask_token_id + 1, mean_resizing=False)
    with torch.no_grad():
        for rows in {result.get_input_embeddings().weight, result.get_output_embeddings().weight}:
            if mask_token_id >= vocab_size or not rows[mask_token_id].any():  # a norm cannot begin with zeros
                rows[mask_token_id] = rows[:vocab_size].float().mean(dim=0).to(rows.dtype)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(model.generation_config, name, None)
        setattr(result.generation_config, name, getattr(result.config, name) if value is None else value)
    return result.train(model.training), tokenizer


def _target_of(model):
    """The classes of configuration and model that the model becomes."""
    if isinstance(model, PeftModel):
        raise ValueError("`model` is a PeftModel: merge its adapter first (`merge_and_unload()`).")
    config: PreTrainedConfig = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in TARGETS:
        raise ValueError(f"`model` is of the type {kind!r}, not one of {', '.join(TARGETS)}: it cannot be converted.")

    def refuse(part, why):
        raise ValueError(f"`model` cannot be converted: it has {part} ({why}), and the layers of {target} have not.")

    target = TARGETS[kind][1].__name__
    for name, part in UNKNOWN_PARTS.items():
        if value := getattr(config, name, None):
            refuse(part, f"`{name}={value!r}`")
    if config.hidden_act != "silu":
        refuse("another activation", f"`hidden_act={config.hidden_act!r}`")
    head_dim, expected = getattr(config, "head_dim", None), config.hidden_size // config.num_attention_heads
    if TARGETS[kind][0] is DreamConfig and head_dim not in (None, expected):
        refuse("heads of another width", f"`head_dim={head_dim}` where `hidden_size` over their number is {expected}")
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
        if (method := getattr(fields.get("quant_method"), "value", fields.get("quant_method"))) != "gguf":  # unpacked
            refuse("quantized weights", f"`quantization_config` with the method {method!r}")
    return TARGETS[kind]


def _copy_weights(model, result):
    found, wanted = model.state_dict(), result.state_dict()
    missing = {name for name in wanted.keys() - found.keys() if not ZERO_BIAS.fullmatch(name)}
    wrong = {name for name in found.keys() & wanted.keys() if found[name].shape != wanted[name].shape}
    if different := sorted(missing | wrong | (found.keys() - wanted.keys())):
        raise ValueError(f"`model` cannot be converted: its weights {different[:3]} are not those of its type.")
    zeros = {name: torch.zeros_like(wanted[name]) for name in wanted.keys() - found.keys()}
    result.load_state_dict({**found, **zeros})


def _ids_with_a_role(model) -> set[int]:
    """Tokens that the model's configurations name, as a second end-of-text."""
    found: set[int] = set()
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            found.update([value] if isinstance(value, int) else value or ())
    return found


def _set_mask_token(tokenizer, mask_token, vocab_size, ids_with_a_role) -> int:
    """Give the tokenizer a mask token. Returns its id."""
    own, names = tokenizer.mask_token, ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")
    roles = {token: name for name in reversed(names) if (token := getattr(tokenizer, name, None)) not in (None, own)}
    for id, token in tokenizer.added_tokens_decoder.items():
        if id in ids_with_a_role:
            roles.setdefault(str(token), "bos_token, eos_token or pad_token by the configuration of the model")
    special = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    template = str(tokenizer.chat_template or "")
    if mask_token is not None:
        if mask_token in roles:
            raise ValueError(f"`mask_token={mask_token!r}` is not allowed: it is the {roles[mask_token]}.")
        if mask_token in tokenizer.get_vocab() and mask_token not in special:
            raise ValueError(f"`mask_token={mask_token!r}` is not allowed: it is a part of text, and not special.")
        if mask_token in special and mask_token in template:
            raise ValueError(f"`mask_token={mask_token!r}` is not allowed: the chat template writes it.")
    elif own is not None and own not in roles:
        mask_token = own
    else:
        free = [token for token in special if token not in roles and token not in template]
        free.sort(key=lambda token: RESERVED.search(token) is None)  # stable: else by id
        mask_token = MASK_TOKEN if len(tokenizer) < vocab_size or not free else free[0]
    tokenizer.add_special_tokens({"mask_token": mask_token})
    logger.info(f"[MASK] is {mask_token!r}, id {tokenizer.mask_token_id}.")
    return tokenizer.mask_token_id
