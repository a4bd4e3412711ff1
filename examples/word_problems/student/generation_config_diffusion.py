# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""What `generate()` can be told: the fields of diffusion decoding, the standard ones that are honoured, and what is
refused by name."""

import math
import numbers
from typing import Any, NoReturn

from transformers import GenerationConfig, PreTrainedConfig

from .unmasking import POLICIES, SCHEDULES, Policy

DEFAULTS: dict[str, Any] = {
    "block_length": 32,
    "unmasking": "confidence_threshold",
    "schedule": "even",
    "eps": 1e-3,
    "unmasking_temperature": 0.0,
    "block_cache": "none",
    "cache_refresh": "full",
    "stop_at_eos": True,
}
DEFAULT_MAX_NEW_TOKENS = 256
BLOCK_CACHES = ("none", "prefix", "dual", "exact")
CACHE_REFRESHES = ("full", "previous_block")
# What the distribution is shaped by from which a token is drawn.
SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# The fields of transformers' GenerationConfig that decoding honours. Any other that is set is refused, whatever a
# version of transformers adds.
HONOURED_FIELDS = (
    "max_new_tokens", "max_length", "min_new_tokens", "max_time", "stop_strings", "do_sample", *SAMPLING_FIELDS,
    "repetition_penalty", "bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens",
    "forced_eos_token_id", "exponential_decay_length_penalty", "remove_invalid_values", "renormalize_logits",
    "num_return_sequences", "return_dict_in_generate", "disable_compile", "pad_token_id", "bos_token_id",
    "eos_token_id",
)  # fmt: skip
# Taken without effect: files have them, and callers that know nothing of diffusion pass them.
NEUTRAL_FIELDS = ("use_cache", "transformers_version", "_from_model_config")
# Policies by the names of other projects (LLaDA, Dream, SDAR), and by ours.
OTHER_POLICIES = {
    "low_confidence": "confidence", "maskgit_plus": "confidence", "topk_margin": "margin", "origin": "random",
    "low_confidence_static": "confidence", "low_confidence_dynamic": "confidence_threshold", "sequential": "leftmost",
}  # fmt: skip
# Arguments of other projects' decoding loops (LLaDA, Fast-dLLM, Dream, SDAR), and what to say here.
OTHER_NAMES = {
    "gen_length": "`max_new_tokens`",
    "max_gen_toks": "`max_new_tokens`",
    "max_tokens": "`max_new_tokens`",
    "batch_size": "`max_batch_size`, of `generate_batch()` and `generate_each()`",
    "remasking": '`unmasking`: "low_confidence" is unmasking="confidence", and "random" is unmasking="random"',
    "remasking_strategy": '`unmasking`: "low_confidence_static" is "confidence", "low_confidence_dynamic" is '
    '"confidence_threshold", "sequential" is "leftmost"; "entropy_bounded" is no policy here',
    "alg": '`unmasking`, with schedule="linear_time": "maskgit_plus" is unmasking="confidence", "topk_margin" is '
    'unmasking="margin", "entropy" is unmasking="entropy"; and "origin" is unmasking="random" with '
    'schedule="ancestral"',
    "alg_temp": "`unmasking_temperature`",
    "factor": '`threshold`, with unmasking="confidence_factor"',
    "confidence_threshold": '`threshold`, with unmasking="confidence_threshold"',
    "entropy_threshold": '`threshold`, with unmasking="entropy_threshold"',
    "eb_threshold": '`threshold`, with unmasking="entropy_bound"',
    "denoising_steps": "`steps_per_block`",
    "mask_id": "`mask_token_id`",
    "block_size": "`block_length`",
    "small_block_size": "`block_length`",
    "dual_cache": 'block_cache="dual"',
    "early_stop": "`stop_at_eos`",
    "logits_eos_inf": "suppress_tokens=[the id of the end-of-text]",
    "confidence_eos_eot_inf": "suppress_tokens=[the id of the end-of-text]",
    "output_history": "return_dict_in_generate=True; `unmasking_step` of the output is the pass that wrote each token",
    "generation_tokens_hook_func": "`streamer`, with a method `put_draft`, to watch the canvas",
    "generation_logits_hook_func": "`logits_processor`, to change logits",
    "prefix_allowed_tokens_fn": "logits_processor=[PrefixConstrainedLogitsProcessor(...)], with block_length=1",
    "cfg_scale": None,
    "negative_prompt_ids": None,
    "negative_prompt_attention_mask": None,
}


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Raises `ValueError` unless the condition on the argument of this name holds."""
    if not condition:
        raise ValueError(f"`{name}={value!r}` is not allowed: it must be {allowed}.")


def is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)


def _is_int(value, low):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= low


def _is_token(value, vocab_size):
    return _is_int(value, 0) and value < vocab_size


def refuse_argument(name: str) -> NoReturn:
    """Raises `ValueError` for an argument that `generate()` does not have: with the one that it has in its place, if
    the name is another project's."""
    if name in OTHER_NAMES:
        instead = OTHER_NAMES[name]
        raise ValueError(
            f"`{name}` is not supported: decoding has no guidance."
            if instead is None
            else f"`{name}` is not an argument here: it must be {instead}."
        )
    raise ValueError(
        f"`{name}` is not an argument of `generate()` for diffusion models (a typo, or an argument for autoregressive "
        f"decoding): besides the fields of DiffusionGenerationConfig, `input_ids` and `attention_mask` are allowed."
    )


class DiffusionGenerationConfig(GenerationConfig):
    """`GenerationConfig` with the fields of diffusion decoding, saved in `generation_config.json`.

    As everywhere in transformers, a field that is `None` here takes the value of the checkpoint's own configuration,
    and the default where that has none.

    Args:
        block_length (`int`, defaults to 32): tokens per block, at least 1. The last block may be shorter. A
            block-causal model's own length, which is the default there, and no other.
        unmasking (`str`, defaults to `"confidence_threshold"`): the policy. A thresholded policy writes every token
            that is certain enough: `"confidence_threshold"`, `"confidence_factor"` (both Fast-dLLM,
            https://arxiv.org/abs/2505.22618), `"entropy_threshold"` (dParallel, https://arxiv.org/abs/2509.26488),
            `"entropy_bound"` (EB sampler, https://arxiv.org/abs/2505.24857), `"learned_filter"` (Learn2PD,
            https://arxiv.org/abs/2509.25188). A scheduled policy writes a number of tokens in each pass that is fixed
            before: `"confidence"` and `"random"` (LLaDA, https://arxiv.org/abs/2502.09992), `"entropy"` and `"margin"`
            (Dream, https://arxiv.org/abs/2508.15487), `"leftmost"` (SDAR, https://arxiv.org/abs/2510.06303). Their
            formulas: `unmasking.py`.
        threshold (`float`): of a thresholded policy; defaults to 0.9 (a probability), 1.0 (a factor above 0), 0.5 and
            0.1 (entropies in nats), 0.96 (a probability), in the order above. Naming another policy than the
            checkpoint's without a threshold takes that policy's default, not the checkpoint's number.
        steps (`int`, defaults to `max_new_tokens`): forward passes of a scheduled policy in all, split as evenly as
            possible over the blocks, the first blocks getting more, at least one each. In a block-causal model, where
            blocks may be of unequal length, a block gets its share.
        steps_per_block (`int`, *optional*): forward passes for a block, in place of `steps`: SDAR's `denoising_steps`.
            Each pass writes an equal part of `block_length` tokens, so a block that begins with the end of the prompt
            takes fewer. With `"confidence_threshold"`, each pass writes at least that part.
        schedule (`str`, defaults to `"even"`): how a scheduled policy spreads a block's tokens over its steps:
            `"linear_time"` is Dream's, `"ancestral"` the same with each position's fate drawn.
        eps (`float`, defaults to 1e-3): where the time of those two ends, in (0, 1).
        unmasking_temperature (`float`, defaults to 0): above 0, a scheduled policy draws the positions in proportion
            to softmax(certainty / unmasking_temperature) instead of taking the surest (Dream's `alg_temp`).
        block_cache (`str`, defaults to `"none"`): `"none"` recomputes the whole canvas in every pass, which is exact.
            `"prefix"` computes the block and what is behind it anew, `"dual"` the block alone; keys and values of the
            rest are those of an earlier pass (Fast-dLLM). `"exact"`, the default and for block-causal models alone,
            computes the block alone, too, and in its first pass the one before, whose keys and values are final then:
            the result is that of `"none"`.
        cache_refresh (`str`, defaults to `"full"`): what the first pass of a block computes anew with a cache: the
            whole canvas, or, with `"previous_block"`, the block just finished along with what the others do.
        cache_refresh_interval (`int`, *optional*): with a cache, every how many passes of a block compute the whole
            canvas, its first included; 1 is exact. None: the first alone.
        stop_at_eos (`bool`, defaults to `True`): a row ends once an end-of-text (any of `eos_token_id`) stands with
            nothing masked before it, and everything behind it becomes padding.
        eos_threshold (`float`, *optional*): End-of-Text Prediction (Learn2PD): an end-of-text in the block that is
            written, or predicted with at least this probability, is taken as the end at once, and everything behind it
            leaves the computation. In [0, 1]; needs `stop_at_eos`. It mostly saves passes, but may cost some: what is
            written before the end must then fit an end that was taken early, and the model no longer sees the masks
            behind it, so that one which was trained on canvases of one length becomes less certain (of 64 answers of
            the distilled model of `examples/word_problems`, 9 took 1 to 4 passes more, and 5 became wrong; of its
            teacher, none took more, and 2 became wrong).
        mask_token_id (`int`, *optional*): `[MASK]`; defaults to that of the model's configuration.
        kwargs: the standard fields that are honoured, `HONOURED_FIELDS`. `max_new_tokens` defaults to 256.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    def __init__(self, **kwargs: Any):
        # A flag that transformers saves in the file and that makes it drop every field it does not know.
        kwargs.pop("_from_model_config", None)
        if kwargs.get("temperature") == 0 and not kwargs.get("do_sample"):
            kwargs["temperature"] = None  # as the official Dream code saves it: another way to say greedy
        self.block_length = kwargs.pop("block_length", None)
        self.unmasking = kwargs.pop("unmasking", None)
        self.threshold = kwargs.pop("threshold", None)
        self.steps = kwargs.pop("steps", None)
        self.steps_per_block = kwargs.pop("steps_per_block", None)
        self.schedule = kwargs.pop("schedule", None)
        self.eps = kwargs.pop("eps", None)
        self.unmasking_temperature = kwargs.pop("unmasking_temperature", None)
        self.block_cache = kwargs.pop("block_cache", None)
        self.cache_refresh = kwargs.pop("cache_refresh", None)
        self.cache_refresh_interval = kwargs.pop("cache_refresh_interval", None)
        self.stop_at_eos = kwargs.pop("stop_at_eos", None)
        self.eos_threshold = kwargs.pop("eos_threshold", None)
        self.mask_token_id = kwargs.pop("mask_token_id", None)
        super().__init__(**kwargs)

    @classmethod
    def from_model_config(cls, model_config: PreTrainedConfig) -> "DiffusionGenerationConfig":
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        return cls(**{name: getattr(model_config, name, None) for name in ids})

    @staticmethod
    def _get_default_generation_params():
        params = GenerationConfig._get_default_generation_params()
        del params["max_length"]  # 20 tokens are no answer; see DEFAULT_MAX_NEW_TOKENS
        return params

    def to_diff_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_diff_dict().items() if value is not None}

    def ignored(self) -> dict[str, str]:
        """Settings of policies and caches that have no effect beside the others: name -> why."""
        unmasking = self.unmasking or DEFAULTS["unmasking"]
        is_scheduled, is_cached = POLICIES[unmasking].is_scheduled, self.block_cache not in (None, "none")
        by_policy = f"`unmasking={unmasking!r}` goes by `{'steps' if is_scheduled else 'threshold'}`"
        no_cache = "`block_cache='none'` keeps nothing"
        table = (
            ("threshold", is_scheduled and self.threshold is not None, by_policy),
            ("steps", not is_scheduled and self.steps is not None, by_policy),
            ("steps", is_scheduled and None not in (self.steps, self.steps_per_block), "`steps_per_block` is set"),
            (
                "steps_per_block",
                not is_scheduled and not POLICIES[unmasking].takes_count and self.steps_per_block is not None,
                by_policy,
            ),
            ("unmasking_temperature", not is_scheduled and bool(self.unmasking_temperature), by_policy),
            ("schedule", not is_scheduled and self.schedule not in (None, "even"), by_policy),
            ("cache_refresh", not is_cached and self.cache_refresh not in (None, "full"), no_cache),
            ("cache_refresh_interval", not is_cached and self.cache_refresh_interval is not None, no_cache),
        )
        return {name: why for name, is_ignored, why in table if is_ignored}

    def validate(self, *args: Any, **kwargs: Any) -> None:
        positive = (
            "block_length",
            "steps",
            "steps_per_block",
            "max_new_tokens",
            "num_return_sequences",
            "cache_refresh_interval",
        )
        for name, low in (
            *((name, 1) for name in positive), ("mask_token_id", 0), ("top_k", 0), ("min_new_tokens", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            require(value is None or _is_int(value, low), name, value, f"an integer of at least {low}")
        super().validate(*args, **kwargs)
        choices: dict[str, Any] = {"unmasking": POLICIES, "schedule": SCHEDULES, "block_cache": BLOCK_CACHES}
        flags = ("stop_at_eos", "do_sample", "return_dict_in_generate", "disable_compile")
        choices |= {"cache_refresh": CACHE_REFRESHES} | dict.fromkeys(flags, (True, False))
        if isinstance(self.unmasking, str) and self.unmasking in OTHER_POLICIES:
            allowed = f"{OTHER_POLICIES[self.unmasking]!r}, as that policy is called here"
            require(False, "unmasking", self.unmasking, allowed)
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(value is None or value in tuple(allowed), name, value, f"one of {', '.join(map(repr, allowed))}")
        if self.unmasking is not None and not isinstance(POLICIES[self.unmasking], Policy):
            raise ValueError(
                f"`POLICIES[{self.unmasking!r}]` is a {type(POLICIES[self.unmasking]).__name__}: it must be a "
                f"`Policy`, with the function and, if that takes a `threshold`, a default for it."
            )
        for name in ("temperature", "unmasking_temperature", "max_time"):
            value = getattr(self, name)
            ok = value is None or (is_number(value) and 0.0 <= value < math.inf)
            require(ok, name, value, "a finite number of at least 0")
        for name in ("top_p", "eos_threshold", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            value = getattr(self, name)
            ok = value is None or (is_number(value) and 0.0 <= value <= 1.0)
            require(ok, name, value, "a number from 0 to 1")
        value = self.repetition_penalty
        ok = value is None or (is_number(value) and 0.0 < value < math.inf)
        require(ok, "repetition_penalty", value, "a finite number above 0")
        ok = self.eps is None or (is_number(self.eps) and 0.0 < self.eps < 1.0)
        require(ok, "eps", self.eps, "a number between 0 and 1")
        if self.threshold is not None:
            # Without a policy, the checkpoint's decides, and this is looked at again when that is known.
            policy = POLICIES[self.unmasking] if self.unmasking else None
            ok = is_number(self.threshold) and (policy.allows(self.threshold) if policy else self.threshold >= 0)
            allowed = f"{policy.range} for `unmasking={self.unmasking!r}`" if policy else "of at least 0"
            require(ok, "threshold", self.threshold, f"a number {allowed}")
        if self.cache_refresh_interval is not None and self.cache_refresh == "previous_block":
            raise ValueError(
                f"`cache_refresh_interval={self.cache_refresh_interval!r}` refreshes the whole canvas: it needs "
                f"`cache_refresh='full'`, but that is 'previous_block'."
            )
        if self.eos_threshold is not None and self.stop_at_eos is False:
            raise ValueError(f"`eos_threshold={self.eos_threshold!r}` needs `stop_at_eos=True`, but it is False.")
        if self.steps_per_block is not None and self.schedule not in (None, "even"):
            raise ValueError(
                f"`steps_per_block={self.steps_per_block!r}` needs `schedule='even'`, not {self.schedule!r}."
            )
        if self.do_sample and self.temperature == 0:
            raise ValueError("`temperature=0` cannot be sampled: it must be above 0, or leave out `do_sample`.")

    def check(self, vocab_size: int, block_causal_length: int | None = None) -> None:
        """Refuse what diffusion decoding cannot do with a model of this vocabulary and attention.

        Raises:
            ValueError: for a standard field that is set and not honoured, words of several tokens that are to be
                avoided or preferred, and ids that are none.
        """
        if block_causal_length is not None:
            allowed = f"{block_causal_length}, the length of the blocks that this model attends by"
            require(self.block_length == block_causal_length, "block_length", self.block_length, allowed)
            require(self.block_cache in ("none", "exact"), "block_cache", self.block_cache, "'exact' or 'none' for a "
                    "block-causal model, whose cache is no approximation")  # fmt: skip
        else:
            allowed = "'none', 'prefix' or 'dual': 'exact' is for block-causal models"
            require(self.block_cache != "exact", "block_cache", self.block_cache, allowed)
        neutral = GenerationConfig._get_default_generation_params() | {"guidance_scale": 1}
        for name in GenerationConfig().to_dict().keys() - {*HONOURED_FIELDS, *NEUTRAL_FIELDS}:
            value = getattr(self, name, None)
            if value not in (None, False, neutral.get(name)):
                raise ValueError(
                    f"`{name}={value!r}` is for autoregressive decoding, or not supported in diffusion decoding: it "
                    f"must be left out (or {neutral.get(name)!r}). Supported are {', '.join(HONOURED_FIELDS)}."
                )
        biases = self.sequence_bias or []  # a dict or a list of pairs
        biased = [*biases] if isinstance(biases, dict) else [ids for ids, _ in biases]
        if any(len(ids) > 1 for ids in [*(self.bad_words_ids or []), *biased]):
            raise ValueError(
                "`bad_words_ids` and `sequence_bias` are allowed for single tokens only: of a longer one, the tokens "
                "before may still be undecided."
            )
        allowed, mask_token_id = f"an id of the vocabulary, 0 to {vocab_size - 1}", self.mask_token_id
        require(mask_token_id is not None, "mask_token_id", None, f"set, to {allowed}")
        for name in ("mask_token_id", "pad_token_id"):
            value = getattr(self, name)
            require(value is None or _is_token(value, vocab_size), name, value, allowed)
        for value in self.eos_token_id if isinstance(self.eos_token_id, (list, tuple)) else [self.eos_token_id]:
            ok = value is None or (_is_token(value, vocab_size) and value != mask_token_id)
            wanted = f"{allowed}, other than `mask_token_id`, or a list of those"
            require(ok, "eos_token_id", self.eos_token_id, wanted)
        ok = self.pad_token_id != mask_token_id
        require(ok, "pad_token_id", self.pad_token_id, "another id than `mask_token_id`")
        for name in ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id"):
            value = getattr(self, name)
            listed = value if isinstance(value, (list, tuple)) or value is None else [value]
            ok = all(_is_token(each, vocab_size) for each in listed or ())
            require(ok, name, value, f"a list of ids of the vocabulary, 0 to {vocab_size - 1}")
        ok = self.eos_threshold is None or self.eos_token_id not in (None, [], ())
        require(ok, "eos_threshold", self.eos_threshold, "None where no `eos_token_id` is known")
