"""Long jobs that survive being killed: rows are written in shards, and a rerun computes those that are missing."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm


def map_in_shards(
    function: Callable[[int, Any], list[dict]],
    items: Any,
    folder: str | Path,
    settings: dict[str, Any],
    shard_size: int = 512,
    desc: str | None = None,
    describe: Callable[[list[dict]], dict] | None = None,
) -> Dataset:
    """Compute rows for `items`, shard by shard, on all processes, and return them in the order of the items.

    A shard is an Arrow file in `folder` that appears complete or not at all. After a kill at any moment, the same
    call goes on with the missing ones, with any number of processes. What is in a shard must depend on its items, its
    number and the settings alone, so draw random numbers from a generator that is seeded by them.

    Args:
        function (`Callable[[int, Sequence], list[dict]]`): a shard's number and items to its rows, any number of
            them; a column has one type in all shards (or None).
        items (`Sequence`): that slices, as a list or a `Dataset.select` does; the same on every process.
        folder (`str` or `Path`): of this job alone.
        settings (`dict`): what the rows depend on, as JSON: saved beside the shards, and compared by a rerun.
        shard_size (`int`): items per shard, at least 1. It is one of the settings.
        desc (`str`, *optional*): of the progress bar, which takes all processes to be as fast as the first.
        describe (`Callable[[list[dict]], dict]`, *optional*): gets the rows of each shard that this process computes;
            the bar shows what it returns.

    Raises:
        ValueError: if the folder holds shards that were made with other settings, naming those.
    """
    if not isinstance(shard_size, int) or shard_size < 1:
        raise ValueError(f"`shard_size={shard_size!r}` is not allowed: it must be an integer of at least 1.")
    state, folder = PartialState(), Path(folder)
    num_shards = -(-len(items) // shard_size)
    paths = [folder / f"shard-{number:05d}.arrow" for number in range(num_shards)]
    settings = json.loads(json.dumps({**settings, "num_items": len(items), "shard_size": shard_size}))
    if state.is_main_process:
        _prepare_folder(folder, settings)
    state.wait_for_everyone()
    _compare_settings(folder, settings)  # each process by itself, so that all of them stop
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    state.wait_for_everyone()  # before the first of them is written
    slices = {number: range(number * shard_size, min((number + 1) * shard_size, len(items))) for number in missing}
    with tqdm(total=len(items), desc=desc, disable=not state.is_main_process) as progress:
        progress.update(len(items) - sum(map(len, slices.values())))
        for number in missing[state.process_index :: state.num_processes]:
            part = slices[number]
            shard = items.select(part) if isinstance(items, Dataset) else items[part.start : part.stop]
            temporary = paths[number].with_suffix(f".{os.getpid()}.tmp")
            rows = function(number, shard)
            table = Dataset.from_list(rows).data.table
            with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
            temporary.replace(paths[number])
            if describe is not None:
                progress.set_postfix(describe(rows), refresh=False)
            progress.update(len(part) * state.num_processes)
    state.wait_for_everyone()
    return concatenate_datasets([Dataset.from_file(str(path)) for path in paths])


def _prepare_folder(folder, settings):
    """Write the settings of a job without shards, and clear away what a killed run left unfinished."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.glob("shard-*.arrow")):
        temporary = folder / "settings.tmp"
        temporary.write_text(json.dumps(settings, indent=2), encoding="utf-8")
        temporary.replace(folder / "settings.json")
    for leftover in folder.glob("shard-*.tmp"):
        leftover.unlink()


def _compare_settings(folder, settings):
    path = folder / "settings.json"
    if not path.exists():
        raise ValueError(f"{folder} holds shards but no settings.json: choose another folder, or delete this one.")
    if changed := differences(json.loads(path.read_text(encoding="utf-8")), settings):
        raise ValueError(
            f"{folder} holds the shards of a job with other settings: {changed}. Choose another `output_dir`, or "
            f"delete {folder}."
        )


def differences(saved: dict[str, Any], settings: dict[str, Any]) -> str:
    """Of two nested dictionaries of settings, those that differ, in words: "`name` was 1, is 2; ..."."""
    saved, settings = flattened(saved), flattened(settings)
    changed = sorted(name for name in {*saved, *settings} if saved.get(name) != settings.get(name))
    return "; ".join(f"`{name}` was {saved.get(name)!r}, is {settings.get(name)!r}" for name in changed)


def flattened(settings: dict[str, Any]) -> dict:
    """{"a": {"b": 1}} to {"a.b": 1}, so that of many settings the one that differs is named."""
    flat = {}
    for name, value in settings.items():
        inner = flattened(value) if isinstance(value, dict) and value else None
        flat |= {name: value} if inner is None else {f"{name}.{key}": each for key, each in inner.items()}
    return flat
