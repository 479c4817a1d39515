"""Models and tokenizers of the Hugging Face Hub, by `huggingface_hub`.

A model of the hub is written hf://OWNER/NAME, hf://OWNER/NAME@REVISION, or OWNER/NAME if there is no such directory.

    hub_ref    recognises such a name
    pin        asks the hub once which commit the name means now: hf://OWNER/NAME@COMMIT
    fetch      downloads that commit's model, and returns the directory
    upload     sends files to a repository

Only JSON, chat templates and safetensors are downloaded, so nothing that is downloaded can run code. The library's own
settings hold: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE. Where MINIMIND_STORAGE is set, the first
process copies the files into the storage, and every other process reads them there.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from errno import EACCES, EDQUOT, ENOSPC, EPERM, EROFS
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from minimind_ray.config.errors import UserError
from minimind_ray.config.paths import STORAGE, input_path
from minimind_ray.config.reading import read_json
from minimind_ray.data.files import atomic_output, exists, join, locate, one_line
from minimind_ray.data.storage import copy_of, mirror_of, retry

if TYPE_CHECKING:  # Functions import the library themselves: it takes 0.2 s, and most commands do not need it.
    from huggingface_hub import HfApi

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
INDEX, ADAPTER = "model.safetensors.index.json", "adapter_config.json"
SMALL = ("config.json", "generation_config.json", INDEX, ADAPTER, *TOKENIZER)
"""The files that are fetched, and checked, before the weights."""

FETCHED = "fetched.txt"
"""In the storage: the file that is written after all files of a model."""
WAITS = (1.0, 2.0, 4.0)
"""Seconds between attempts when the hub is busy."""
TIMEOUT = 10.0
DISK = (ENOSPC, EDQUOT, EACCES, EPERM, EROFS)

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # The library reads this when it is imported.

_PART = r"[A-Za-z0-9][\w.-]*"
_BARE = re.compile(rf"({_PART})/{_PART}(?:@[\w./-]+)?", re.ASCII)
_URL = re.compile(rf"hf://({_PART}(?:/{_PART})?)(?:@([\w./-]+))?", re.ASCII)
_DATA = re.compile(rf"hf://(datasets/{_PART}/{_PART})(?:@([\w./-]+))?", re.ASCII)
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class HubRef:
    """A model of the hub. `name` is OWNER/NAME; without `revision` it is the branch main."""

    name: str
    revision: str | None = None
    bare: bool = field(default=False, compare=False)
    """Whether it was written without hf://, so that it may be a mistaken path."""

    def __str__(self) -> str:
        return f"hf://{self.name}" + (f"@{self.revision}" if self.revision else "")

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, so that the files never change."""
        return _COMMIT.fullmatch(self.revision or "") is not None


def hub_ref(text: str | Path) -> HubRef | None:
    """Return the model of the hub that a text names; None for a path or another URL.

    OWNER/NAME without hf:// is a model only if neither OWNER/NAME nor OWNER is here or in the storage. So a mistake in
    runs/NAME stays a mistake in a path.
    """
    text = str(text)
    if found := _URL.fullmatch(text):
        of_model = found[1].partition("/")[0] not in ("datasets", "spaces", "buckets")
        return HubRef(found[1], found[2]) if of_model else None
    found = _BARE.fullmatch(text)
    if not found or found[1] == "runs" or Path(found[1]).exists() or Path(text).exists():
        return None
    storage = os.environ.get(STORAGE)
    if storage and _in_store(join(storage, found[1])):
        return None
    name, _, revision = text.partition("@")
    return HubRef(name, revision or None, bare=True)


def hint(text: str | Path) -> str:
    """Return what to add to an error about a missing model whose path may have been meant as a model of the hub."""
    return f"; for a model of the hub, write hf://{text}" if _BARE.fullmatch(str(text)) else ""


def model_location(text: str | Path, earlier: str | None = None) -> str:
    """Return where the model or tokenizer is that a setting names: a pinned hf://OWNER/NAME@COMMIT, or a path or URL.

    `earlier` is the same setting in the run that is resumed. A model that is named without a revision keeps the run's
    commit, so that the hub is not asked.

    Raises:
        UserError: the hub has no such model, refuses it, or cannot be reached; or see `input_path`.
    """
    ref = hub_ref(text)
    if ref is None:
        return input_path(text)
    before = hub_ref(earlier) if earlier else None
    if before and before.pinned and before.name == ref.name and ref.revision is None:
        return str(before)
    return str(pin(ref))


@cache
def pin(ref: HubRef) -> HubRef:
    """Return the model with the commit that its revision names now. A process asks the hub only once.

    If the hub cannot be reached, the commit is the one in the cache, and a line on stderr says so.

    Raises:
        UserError: the hub has no such model or revision, refuses it, or cannot be reached and the cache has no commit.
    """
    if ref.pinned:
        return ref
    try:
        return _pin(ref)
    except UserError as error:
        if not ref.bare:
            raise
        raise UserError(f"{error}; there is no directory {ref.name} here either") from None


def _pin(ref: HubRef) -> HubRef:
    import huggingface_hub

    try:
        with hub_errors(ref):
            _patiently(partial(_api().model_info, ref.name, revision=ref.revision, timeout=TIMEOUT))
    except HubUnreachableError as error:
        for name in ("config.json", ADAPTER, "tokenizer_config.json"):
            found = huggingface_hub.try_to_load_from_cache(ref.name, name, revision=ref.revision)
            if isinstance(found, str):
                pinned = replace(ref, revision=Path(found).parent.name)
                if not huggingface_hub.constants.HF_HUB_OFFLINE:
                    print(f"{error}; using {pinned} from the cache", file=sys.stderr)
                return pinned
        raise
    return replace(ref, revision=_snapshot(ref, SMALL).name)  # The library notes in its cache what the revision means.


@contextmanager
def cache_if_unreachable() -> Generator[None]:
    """Let the library look only in its cache if the hub cannot be reached now, instead of trying again and again."""
    from huggingface_hub import constants, get_session

    before = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception:  # The errors of its versions have no class in common.
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def fetch(ref: HubRef, check: Callable[[Path], None] = lambda folder: None) -> Path:
    """Return the directory of a pinned model or adapter on this machine; download the files that are not here.

    `check` gets the directory when it has all files but the weights, and may raise.

    Raises:
        UserError: the repository has no model that can be read, refuses the download, or the hub cannot be reached.
    """
    return _shared(ref, "", (*SMALL, "*.safetensors"), partial(_fetch, ref, check))


def fetch_tokenizer(ref: HubRef) -> Path:
    """Return the directory with the tokenizer of a pinned model. Raises as `fetch`."""
    return _shared(ref, "-tokenizer", TOKENIZER, partial(_snapshot, ref, SMALL))


def _fetch(ref: HubRef, check: Callable[[Path], None]) -> Path:
    folder = _snapshot(ref, SMALL)
    if not (folder / "config.json").exists() and not (folder / ADAPTER).exists():
        raise UserError(f"{ref} is not a model: the repository has no config.json and no {ADAPTER}")
    check(folder)
    missing = [name for name in _weights(folder, ref) if not (folder / name).exists()]
    if not missing:
        return folder
    with hub_errors(ref):
        info = _patiently(
            partial(_api().model_info, ref.name, revision=ref.revision, files_metadata=True, timeout=TIMEOUT)
        )
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    if absent := [name for name in missing if name not in sizes]:
        pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in sizes)
        why = ": its weights are pickled, which can run code and are not read" if pickled else ""
        raise UserError(f"{ref} has no {absent[0]}{why}; give a repository with safetensors")
    print(f"fetching {ref}: {size_text(sum(sizes[name] for name in missing))}", file=sys.stderr)
    return _snapshot(ref, missing, bars=sys.stderr.isatty())


def _weights(folder: Path, ref: HubRef) -> list[str]:
    """Return the names of the weight files of the model or adapter whose small files are in `folder`."""
    if not (folder / "config.json").exists():
        return ["adapter_model.safetensors"]
    if not (folder / INDEX).exists():
        return ["model.safetensors"]
    shards = read_json(folder / INDEX).get("weight_map")
    names = sorted({str(name) for name in cast("dict[str, Any]", shards).values()}) if isinstance(shards, dict) else []
    if not names or not all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        raise UserError(f"{ref}: {INDEX} does not name safetensors files")
    return names


def _snapshot(ref: HubRef, names: Sequence[str], *, bars: bool = False) -> Path:
    """Download the files of a model that have these names, unless they are in the cache. Return their directory."""
    from huggingface_hub import snapshot_download

    # It would warn, with a list of patterns, that a repository has none of these files; the caller says it.
    logging.getLogger(snapshot_download.__module__).setLevel(logging.ERROR)
    with hub_errors(ref), _progress_bars(bars):
        return Path(snapshot_download(ref.name, revision=ref.revision, allow_patterns=list(names)))


def _shared(ref: HubRef, kind: str, names: Sequence[str], get: Callable[[], Path]) -> Path:
    """Return the directory `get()`; or, if there is a storage, a copy of these files in it.

    The first process makes the copy.
    """
    storage = os.environ.get(STORAGE)
    if not storage:
        return get()
    place = join(storage, "hub", ref.name, f"{ref.revision}{kind}")
    if not _in_store(join(place, FETCHED)):
        _copy(get(), names, place)
    if mirror := mirror_of(place):
        mirror.pull()
    return copy_of(place)


def _in_store(place: str) -> bool:
    return retry(partial(exists, place), place)


def _copy(folder: Path, names: Sequence[str], place: str) -> None:
    filesystem, root = locate(place)
    for file in sorted(file for name in names for file in folder.glob(name)):
        name = file.relative_to(folder).as_posix()
        with file.open("rb") as source, atomic_output(filesystem, join(root, name)) as copy:
            shutil.copyfileobj(source, copy, 1 << 22)
    with atomic_output(filesystem, join(root, FETCHED)) as mark:
        mark.write(b"all files of the hub's model are here\n")


class HubUnreachableError(UserError):
    """The hub cannot be reached, does not answer, or must not be asked."""


@contextmanager
def hub_errors(ref: object) -> Generator[None]:
    """Turn an error of the library inside the block into a UserError that says what to do. `ref` is the subject."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # The library lets through the exceptions of its HTTP client.
        raise _sentence(ref, error) from None


def _sentence(ref: object, error: BaseException) -> Exception:
    """Return the user's error for an error of the library, or the error itself if it is the disk's."""
    from huggingface_hub import constants, errors

    while isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # The library hides the hub's answer behind "not in the cache".
    hub, response = constants.ENDPOINT, getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    name = getattr(ref, "name", ref)
    if isinstance(error, OSError) and error.errno in DISK:
        return error
    if constants.HF_HUB_OFFLINE or isinstance(error, errors.OfflineModeIsEnabled):
        return HubUnreachableError(f"{ref} is not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set")
    if isinstance(error, errors.GatedRepoError):
        return UserError(
            f"{ref} is gated: accept its conditions at {hub}/{name}, and give your token (HF_TOKEN, or hf auth login)"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"{ref}: {hub} has no {name}, or it is private: check the name; for a private one give your token "
            "(HF_TOKEN, or hf auth login)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{ref}: {hub}/{name} has no such branch, tag or commit")
    if isinstance(error, errors.HFValidationError):
        return UserError(f"{ref} is not a name of the hub: write hf://OWNER/NAME")
    if status in (401, 403):
        return UserError(f"{ref}: {hub} refuses your token (status {status}): check HF_TOKEN, or use hf auth login")
    if status:
        busy = status == 429 or status >= 500
        what = "allows no more requests for now" if status == 429 else "does not answer the request"
        again = "; try again later" + (", or give your token (HF_TOKEN)" if status == 429 else "") if busy else ""
        return (HubUnreachableError if busy else UserError)(f"{ref}: {hub} {what} (status {status}){again}")
    return HubUnreachableError(
        f"{ref}: {hub} cannot be reached, or the download was cut ({one_line(error)}): check the network, or set "
        "HF_ENDPOINT to a mirror; the same command continues the download"
    )


def _patiently(ask: Callable[[], Any]) -> Any:
    """Return `ask()`, which is tried again while the hub is busy. The library does so only for downloads."""
    from huggingface_hub.errors import HfHubHTTPError

    for wait in WAITS:
        try:
            return ask()
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 0)
            if status != 429 and status < 500:
                raise
            time.sleep(wait)
    return ask()


@contextmanager
def _progress_bars(shown: bool) -> Generator[None]:
    """Hide the library's progress bars inside the block, unless they are `shown`."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(library_name="minimind-ray")


def data_set(source: str) -> HubRef:
    """Return the data set that hf://datasets/OWNER/NAME[@REVISION] names. Its `name` is datasets/OWNER/NAME.

    Raises:
        UserError: the text is not of this form.
    """
    found = _DATA.fullmatch(source)
    if found is None:
        raise UserError(f"{source} is not a data set of the hub: write hf://datasets/OWNER/NAME")
    return HubRef(found[1], found[2])


def file_sizes(source: HubRef, names: Sequence[str]) -> tuple[HubRef, dict[str, int]]:
    """Return a data set with its commit, and the sizes of these files in bytes.

    Raises:
        UserError: the data set or a file does not exist, or the hub refuses it or cannot be reached.
    """
    repo = source.name.removeprefix("datasets/")
    ask = partial(_api().dataset_info, repo, revision=source.revision, files_metadata=True, timeout=TIMEOUT)
    with hub_errors(source):
        info = _patiently(ask)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    if absent := [name for name in names if name not in sizes]:
        raise UserError(f"{source} has no file {', '.join(absent)}")
    return replace(source, revision=info.sha), {name: sizes[name] for name in names}


def download_file(source: HubRef, name: str, folder: Path) -> None:
    """Download a file of a data set into a folder. Continues a download that was cut. Raises as `file_sizes`."""
    from huggingface_hub import hf_hub_download

    repo = source.name.removeprefix("datasets/")
    with hub_errors(source), _progress_bars(sys.stderr.isatty()):
        hf_hub_download(repo, name, repo_type="dataset", revision=source.revision, local_dir=folder)


def size_text(size: int) -> str:
    """Return a number of bytes as text, such as 1.2 GB."""
    unit, name = (1e9, "GB") if size >= 1e9 else (1e6, "MB") if size >= 1e5 else (1e3, "kB")
    return f"{size / unit:.1f} {name}"


def require_token() -> None:
    """Check that there is a token, without which nothing can be uploaded.

    Raises:
        UserError: there is no token.
    """
    import huggingface_hub

    if not huggingface_hub.get_token():
        raise UserError(
            f"there is no token for {huggingface_hub.constants.ENDPOINT}: set HF_TOKEN, or use hf auth login, with a "
            "token that may write"
        )


def upload(repo: str, files: Mapping[str, Path | bytes], *, private: bool, revision: str | None, message: str) -> str:
    """Upload files to a model's repository in one commit, and return the commit's address.

    `files` has a local path or the content for each name in the repository. The repository and the branch `revision`
    are made if there are none. Files that the repository has already are not sent again.

    Raises:
        UserError: the hub refuses it, has no such owner, or cannot be reached; or the repository is public although
            `private` is given.
    """
    from huggingface_hub import CommitOperationAdd

    api = _api()
    additions = [CommitOperationAdd(name, str(c) if isinstance(c, Path) else c) for name, c in files.items()]
    with _upload_errors(repo), _progress_bars(sys.stderr.isatty()):
        # None: the owner's own default holds for a new repository.
        _patiently(partial(api.create_repo, repo, private=private or None, exist_ok=True))
        if private and not _patiently(partial(api.model_info, repo, timeout=TIMEOUT)).private:
            raise UserError(f"{repo} exists and is public: make it private in its settings, or leave --private out")
        if revision:
            _patiently(partial(api.create_branch, repo, branch=revision, exist_ok=True))
        commit = partial(api.create_commit, repo, additions, commit_message=message, revision=revision)
        return str(_patiently(commit).commit_url)


@contextmanager
def _upload_errors(repo: str) -> Generator[None]:
    """Turn an error of the library during an upload into a UserError that says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise _upload_sentence(repo, error) from None


def _upload_sentence(repo: str, error: BaseException) -> Exception:
    from huggingface_hub import constants, errors

    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # The library hides the hub's answer behind "Error while uploading".
    hub, status = constants.ENDPOINT, getattr(getattr(error, "response", None), "status_code", None)
    owner = repo.partition("/")[0]
    if constants.HF_HUB_OFFLINE or isinstance(error, errors.OfflineModeIsEnabled):
        return UserError(f"{repo} cannot be uploaded while HF_HUB_OFFLINE is set")
    if isinstance(error, ValueError) and "Invalid metadata" in str(error):
        return UserError(f"{hub} refuses the header of README.md: {one_line(error)}")
    reasons = {
        401: f"{hub} does not accept your token: check HF_TOKEN, or use hf auth login",
        403: f"your token may not write there: check the name of the owner, {owner}, and the rights of the token",
        404: f"{hub} has no user or organisation {owner}, or your token may not see it: check --repo",
        409: "somebody else is changing the repository: try again",
        429: f"{hub} allows no more requests for now: wait, and try again",
    }
    if status in reasons:
        return UserError(f"{repo}: {reasons[status]} (status {status})")
    if status and status < 500:
        return UserError(f"{repo}: {hub} refuses the upload (status {status}): {one_line(error)}")
    if status:
        return UserError(f"{repo}: {hub} answered with status {status}: try again later")
    if isinstance(error, errors.HFValidationError):
        return UserError(f"{repo} is not a name of the hub: write OWNER/NAME")
    if isinstance(error, OSError) and error.errno in DISK:
        return error
    if "xet-write-token" in str(error) and "404" in str(error):  # The client's Rust part raises errors without status.
        return UserError(f"{repo}: {hub} has no Xet storage: set HF_HUB_DISABLE_XET=1, and give the same command again")
    return UserError(
        f"{repo}: {hub} cannot be reached, or the upload was cut ({one_line(error)}): check the network, and give the "
        "same command again"
    )
