"""Models and datasets to the Hub: what goes is put together in a folder, looked at, and uploaded in one commit."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_from_disk
from huggingface_hub import CommitInfo, snapshot_download
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .card_metadata import check_card_metadata
from .dataset_cards import dataset_card
from .hub_ids import check_folder_or_hub_id, is_hub_id, looks_like_hub_id
from .measurements import RESULTS_FILE, load_measurements
from .merge import load_tokenizer, merge_adapter
from .model_cards import TRAINING_FILE, model_card, save_training, usage_snippet
from .upload import INSTALLED, files_to_push, in_words, upload

logger = logging.get_logger(__name__)

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
LICENCE_FILES = ("LICENSE*", "NOTICE*")
SHARD_BYTES = 500_000_000  # of a parquet file


def push_model(
    model: PreTrainedModel | PeftModel | str | Path,
    repo_id: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    merge: bool = True,
    base_model: str | None = None,
    results: Sequence[str | Path] = (),
    training: str | Path | None = None,
    run_snippet: bool = True,
    prompt: str | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    dry_run: str | Path | None = None,
    token: str | bool | None = None,
    **card: Any,
) -> CommitInfo | None:
    """Push a model in one commit: weights as safetensors, remote code, configurations, tokenizer with chat template,
    filter and license texts if it has some, card.

        push_model("runs/llada/merged", "user/my-model", results=["runs/gsm8k/results.json"])

    Args:
        model (`PreTrainedModel`, `PeftModel`, `str` or `Path`): the model, or a folder or Hub id of one, or of an
            adapter.
        repo_id (`str`): where it goes, "user/name".
        tokenizer (`PreTrainedTokenizerBase`, *optional*): by default the one beside the model, or its base model's.
        merge (`bool`): merge an adapter into its base model, so that nobody needs peft. A model in memory is merged
            in place.
        base_model (`str`, *optional*): folder or Hub id of the base model, if it is not where the adapter says.
        results (list of `str` or `Path`): results files (see `measurements`), which go along as one; by default the
            `results.json` beside the model.
        training (`str` or `Path`, *optional*): the `training.json` of a model in memory.
        run_snippet (`bool`): run the card's usage snippet in a process of its own, as a stranger would, before
            anything is uploaded; the card shows what it printed, and a warning says if that is no answer. It loads
            the model once more.
        prompt (`str`, *optional*): the question in that snippet.
        private, revision, create_pr, commit_message, token: see `upload`.
        dry_run (`str` or `Path`, *optional*): write everything into this folder, and push nothing. What the Hub would
            not take as metadata is left out with a warning.
        card: further arguments of `model_card`: datasets, license, language, limitations.

    Returns:
        `CommitInfo`, or None after a dry run.

    Raises:
        ValueError: for what cannot be pushed, before any connection is made; for what the Hub does not take as
            metadata, before the model is loaded.
        RuntimeError: if the snippet does not run.
        PermissionError, RuntimeError: see `upload`.
    """
    card = _check_card(model_card, card, dry_run is not None)
    for path in results:
        load_measurements(path)  # a wrong one is refused now, and not after the model has been written
    with staging_folder(repo_id, dry_run) as folder:
        _stage(model, folder, tokenizer, merge, base_model, results, training, repo_id)
        is_whole = not (folder / "adapter_config.json").exists()  # an adapter's base model may be anywhere
        printed, where = _run_snippet(folder, repo_id, prompt) if run_snippet and is_whole else (None, None)
        written = model_card(
            folder, repo_id, base_model=base_model if is_hub_id(base_model) else None, prompt=prompt, printed=printed,
            printed_on=where, **card,
        )  # fmt: skip
        written.save(folder / "README.md")
        _warn_of_edits(model, folder)
        return deliver(
            folder, repo_id, "model", dry_run, private=private, revision=revision, create_pr=create_pr,
            commit_message=commit_message, token=token,
        )  # fmt: skip


def _check_card(function, card, is_dry_run):
    """The arguments of a card, after a look whether this function takes them, and the Hub what they say: before
    anything is done. A dry run goes on without what the Hub would refuse, and says so."""
    if unknown := sorted(set(card) - set(function.__kwdefaults__)):
        raise ValueError(f"{unknown} are no arguments of a card: they must be some of {[*function.__kwdefaults__]}.")
    refused = set()
    for name in {"license", "language", "datasets", "model", "sources"} & set(card):
        try:
            check_card_metadata(**{name: card[name]})
        except ValueError as error:
            if not is_dry_run:
                raise
            logger.warning(f"{error} A push would end here; this card is written without it.")
            refused.add(name)
    return {name: value for name, value in card.items() if name not in refused}


def _named_where_of_others(entry, names):
    """A measurement, with the name of what was measured where that is not the model that goes by these names."""
    measured = entry.get("adapter") or entry.get("checkpoint")
    if entry.get("model") or measured is None or {measured, measured.split("/")[-1]} & names:
        return entry
    logger.warning(
        f"`results` holds numbers of {measured!r}, which is not the model that is pushed: the card has them under "
        f"that name. If it is the same model, correct `checkpoint` in the results file."
    )
    return {**entry, "model": measured}


def _with_own_decoding(entry, generation):
    """A measurement of a model as it was saved, which names its settings where the model is saved with others now."""
    resolved = entry.get("resolved_decoding") or {}
    names = [name for name in ("unmasking", "threshold", "steps") if generation.get(name) is not None]
    changed = [name for name in names if name in resolved and resolved[name] != generation[name]]
    if entry.get("model") or entry.get("decoding") or not changed:
        return entry
    then, now = ({name: values[name] for name in changed} for values in (resolved, generation))
    logger.warning(
        f"`results` holds numbers of {entry['task']} with {then}, as the model was saved when it was measured; now it "
        f"is saved with {now}. The card names the former. Measure it again."
    )
    return {**entry, "decoding": {name: resolved[name] for name in names if name in resolved}}


def _stage(model, folder, tokenizer, merge, base_model, results, training, repo_id):
    """Write everything but the card."""
    given = model
    source = None if hasattr(model, "save_pretrained") else _download(model)
    is_adapter = isinstance(model, PeftModel) or (source is not None and (source / "adapter_config.json").exists())
    if is_adapter and merge:
        model = merge_adapter(model if source is None else source, folder, tokenizer, base_model=base_model)
    else:
        if is_adapter:
            base_model = _stage_adapter(model, source, folder, base_model)
        else:
            if base_model is not None:
                check_folder_or_hub_id("base_model", base_model)
            if getattr(model, "_hf_peft_config_loaded", False):  # `save_pretrained` would save that alone
                raise ValueError(
                    "`model` has an adapter of `load_adapter()`: pass a PeftModel, or the adapter's folder."
                )
            model = model if source is None else AutoModelForCausalLM.from_pretrained(source, dtype="auto")
            model.save_pretrained(folder)
        if tokenizer is None:
            tokenizer = load_tokenizer(source, base_model or (source is None and model.config._name_or_path))
        tokenizer.save_pretrained(folder)
        if source is None and hasattr(model, "training_record"):
            save_training(model.training_record, folder)
    paths = list(results)
    if source is None:
        names = {repo_id, getattr(model, "name_or_path", None)}
    else:
        names = {repo_id, str(given), Path(given).name}
    if source is not None:
        paths = paths or [path for path in [source / RESULTS_FILE] if path.exists()]
        training = training or (source / TRAINING_FILE if (source / TRAINING_FILE).exists() else None)
        for path in (path for pattern in LICENCE_FILES for path in source.glob(pattern) if path.is_file()):
            shutil.copy(path, folder)
    if paths:
        load = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths if load_measurements(path)]
        entries = [_named_where_of_others(entry, names) for each in load for entry in each["measurements"]]
        generation = folder / "generation_config.json"  # an adapter has none
        saved = json.loads(generation.read_text(encoding="utf-8")) if generation.exists() else {}
        merged = {"measurements": [_with_own_decoding(entry, saved) for entry in entries]}
        (folder / RESULTS_FILE).write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    if training is not None:
        shutil.copy(training, folder / TRAINING_FILE)


def _stage_adapter(model, source, folder, base_model):
    """Write an adapter as it is, to where `from_pretrained` looks, and return its base model."""
    if source is None:
        name = model.active_adapters[0]
        model.save_pretrained(folder, selected_adapters=[name])
        if name != "default":  # peft gives it a folder of its own
            shutil.copytree(folder / name, folder, dirs_exist_ok=True)
            shutil.rmtree(folder / name)
    else:
        if not (source / "adapter_model.safetensors").exists():
            raise ValueError(f"`model={str(source)!r}` must hold the adapter's weights as adapter_model.safetensors.")
        for name in ADAPTER_FILES:
            shutil.copy(source / name, folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if is_hub_id(base_model):
        config["base_model_name_or_path"] = base_model
        (folder / "adapter_config.json").write_text(
            json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
    elif not is_hub_id(config["base_model_name_or_path"]):
        logger.warning(
            f"Nobody else can load this adapter: its base model, {config['base_model_name_or_path']!r}, is no Hub id. "
            f"Pass `base_model=`, 'user/name', or merge it."
        )
    return base_model or config["base_model_name_or_path"]


def _download(model):
    """A folder or Hub id to a folder."""
    check_folder_or_hub_id("model", model)
    return Path(model) if Path(model).is_dir() else Path(snapshot_download(str(model)))


def _run_snippet(folder, repo_id, prompt):
    """What the card's code prints, run on the folder in a new process that knows the Hub's code alone, and where. Says
    so if that is no answer."""
    code = usage_snippet(folder, repo_id, prompt).replace(json.dumps(repo_id), json.dumps(str(folder.resolve())), 1)
    code += "\nimport json, torch\nend = model.generation_config.eos_token_id\nprint(json.dumps([str(model.device), "
    code += "torch.__version__, answer.tolist(), [end] if isinstance(end, int) else end, tokenizer.all_special_ids]))"
    with tempfile.TemporaryDirectory() as scratch:
        env = {**os.environ, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, encoding="utf-8", env=env, cwd=scratch
        )
    if result.returncode:
        raise RuntimeError(
            f"The usage snippet does not run on what would be pushed; nothing was:\n{result.stderr[-2000:]}"
        )
    *printed, facts = result.stdout.strip().splitlines()
    device, version, *answer = json.loads(facts)
    if flaw := flaw_of(*answer):
        logger.warning(
            f"The answer to the card's sample prompt {flaw}, and is no advertisement: look at the model, or choose "
            f"another `prompt`. It is:\n" + "\n".join(printed)
        )
    return "\n".join(printed), f"{'a GPU' if device.startswith('cuda') else 'a CPU'} with PyTorch {version}"


def flaw_of(answer: list[int], end: list[int] | None, special: list[int]) -> str | None:
    """Why these token ids look like no answer to anything, in words; None if they may be one.

    Args:
        answer (list of `int`): with what stands behind its end, if anything.
        end (list of `int` or None): ids that end a text.
        special (list of `int`): ids that are no text.
    """
    stop = next((i for i, token in enumerate(answer) if token in (end or [])), None)
    words = [token for token in answer[:stop] if token not in special]
    if not words:
        return "has no text" if stop is None or stop else "is empty"
    if len(words) >= 4 and len(set(words)) <= max(1, len(words) // 16):
        return "repeats itself"
    return f"has no end within its {len(answer)} tokens" if stop is None else None


def _warn_of_edits(model, folder):
    """The code that goes is that of the class. Say where it, or what lies beside the weights, is not the installed."""
    for path in sorted(folder.glob("*.py")):
        if not (INSTALLED / path.name).exists() or _differ(path, INSTALLED / path.name):
            logger.warning(f"{path.name} is not that of the installed dparallel: this model brought its own.")
    beside = Path(model) if isinstance(model, (str, Path)) else None
    for path in sorted(beside.glob("*.py")) if beside is not None and beside.is_dir() else []:
        if (folder / path.name).exists() and _differ(path, folder / path.name):
            logger.warning(
                f"{path} differs from the installed dparallel's {path.name}, which is pushed instead of it."
            )


def _differ(path, other):
    return path.read_bytes() != other.read_bytes()


def push_dataset(
    dataset: Dataset | DatasetDict | str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    dry_run: str | Path | None = None,
    token: str | bool | None = None,
    **card: Any,
) -> CommitInfo | None:
    """Push trajectories as parquet, with their card, in one commit.

    Args:
        dataset (`Dataset`, `DatasetDict`, `str` or `Path`): from `generate_trajectories`, or a folder that
            `save_to_disk`, `examples/generate_trajectories.py` or `examples/distill.py` wrote. Without splits, all of
            it is "train".
        repo_id (`str`): where it goes, "user/name".
        private, revision, create_pr, commit_message, token: see `upload`.
        dry_run (`str` or `Path`, *optional*): write everything into this folder, and push nothing. What the Hub would
            not take as metadata is left out with a warning.
        card: further arguments of `dataset_card`: model, sources, license, language, limitations.

    Returns:
        `CommitInfo`, or None after a dry run.

    Raises:
        ValueError: for what cannot be pushed, or what the Hub does not take as metadata, before any connection is
            made.
        PermissionError, RuntimeError: see `upload`.
    """
    card = _check_card(dataset_card, card, dry_run is not None)
    if isinstance(dataset, (str, Path)):
        dataset = _load_dataset(Path(dataset))
    if not isinstance(dataset, (Dataset, DatasetDict)):
        raise ValueError(f"`dataset` is a {type(dataset).__name__}: it must be a Dataset, a DatasetDict or a folder.")
    splits = dict(dataset) if isinstance(dataset, DatasetDict) else {"train": dataset}
    with staging_folder(repo_id, dry_run) as folder:
        dataset_card(splits, repo_id, **card).save(folder / "README.md")
        (folder / "data").mkdir()
        for name, rows in splits.items():
            count = -(-rows.data.nbytes // SHARD_BYTES) or 1
            for number in range(count):
                path = folder / "data" / f"{name}-{number:05d}-of-{count:05d}.parquet"
                rows.shard(count, number, contiguous=True).to_parquet(path)
        return deliver(
            folder, repo_id, "dataset", dry_run, private=private, revision=revision, create_pr=create_pr,
            commit_message=commit_message, token=token,
        )  # fmt: skip


def _load_dataset(folder):
    """What `save_to_disk` wrote there, or below it, where the examples let it."""
    folders = [folder, folder / "dataset", folder / "trajectories" / "dataset"]
    saved = [f for f in folders if (f / "dataset_info.json").exists() or (f / "dataset_dict.json").exists()]
    if saved:
        return load_from_disk(saved[0])
    if any(path for name in (".", "trajectories") for path in (folder / name).glob("shard-*.arrow")):
        raise ValueError(
            f"`dataset={str(folder)!r}` holds the shards of `generate_trajectories`, which have no prompts and no "
            f"verdicts: push the dataset that it returns. The same call makes it from them, without decoding anew."
        )
    raise ValueError(f"`dataset={str(folder)!r}` must be a folder that `save_to_disk` wrote.")


@contextmanager
def staging_folder(repo_id: str, dry_run: str | Path | None) -> Iterator[Path]:
    """Where what is pushed is put together: a temporary folder, or that of a dry run, which must be empty."""
    if not isinstance(repo_id, str) or not looks_like_hub_id(repo_id):
        raise ValueError(f"`repo_id={repo_id!r}` is not allowed: it must be 'user/name'.")
    if dry_run is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    folder = Path(dry_run)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"`dry_run={str(dry_run)!r}` is not empty: choose another folder.")
    yield folder


def deliver(
    folder: str | Path, repo_id: str, repo_type: str, dry_run: str | Path | None, **settings: Any
) -> CommitInfo | None:
    """List what would go, and let it go unless this is a dry run: then return None."""
    files = in_words(files_to_push(folder, repo_type))
    if dry_run is not None:
        print(f"In {folder}, to be looked at; nothing was pushed:\n{files}")
        return None
    print(f"Going to {repo_id}:\n{files}")
    return upload(folder, repo_id, repo_type, **settings)
