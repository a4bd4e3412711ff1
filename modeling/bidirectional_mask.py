"""The mask of attention that looks both ways, made once for all layers of a pass."""

import torch
from transformers.masking_utils import create_bidirectional_mask


def bidirectional_mask(config, hidden_states, attention_mask=None, past_key_values=None):
    """What the attention implementation of `config` takes for keys that nothing may attend to.

    Args:
        config (`PreTrainedConfig`): of the model.
        hidden_states (`torch.Tensor` of shape `(B, Q, D)`): input of the first layer.
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 at these keys. None if there are none: a mask
            is not searched for zeros, since that would be a wait for the device in every pass.
        past_key_values (`Cache`, *optional*): tells how many keys there are.
    """
    if attention_mask is None:
        return None
    # transformers is renaming `past_key_values`: where it is handed on, it goes by its place.
    mask = create_bidirectional_mask(
        config, hidden_states, attention_mask, None, past_key_values, allow_is_bidirectional_skip=False
    )
    if config._attn_implementation == "sdpa" and attention_mask.ndim == 2:
        # Each layer would make this of a bool mask. It is the same for all queries.
        mask = torch.where(mask[:, :, :1], 0.0, torch.finfo(hidden_states.dtype).min).to(hidden_states.dtype)
        mask = mask.expand(-1, -1, hidden_states.shape[1], -1)
    return mask
