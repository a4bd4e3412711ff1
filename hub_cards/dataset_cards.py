"""The card of a dataset of trajectories, filled from its rows."""

import json
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from datasets.info import DatasetInfosDict
from datasets.splits import SplitDict, SplitInfo
from huggingface_hub import DatasetCard, DatasetCardData

from .card_metadata import as_list, check_card_metadata
from .model_cards import TAGS, bibtex

TEMPLATE = Path(__file__).with_name("dataset_card.md.jinja")
DESCRIBED = {
    "prompt": "what was asked, text or messages",
    "response": "the answer's text",
    "input_ids": "tokens of prompt and answer, up to and including the end-of-text",
    "prompt_length": "how many of them are the prompt's",
    "unmasking_step": "for each token of the answer the pass (0, 1, ...) that wrote it",
    "num_forward_passes": "passes that the answer took",
    "correct": "whether a judge took it for right; null where none was asked",
    "example_id": "number of the prompt",
    "seed": "of sampling",
    "settings": "arguments of `generate()`, as JSON",
}
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def dataset_card(
    splits: dict[str, Dataset],
    repo_id: str,
    *,
    model: str | None = None,
    sources: str | list[str] | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    limitations: str | Sequence[str] = (),
) -> DatasetCard:
    """The card of trajectories, as `trainer.generate_trajectories` makes them.

    Args:
        splits (dict of `str` to `Dataset`): by name.
        repo_id (`str`): where it is going, "user/name".
        model (`str`, *optional*): Hub id of the teacher.
        sources (`str` or list of `str`, *optional*): Hub ids of the datasets that the prompts come from.
        license (`str`, *optional*): one of the Hub's identifiers, "apache-2.0".
        language (`str` or list of `str`, *optional*): ISO 639 codes, "en".
        limitations (`str` or list of `str`): in addition to what holds for all such datasets.

    Raises:
        ValueError: if a split holds no trajectories, or for what the Hub does not take as `model`, `sources`,
            `license` or `language`.
    """
    check_card_metadata(license=license, language=language, model=model, sources=sources)
    sources = as_list(sources)
    for name, rows in splits.items():
        missing = {"input_ids", "prompt_length", "num_forward_passes"} - set(rows.column_names)
        if missing or len(rows) == 0:
            raise ValueError(f"The split {name!r} lacks {sorted(missing) or 'rows'}: it must hold trajectories.")
    count = sum(map(len, splits.values()))
    data = DatasetCardData(
        pretty_name=repo_id.split("/")[-1],
        license=license,
        language=language,
        source_datasets=sources or None,
        size_categories=[next((word for limit, word in SIZES if count < limit), "n>1M")],
        task_categories=["text-generation"],
        tags=TAGS,
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": f"data/{name}-*"} for name in splits],
            }
        ],
    )
    first = next(iter(splits.values()))
    info = first.info.copy()
    info.splits = SplitDict({name: SplitInfo(name, rows.data.nbytes, len(rows)) for name, rows in splits.items()})
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    counts = [_count(name, rows) for name, rows in splits.items()]
    settings = first["settings"][0] if "settings" in first.column_names else "{}"
    return DatasetCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        model=model,
        split=next(iter(splits)),
        splits=counts,
        settings=_as_arguments(settings),
        seed=first["seed"][0] if "seed" in first.column_names else "unknown",
        sources=[f"[{source}](https://huggingface.co/datasets/{source})" for source in sources],
        columns=first.column_names,
        described=DESCRIBED,
        judged=any(each["correct"] is not None for each in counts),
        limitations=as_list(limitations),
        citation=bibtex("dparallel"),
    )


def _count(name, rows):
    judged = [each for each in rows["correct"] if each is not None] if "correct" in rows.column_names else []
    passes, starts = rows["num_forward_passes"][:], rows["prompt_length"][:]
    tokens = [len(ids) - start for ids, start in zip(rows["input_ids"], starts, strict=True)]
    return {
        "name": name,
        "count": len(rows),
        "correct": sum(judged) / len(judged) if judged else None,
        "passes": sum(passes) / len(rows),
        "tokens": sum(tokens) / len(rows),
    }


def _as_arguments(settings):
    return ", ".join(f"{name}={value!r}" for name, value in json.loads(settings).items())
