"""From a folder to a repository of the Hub, in one commit."""

import time
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import sha
from transformers.utils import logging

import dparallel.modeling  # also registers the model families with AutoModelForCausalLM

logger = logging.get_logger(__name__)

ATTEMPTS, WAIT = 4, 2.0  # of the commit; seconds before the second, doubled each time
MODEL_FILES = (
    "*.safetensors", "*.json", "*.py", "*.jinja", "*.md", "*.txt", "*.model", "*.tiktoken", "*.png", "LICENSE*",
    "NOTICE*",
)  # fmt: skip
READ_BY_LOADERS = (
    "adapter_config.json", "chat_template.jinja", "config.json", "generation_config.json", "training.json",
    "training_args.bin",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"  # where a tokenizer saves those beside its default one
PATTERNS = {
    "model": (
        *MODEL_FILES,
        f"{TEMPLATES}/*.jinja",
        *(f"unmasking_filter/{pattern}" for pattern in ("*.safetensors", "*.json", "*.py")),
    ),
    "dataset": ("*.md", "data/*.parquet"),
}
INSTALLED = Path(dparallel.modeling.__file__).parent  # the code that goes along


def is_ours(path: str, repo_type: str) -> bool:
    """May an earlier push have left this file of a repository, so that a loader would read it beside what is there
    now? Or a training, which pushes its arguments as a pickle. Checkpoints and other people's files are not ours."""
    folder, _, name = path.rpartition("/")
    if repo_type == "dataset":
        return folder == "data" and name.endswith(".parquet")
    if folder == TEMPLATES:
        return name.endswith(".jinja")
    is_weights = name.endswith((".safetensors", ".safetensors.index.json"))
    is_code = name.endswith(".py") and (INSTALLED / name).exists()
    return (folder in ("", "unmasking_filter") and (is_weights or is_code)) or path in READ_BY_LOADERS


def files_to_push(folder: str | Path, repo_type: str = "model") -> dict[str, Path]:
    """What of a folder goes to the Hub: path there -> path here. Weights go as safetensors alone: a pickle, which can
    run code where it is loaded, stays behind, and so do checkpoints and logs of a training."""
    folder = Path(folder)
    paths = sorted(path for pattern in PATTERNS[repo_type] for path in folder.glob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def in_words(files: dict[str, Path]) -> str:
    """A list of files with their sizes, one a line."""
    sizes = {path: source.stat().st_size for path, source in files.items()}
    lines = [f"{size:>14,}  {path}" for path, size in sizes.items()]
    return "\n".join([*lines, f"{sum(sizes.values()):>14,}  bytes in {len(lines)} files"])


def upload(
    folder: str | Path,
    repo_id: str,
    repo_type: str = "model",
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Bring a folder to a repository, which is created if it is not there: all of it in one commit, so that there is
    never half a model. (`HfApi.upload_folder` makes several of a large folder.) What is there already is not sent
    again, whether from an earlier push or from one that broke off; without any change there is no commit.

    Args:
        folder (`str` or `Path`): see `files_to_push`.
        repo_id (`str`), repo_type (`str`): "user/name"; "model" or "dataset".
        private (`bool`): of a repository that is created. One that is there and public is refused.
        revision (`str`, *optional*): branch, which is created if it is not there.
        create_pr (`bool`): propose the commit to the main branch instead of making it.
        commit_message (`str`, *optional*).
        token (`str`, *optional*): by default the one of `hf auth login`, or of the environment variable HF_TOKEN. It
            goes to the Hub and nowhere else.

    Raises:
        ValueError: if the folder holds nothing to push, or the repository is public and must not be.
        PermissionError: if there is no token, or one that may not write there.
        RuntimeError: if somebody else commits meanwhile, or the Hub fails again and again. Nothing was changed; the
            same call goes on where it was.
    """
    files = files_to_push(folder, repo_type)
    if not files:
        raise ValueError(f"`folder={str(folder)!r}` holds nothing to push.")
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"`revision={revision!r}` is not allowed with `create_pr`: proposals are made to main.")
    api, revision = HfApi(token=token), revision or "main"
    place = {"repo_id": repo_id, "repo_type": repo_type}
    try:
        api.create_repo(**place, private=private, exist_ok=True)
        if private and not api.repo_info(**place).private:
            raise ValueError(f"`private=True`, but {repo_id} is there already and public: choose another name.")
        if revision != "main":
            api.create_branch(**place, branch=revision, exist_ok=True)
        return _commit(api, place, files, revision, create_pr, commit_message or f"Upload {repo_type}")
    except Exception as error:
        plain = _in_plain_words(error, repo_id)
        if plain is None:
            raise
        raise plain from error


def _commit(api, place, files, revision, create_pr, message):
    parent = None
    for attempt in range(ATTEMPTS):
        head = api.repo_info(**place, revision=revision).sha
        parent = parent or head
        if head != parent and not _is_there(api, place, files, revision):
            raise RuntimeError(f"Somebody committed to {place['repo_id']} during this push: push again, on top of it.")
        there = api.list_repo_files(**place, revision=revision)
        outdated = [path for path in there if is_ours(path, place["repo_type"]) and path not in files]
        if outdated and attempt == 0:
            print(f"Going from {place['repo_id']}, left by an earlier push or training: {', '.join(outdated)}")
        operations = [CommitOperationDelete(path) for path in outdated]
        operations += [CommitOperationAdd(path, source) for path, source in files.items()]
        try:
            return api.create_commit(
                **place, operations=operations, commit_message=message, revision=revision, create_pr=create_pr,
                parent_commit=head,
            )  # fmt: skip
        except Exception as error:
            # Files that were stored stay; a proposal may be there although its answer was lost, and is not made twice.
            if not _is_passing(error) or create_pr or attempt == ATTEMPTS - 1:
                raise
            logger.warning(f"The push to {place['repo_id']} failed ({_reason(error)}): trying again.")
            time.sleep(WAIT * 2**attempt)


def _is_there(api, place, files, revision):
    """Does the repository hold these files already? Then the commit was made, and only the answer was lost."""
    entries = {entry.path: entry for entry in api.list_repo_tree(**place, revision=revision, recursive=True)}
    return all(path in entries and _is_same(entries[path], source) for path, source in files.items())


def _is_same(entry, source):
    if entry.lfs is None:
        return sha.git_hash(source.read_bytes()) == entry.blob_id
    with source.open("rb") as file:
        return sha.sha_fileobj(file).hex() == entry.lfs.sha256


def _causes(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error):
    return next((each.response.status_code for each in _causes(error) if isinstance(each, HfHubHTTPError)), None)


def _is_passing(error):
    """May it go away? The server's own trouble, too many requests, and broken connections."""
    status = _status(error)
    if status is not None:
        return status >= 500 or status == 429
    return any(
        type(each).__module__.startswith("httpx") or isinstance(each, ConnectionError) for each in _causes(error)
    )


def _reason(error):
    status = _status(error)
    return f"status {status}" if status else type(error).__name__


def _in_plain_words(error, repo_id):
    """The error that a user should see, or None for one that is clear as it is."""
    status, again = _status(error), "Nothing there was changed; the same call goes on where it was."
    if status == 401 or (status is None and isinstance(error, LocalTokenNotFoundError)):
        return PermissionError(f"The Hub does not know who you are: `hf auth login`, then push to {repo_id} again.")
    if status in (403, 404):
        return PermissionError(f"This token may not write to {repo_id}: `hf auth login` with one that may.")
    if status == 412:
        return RuntimeError(f"Somebody committed to {repo_id} during this push. {again}")
    if _is_passing(error):
        what = "The Hub" if status else "The connection to the Hub"
        return RuntimeError(f"{what} failed ({_reason(error)}) on the way to {repo_id}. {again}")
    return None
