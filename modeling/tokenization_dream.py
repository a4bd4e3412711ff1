# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""The tokenizer of the official Dream repositories is Qwen2's, behind code of their own under this name."""

from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, Qwen2Tokenizer


class DreamTokenizer(Qwen2Tokenizer):
    """Stands in for the class of this name in the official repositories. What it loads is a plain `Qwen2Tokenizer`, so
    a folder that is saved with it loads without this package and without any code of its own."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Qwen2Tokenizer:
        kwargs.pop("trust_remote_code", None)
        tokenizer = Qwen2Tokenizer.from_pretrained(*args, **kwargs)
        tokenizer.init_kwargs.pop("auto_map", None)  # it names the official code
        return tokenizer


class StandIn(PreTrainedConfig):
    """A configuration that no model has: transformers prefers a registered class to a repository's own code only as
    long as the model's configuration is registered with none."""

    model_type = "dream-tokenizer"


AutoTokenizer.register(StandIn, DreamTokenizer)
