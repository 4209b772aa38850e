"""The Hub: ids of repositories, downloads, and which repository a folder of the local cache is a snapshot of."""

from __future__ import annotations

import os
import re
from pathlib import Path

from quantcli.errors import CheckpointError

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(@(?P<revision>[\w./-]+))?")

HUB_PATTERNS = [
    *("*.safetensors", "*.json", "*.model", "*.model.v[0-9]", "*.tiktoken", "*.jinja", "*.txt", "*.py", "*.md", "*.yaml", "*.yml"),
    *("LICENSE", "LICENCE", "LICENSE.pdf", "NOTICE", "USE_POLICY", ".gitattributes"),
]
"""Weights, config, tokenizer files, chat templates, modules, licences and model card: all that is read or copied, and no pickle."""


def repository_of(folder: Path) -> str | None:
    """The repository, org/name, that ``folder`` is a snapshot of in the Hub's cache: …/models--org--name/snapshots/<commit>; or None."""
    for path in (Path(os.path.abspath(folder)), Path(os.path.realpath(folder))):
        cache = path.parent.parent.name
        if path.parent.name == "snapshots" and cache.startswith("models--"):
            return cache.removeprefix("models--").replace("--", "/", 1)
    return None


def blobs_of(folder: Path) -> Path | None:
    """Where the links of a snapshot in the Hub's cache lead; None for any other folder."""
    return None if repository_of(folder) is None else Path(os.path.realpath(folder)).parent.parent / "blobs"


def model_name(source: str) -> str:
    """What the model at ``source`` is called: its file's, folder's or repository's name."""
    path = Path(source).expanduser()
    if not path.exists():
        return source.partition("@")[0].rpartition("/")[2]
    if not path.is_dir():
        return path.name
    repository = repository_of(path)
    return path.resolve().name if repository is None else repository.rpartition("/")[2]


def download(repo: str, revision: str | None) -> Path:
    """The snapshot of a Hub repository in the local cache. ``HF_HOME``, ``HF_ENDPOINT`` and ``HF_TOKEN`` are huggingface_hub's to read."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=HUB_PATTERNS))
    except Exception as error:  # the library's transport, and with it the class of its network errors, changes between versions
        name = repo if revision is None else f"{repo}@{revision}"
        raise CheckpointError(f"{name}: {hub_way_out(error)}") from error


def hub_way_out(error: Exception) -> str:
    """What the user can do about an error of huggingface_hub."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "access is gated; accept its terms on the Hub and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository on the Hub, or a private one (set HF_TOKEN), and no such local folder"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "no such local folder, not in the local cache, and the Hub cannot be reached; connect, or check HF_ENDPOINT"
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return f"the download failed ({reason}); try again, or give a local folder"
