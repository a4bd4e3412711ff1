"""From an adapter to a plain checkpoint that anybody loads."""

import copy
import json
import shutil
from pathlib import Path

from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file

import dparallel.modeling  # noqa: F401  (registers the model families with AutoModelForCausalLM)

from .model_cards import TRAINING_FILE


def merge_adapter(
    adapter, output_dir, tokenizer=None, *, base_model=None, model_init_kwargs=None, **generation_settings
):
    """Merge an adapter into its base model and save the result: weights, remote code, tokenizer, and a
    `generation_config.json` with the policy and threshold that the model was distilled for.

        merge_adapter("out", "merged", unmasking="entropy_threshold", threshold=0.5)

    Args:
        adapter (`PeftModel`, `str` or `Path`): the trained model, whose adapter is merged in place, or a folder or Hub
            id of an adapter, whose base model is then loaded.
        output_dir (`str` or `Path`): where the checkpoint goes.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): defaults to the adapter's, or else to the base model's.
        base_model (`str`, *optional*): folder or Hub id of the base model, if it is not where the adapter says.
        model_init_kwargs (`dict`, *optional*): of `from_pretrained` for the base model; `dtype="auto"` by default.
        generation_settings: fields of `DiffusionGenerationConfig`; by default what the folder's `training.json` says
            that the adapter was distilled for.

    Returns:
        `PreTrainedModel`: the merged model.

    Raises:
        ValueError: if there is no adapter, if it is one that cannot be merged, or for wrong generation settings.
    """
    if isinstance(adapter, PreTrainedModel):
        raise ValueError(f"`adapter` is a {type(adapter).__name__} without an adapter: save_pretrained() is enough.")
    source = None
    if not isinstance(adapter, PeftModel):
        source = str(adapter)
        base_model = base_model or PeftConfig.from_pretrained(source).base_model_name_or_path
        base = AutoModelForCausalLM.from_pretrained(base_model, **{"dtype": "auto", **(model_init_kwargs or {})})
        adapter = PeftModel.from_pretrained(base, source)
    config = adapter.active_peft_config
    if not hasattr(adapter.base_model, "merge_and_unload") or config.is_prompt_learning:
        raise ValueError(f"`adapter` is of type {config.peft_type.value}, which has no weights to merge.")
    if source is not None and not generation_settings:
        generation_settings = decoding_of(source)
    # Before the merge, so that a wrong setting leaves the model as it was.
    generation_config = copy.deepcopy(adapter.generation_config)
    if generation_settings.get("unmasking", generation_config.unmasking) != generation_config.unmasking:
        generation_settings = {"threshold": None, "steps": None, **generation_settings}  # not the other policy's
    unknown = generation_config.update(**generation_settings)
    if unknown:
        raise ValueError(f"{sorted(unknown)} are no fields of {type(generation_config).__name__}.")
    if tokenizer is None:
        has_own = source is not None and (Path(source) / "tokenizer_config.json").exists()
        tokenizer = AutoTokenizer.from_pretrained(source if has_own else base_model or config.base_model_name_or_path)
    model = adapter.merge_and_unload(safe_merge=True)
    model.generation_config = generation_config
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    if source is not None and (Path(source) / TRAINING_FILE).exists():
        shutil.copy(Path(source) / TRAINING_FILE, output_dir)  # for its card
    return model


def decoding_of(source) -> dict:
    """The arguments of `generate()` that an adapter or a model, a folder or Hub id, was distilled for; {} if its
    `training.json` does not say."""
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(str(source), TRAINING_FILE, **missing)
    return {} if path is None else json.loads(Path(path).read_text()).get("decoding") or {}
