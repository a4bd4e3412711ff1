# SPDX-License-Identifier: Apache-2.0; dparallel 0.2.0
"""Learn2PD's filter: a small network that reads how certain a model is at each position of a block, and says which of
its predictions are final already ("Learning to Parallel", https://arxiv.org/abs/2509.25188).

It is a model of its own, saved beside the one that it was trained for, in the folder `unmasking_filter`, or alone.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SUBFOLDER = "unmasking_filter"
STATISTICS = ("confidence", "entropy", "margin")  # of TokenStatistics
FILLING = {"confidence": 1.0, "margin": 1.0, "log_odds": 1.0}  # where a short block ends: decided, certain; else 0
FEATURES = (*STATISTICS, "log_odds", "masked", "position", "punctuation", "digit")
MAX_LOG_ODDS = 10.0


class UnmaskingFilterConfig(PreTrainedConfig):
    """Shape of a filter. The defaults are the published one: 2,112 parameters.

    Args:
        block_length (`int`, defaults to 32): positions that it reads, those of a block. Shorter last blocks are filled
            up with positions that are decided.
        hidden_size (`int`, *optional*): width; `block_length` if unset.
        num_layers (`int`, defaults to 2): linear layers, with a ReLU between them.
        features (list of `str`, defaults to `["confidence"]`): what it reads of each position: `"confidence"`,
            `"entropy"`, `"margin"` (see `TokenStatistics`), `"log_odds"` (of the confidence c: log(c / (1 - c)), from
            -10 to 10, over 10; it tells 0.99 from 0.9999), `"masked"` (is it still to be written?), `"position"` (its
            place in the block, from 0 to 1), `"punctuation"` and `"digit"` (is the predicted token one?).
        vocab_size (`int`, *optional*): of the model, for the last two.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    model_type = "unmasking_filter"

    block_length: int = 32
    hidden_size: int | None = None
    num_layers: int = 2
    features: list[str] | tuple[str, ...] = ("confidence",)
    vocab_size: int | None = None

    def __post_init__(self, **kwargs):
        self.features = list(self.features)
        if self.hidden_size is None:
            self.hidden_size = self.block_length
        for name in ("block_length", "hidden_size", "num_layers"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"`{name}={getattr(self, name)!r}` is not allowed: it must be an integer above 0.")
        if not self.features or set(self.features) - set(FEATURES) or len(set(self.features)) < len(self.features):
            raise ValueError(f"`features={self.features!r}` is not allowed: it must be some of {list(FEATURES)}.")
        if self.reads_tokens and self.vocab_size is None:
            raise ValueError(f"`vocab_size=None` is not allowed: `features={self.features!r}` look tokens up.")
        if type(self) is UnmaskingFilterConfig:
            kwargs["auto_map"] = {
                "AutoConfig": "unmasking_filter.UnmaskingFilterConfig",
                "AutoModel": "unmasking_filter.UnmaskingFilter",
            }
        super().__post_init__(**kwargs)

    @property
    def reads_tokens(self) -> bool:
        return bool({"punctuation", "digit"} & set(self.features))


class UnmaskingFilter(PreTrainedModel):
    """Says for each position of a block whether the model's current prediction there is what it will be in the end.
    Works in float32."""

    config_class = UnmaskingFilterConfig
    main_input_name = "confidence"

    def __init__(self, config: UnmaskingFilterConfig):
        super().__init__(config)
        sizes = [len(config.features) * config.block_length, *[config.hidden_size] * (config.num_layers - 1)]
        layers = []
        for inputs, outputs in zip(sizes, [*sizes[1:], config.block_length], strict=True):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])
        if config.reads_tokens:  # 1 where a token is one of these
            self.register_buffer("punctuation", torch.zeros(config.vocab_size))
            self.register_buffer("digit", torch.zeros(config.vocab_size))
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5)
            nn.init.zeros_(module.bias)

    def read_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> "UnmaskingFilter":
        """Learn from a tokenizer which tokens are punctuation and which are digits. Returns the filter."""
        for token in range(min(len(tokenizer), self.config.vocab_size or 0)):
            text = tokenizer.decode([token]).strip()
            self.digit[token] = float(text.isdigit())
            self.punctuation[token] = float(bool(text) and not any(map(str.isalnum, text)))
        return self

    def forward(
        self,
        confidence: torch.Tensor,
        entropy: torch.Tensor | None = None,
        margin: torch.Tensor | None = None,
        masked: torch.Tensor | None = None,
        token: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        exists: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The logits of "is final".

        Args:
            confidence, entropy, margin (`torch.FloatTensor` of shape `(B, K)`), token (`torch.LongTensor`, the same
                shape): see `TokenStatistics`; masked (`torch.BoolTensor`, the same shape): is it still to be written?
                Only those among the features are needed. K is `block_length` or less.
            labels (`torch.FloatTensor` of shape `(B, K)`, *optional*): is it final? Asks for the loss, the mean binary
                cross-entropy over masked positions; those that are written are final, and not asked for.
            exists (`torch.BoolTensor` of shape `(B, K)`, *optional*): which positions a row has, if not all.

        Returns:
            dict with `logits` (B, K), and `loss` if there are labels.
        """
        length, width = confidence.shape[1], self.config.block_length
        if length > width:
            raise ValueError(f"`block_length={length}` is not allowed: this filter reads blocks of up to {width}.")
        place = torch.arange(length, device=confidence.device) / width
        found = {"confidence": confidence, "entropy": entropy, "margin": margin, "masked": masked}
        found["position"] = place.expand_as(confidence)
        found["log_odds"] = torch.logit(confidence.float()).clamp(-MAX_LOG_ODDS, MAX_LOG_ODDS) / MAX_LOG_ODDS
        if self.config.reads_tokens:
            found |= {name: getattr(self, name)[token] for name in ("punctuation", "digit")}
        columns = []
        for name in self.config.features:
            filling, column = FILLING.get(name, 0.0), found[name].float()
            if exists is not None:
                column = torch.where(exists, column, filling)
            columns.append(nn.functional.pad(column, (0, width - length), value=filling))
        logits = self.layers(torch.cat(columns, dim=1))[:, :length]
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
        return {"loss": (loss * masked).sum() / masked.sum().clamp(min=1), "logits": logits}  # type: ignore[union-attr]

    @torch.no_grad()
    def finality(self, statistics: Any, masked: torch.Tensor, exists: torch.Tensor | None = None) -> torch.Tensor:
        """Probability (B, K) that each prediction is final. `masked` and `exists` are (B, K) bool: positions that do
        not exist, behind a block that is shorter than others, are decided."""
        arguments = {name: getattr(statistics, name) for name in (*STATISTICS, "token")}
        return self(**arguments, masked=masked, exists=exists)["logits"].sigmoid()


UnmaskingFilterConfig.register_for_auto_class()
UnmaskingFilter.register_for_auto_class("AutoModel")
