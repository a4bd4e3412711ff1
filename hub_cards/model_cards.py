"""A model's card, filled from what its folder says of it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from safetensors import safe_open
from transformers.utils import logging

from dparallel.modeling import POLICIES

from .card_metadata import as_list, check_card_metadata
from .hub_ids import is_hub_id
from .measurements import RESULTS_FILE, eval_results, load_measurements
from .model_families import FAMILIES, Paper, family_of
from .requirements import PACKAGE, from_sources, install_command, needs_python

logger = logging.get_logger(__name__)

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
TRAINING_FILE = "training.json"  # what trainers leave beside their models
TAGS = ["diffusion", "dllm", "dparallel"]
DECODING_FIELDS = (
    "unmasking", "threshold", "steps", "steps_per_block", "schedule", "block_length", "max_new_tokens", "block_cache",
    "cache_refresh", "cache_refresh_interval", "stop_at_eos", "eos_threshold",
)  # fmt: skip
LIMITATIONS = (
    "It makes mistakes that look right, and was not checked for safety.",
    "Numbers above hold for the decoding settings beside them. A looser threshold is faster and less accurate, and "
    "caches are approximations: measure on your own task.",
)
PAPERS = {
    "dparallel": Paper(
        "dParallel: Learnable Parallel Decoding for dLLMs", "2509.26488",
        "Chen, Zigeng and Fang, Gongfan and Ma, Xinyin and Yu, Ruonan and Wang, Xinchao",
    ),
    **{name: family.paper for name, family in FAMILIES.items()},
    "learn2pd": Paper(
        "Learning to Parallel: Accelerating Diffusion Large Language Models via Learnable Parallel Decoding",
        "2509.25188", "Bao, Wenrui and Chen, Zhiben and Xu, Dan and Shang, Yuzhang",
    ),
}  # fmt: skip


def model_card(
    folder: str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    datasets: str | list[str] | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    limitations: str | Sequence[str] = (),
    prompt: str | None = None,
    printed: str | None = None,
    printed_on: str | None = None,
) -> ModelCard:
    """The card of a model, or of an adapter, that lies in a folder.

    Everything is read there: `config.json`, `generation_config.json`, the sizes of the weights, `training.json` (which
    trainers and `merge_adapter` leave) and `results.json` (see `measurements`). A card claims no number that is not in
    the last one.

    Args:
        folder (`str` or `Path`): as `save_pretrained` leaves it.
        repo_id (`str`): where it is going, "user/name".
        base_model (`str`, *optional*): Hub id; by default what the training or the adapter says, if that is one.
        datasets (`str` or list of `str`, *optional*): Hub ids; by default what the training says.
        license (`str`, *optional*): one of the Hub's identifiers, "apache-2.0"; by default the base model's, if it can
            be found.
        language (`str` or list of `str`, *optional*): ISO 639 codes, "en".
        limitations (`str` or list of `str`): in addition to what holds for all such models.
        prompt (`str`, *optional*), printed (`str`, *optional*), printed_on (`str`, *optional*): of the usage snippet:
            the question in it, and what it printed, and where.

    Raises:
        ValueError: for a folder that holds no model, results that cannot be read, or what the Hub does not take as
            `base_model`, `datasets`, `license` or `language`.
    """
    check_card_metadata(license=license, language=language, base_model=base_model, datasets=datasets)
    folder = Path(folder)
    is_adapter = (folder / "adapter_config.json").exists()
    config = _read(folder / "config.json")
    if not is_adapter and not config:
        raise ValueError(f"`folder={str(folder)!r}` must hold a model or an adapter, with its configuration.")
    training, adapter = _read(folder / TRAINING_FILE), _read(folder / "adapter_config.json")
    stated = base_model or training.get("base_model") or adapter.get("base_model_name_or_path")
    base_model = stated if is_hub_id(stated) else None
    family = config.get("model_type") or training.get("model_type")
    has_results = (folder / RESULTS_FILE).exists()
    measurements = load_measurements(folder / RESULTS_FILE) if has_results else []
    unmasking_filter = _filter_of(folder)
    remote_code = sorted(path.name for path in folder.glob("*.py"))
    license = license or _license_of(base_model)
    datasets = as_list(datasets) or training.get("datasets", [])
    count = _count_parameters(folder)
    generation = _read(folder / "generation_config.json")
    known = family_of(family)
    papers = ["dparallel", *([family] if known else []), *(["learn2pd"] if unmasking_filter else [])]
    data = ModelCardData(
        model_name=repo_id.split("/")[-1],
        base_model=base_model,
        base_model_relation=("adapter" if is_adapter else "finetune") if base_model else None,
        datasets=datasets or None,
        eval_results=eval_results(measurements) or None,
        language=language,
        library_name="peft" if is_adapter else "transformers",
        license=license,
        pipeline_tag="text-generation",
        tags=[*TAGS, *([family.lower()] if family else []), *(["custom_code"] if remote_code else [])],
    )
    method = training.get("method")
    origin = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else _name(stated)
    source = f" from {origin}" if origin else ""
    what = f"A model made{source} by {method}." if method else f"A masked diffusion language model{source}."
    inherited = f"What holds for {origin} holds for this model, too." if origin else None
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=repo_id.split("/")[-1],
        what=what,
        architecture=known.architecture if known else family or "its base model's architecture",
        parameters=_in_words(count),
        is_adapter=is_adapter,
        python=needs_python(),
        sources=from_sources() if is_adapter else None,
        install=install_command(
            *((PACKAGE, "peft") if is_adapter else ("torch", "transformers")),
            *(["accelerate"] if _is_placed(folder) else []),
        ),
        snippet=usage_snippet(folder, repo_id, prompt),
        printed=printed,
        printed_on=printed_on,
        remote_code=[f"`{name}`" for name in remote_code],
        decoding={name: f"`{generation[name]!r}`" for name in DECODING_FIELDS if name in generation},
        unmasking_filter=unmasking_filter,
        measurements=measurements,
        training=training,
        data=[f"[{each}](https://huggingface.co/datasets/{each})" for each in datasets],
        limitations=[*([inherited] if inherited else []), *LIMITATIONS, *as_list(limitations)],
        licence=license or (f"That of {origin}." if origin else "Not stated."),
        citations="\n\n".join(map(bibtex, papers)),
    )


def save_training(training: dict, folder: str | Path) -> None:
    """Write the `training.json` of a model's folder."""
    (Path(folder) / TRAINING_FILE).write_text(json.dumps(training, indent=1) + "\n", encoding="utf-8")


def usage_snippet(folder: str | Path, repo_id: str, prompt: str | None = None) -> str:
    """Python code that loads the model of a folder, which went to `repo_id`, and lets it answer. The decoding of an
    adapter is written out: it has no `generation_config.json`."""
    folder = Path(folder)
    prompt = prompt or "What is 17 * 23?"
    is_adapter = (folder / "adapter_config.json").exists()
    has_template = (folder / "chat_template.jinja").exists()
    placed = ', device_map="auto"' if _is_placed(folder) else ""
    if is_adapter:
        load = "load_adapted"
        lines = ["from transformers import AutoTokenizer", "", "from dparallel.hub_cards import load_adapted"]
    else:
        load = "AutoModelForCausalLM.from_pretrained"
        lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    lines += [
        "",
        f"repo = {json.dumps(repo_id)}",
        "tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)",
        f'model = {load}(repo, trust_remote_code=True, dtype="auto"{placed})',
    ]
    if has_template:
        lines += [
            f'chat = [{{"role": "user", "content": {json.dumps(prompt, ensure_ascii=False)}}}]',
            "inputs = tokenizer.apply_chat_template("
            'chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
        ]
    else:
        question = json.dumps(prompt, ensure_ascii=False)
        lines += [f'inputs = tokenizer({question}, return_tensors="pt")']
    decoding = _read(folder / TRAINING_FILE).get("decoding") if is_adapter else None
    if decoding:
        arguments = ", ".join(f"{name}={json.dumps(value)}" for name, value in decoding.items() if value is not None)
        lines += [
            "output = model.generate(",
            f"    **inputs.to(model.device), {arguments}, return_dict_in_generate=True",
            ")",
        ]
    else:
        lines += ["output = model.generate(**inputs.to(model.device), return_dict_in_generate=True)"]
    lines += [
        'answer = output.sequences[0, inputs["input_ids"].shape[1] :]',
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
        'print(output.num_forward_passes.item(), "forward passes")',
    ]
    return "\n".join(lines)


def _is_placed(folder):
    """Is the model so large that its snippet asks for a GPU?"""
    return _count_parameters(folder) > 1e9 or (folder / "adapter_config.json").exists()


def _filter_of(folder):
    """What the card says of a filter that lies beside the model; None without one."""
    if not (folder / "unmasking_filter").is_dir():
        return None
    generation = _read(folder / "generation_config.json")
    is_selected = generation.get("unmasking") == "learned_filter"
    threshold = generation.get("threshold") if is_selected else None
    return {
        "parameters": _in_words(_count_parameters(folder / "unmasking_filter")),
        "features": ", ".join(_read(folder / "unmasking_filter" / "config.json").get("features", ["confidence"])),
        "is_selected": is_selected,
        "threshold": POLICIES["learned_filter"].default if threshold is None else threshold,
    }


def _name(path):
    """Of a model that is no Hub id: the last part of its path, which says nothing of the machine."""
    return f"`{Path(path).name}`" if path and Path(path).name else ""


def _read(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _license_of(base_model):
    if base_model is None:
        return None
    try:
        data = HfApi().model_info(base_model).card_data
    except Exception as error:  # without network, or without right to read: the card can do without
        logger.warning(f"The licence of {base_model} could not be read ({type(error).__name__}): pass `license`.")
        return None
    return data and data.get("license")


def _count_parameters(folder):
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return count


def _in_words(count):
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.1f} {word}"
    return f"{count:,}"


def bibtex(key: str) -> str:
    title, number, authors = PAPERS[key]
    return (
        f"@article{{{key.lower()},\n  title = {{{title}}},\n  author = {{{authors}}},\n"
        f"  journal = {{arXiv preprint arXiv:{number}}},\n  year = {{2025}}\n}}"
    )
