"""Exported models on the Hugging Face hub: put a folder there, and open one from its cache or from the hub.

Nothing of a repository is run: of the files only those of an exported model are fetched, and they are read as any
folder of a stranger is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grappa.backbone.files.hub import HUB, hub_problem
from grappa.core.extras import is_installed, missing_sentence
from grappa.core.printing import sentence, shown
from grappa.model_folder import RECORD_FILE, WEIGHTS_FILE, ModelError, check_weights, read_header, read_record

CARD = "README.md"
OPENED = (RECORD_FILE, WEIGHTS_FILE)
ONNX = ("model.onnx", "model.onnx.data", "preprocessing.json")
_PART = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?P<repository>{_PART}/{_PART})(@(?P<revision>[\w./-]{{1,100}}))?", re.ASCII)


def fetched_model(name: str) -> Path:
    """Return a folder with the model of ``hf-hub:OWNER/NAME[@REVISION]``: what the cache holds, or else the hub.

    Raises:
        ModelError: no such name, no exported model there, or the hub cannot be reached; in seconds.
    """
    repository, revision = _parsed(name.removeprefix(HUB), "hf-hub:OWNER/NAME, with @REVISION or without")
    cached = _snapshot(repository, revision, cached=True)
    if cached is not None:
        return cached
    problem = hub_problem()
    if problem:
        raise ModelError(
            f"the model {repository} would come from the hub, but {problem}; give a folder of `grappa export`"
        )
    with _answers_of_the_hub(f"the model {repository} could not be had from the hub", ModelError):
        found = _snapshot(repository, revision, cached=False)
    if found is None:
        raise ModelError(
            f"{repository} on the hub holds no model of Grappa ({' and '.join(OPENED)}); give another name"
        )
    return found


def push(folder: Path, name: str, *, private: bool = False) -> str:
    """Put an exported folder into the repository OWNER/NAME of the hub, as one commit; return where it is.

    The repository is made if there is none. Only the files of an exported model are sent.

    Raises:
        ModelError: the folder is no whole exported model; nothing was sent.
        ValueError: no such name, the hub cannot be reached, or it refuses.
    """
    repository, revision = _parsed(name, "OWNER/NAME")
    if revision:
        raise ValueError(f"the name is {shown(name)}; expected OWNER/NAME, without a revision")
    files = _checked_files(folder)
    problem = hub_problem()
    if problem:
        raise ValueError(f"{folder} cannot be put on the hub: {problem}; nothing was sent")
    from huggingface_hub import HfApi, constants

    api = HfApi(endpoint=constants.ENDPOINT)
    with _answers_of_the_hub(f"{folder} could not be put into {repository}", ValueError):
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(files),
            commit_message="A model exported by Grappa",
        )
    how = f"; open it with grappa.load_model({HUB + repository!r})" if RECORD_FILE in files else ""
    return f"put {', '.join(files)} into {constants.ENDPOINT}/{repository}{how}"


def _checked_files(folder: Path) -> tuple[str, ...]:
    """Return the files of an exported folder that are sent; ModelError where it is none, or damaged."""
    onnx = tuple(file for file in ONNX if (folder / file).is_file())
    if ONNX[0] not in onnx:
        record = read_record(folder)
        read_header(folder)
        check_weights(folder, record)
    if not (folder / CARD).is_file():
        raise ModelError(f"{folder} has no {CARD}, the model card; write the folder again by `grappa export`")
    return (CARD, *(onnx if ONNX[0] in onnx else OPENED))


def _parsed(name: str, expected: str) -> tuple[str, str | None]:
    found = _NAME.fullmatch(name)
    if found is None or "--" in name or ".." in name:
        raise ModelError(f"the model's name is {shown(name)}; expected {expected}")
    return found["repository"], found["revision"]


def _snapshot(repository: str, revision: str | None, *, cached: bool) -> Path | None:
    """Return the folder of a repository in the cache, or None where it does not hold a model."""
    if not is_installed("huggingface_hub"):
        raise ModuleNotFoundError(str(missing_sentence("huggingface_hub")), name="huggingface_hub")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                repository,
                revision=revision,
                local_files_only=cached,
                allow_patterns=list(OPENED),
                endpoint=constants.ENDPOINT,
                cache_dir=constants.HF_HUB_CACHE,
            )
        )
    except LocalEntryNotFoundError:
        if cached:
            return None
        raise
    return folder if all((folder / file).is_file() for file in OPENED) else None


@contextmanager
def _answers_of_the_hub(what: str, kind: type[ValueError]) -> Iterator[None]:
    """Turn what the hub's client raises into one sentence."""
    try:
        yield
    except ValueError as error:
        raise kind(f"{what}: {sentence(error, limit=200)}") from error
    except Exception as error:  # the client raises many kinds
        status = _status(error)
        advice = {401: "log in by `hf auth login`", 403: "your token must allow it", 404: "give another name"}
        reason = advice.get(status or 0, "try again")
        code = f"it answers {status}" if status else sentence(f"{type(error).__name__}: {error}", limit=200)
        raise kind(f"{what}: {code}; {reason}") from error


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status that an error, or one that it came from, stands for."""
    while error is not None:
        status: int | None = getattr(getattr(error, "response", None), "status_code", None)
        if status:
            return status
        error = error.__cause__
    return None
