"""Finds the local folder of a model, downloading it if necessary."""

from __future__ import annotations

import os
import re
from fnmatch import fnmatch
from pathlib import Path

from jdpo.safe_text import terminal

SAFETENSORS_GLOB = "*.safetensors"
_PATTERNS = ["*.json", "*.jinja", "tokenizer*", "*.model", "vocab*", "merges.txt"]
_TEMPLATES_GLOB = "additional_chat_templates/*.jinja"
# The same weights a second time: Mistral's own format, and folders such as `original/` of gpt-oss.
_IGNORED = ["consolidated*.safetensors", "*/*.safetensors"]
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*://")
_BIN_GLOBS = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve_folder(name_or_path: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Returns the local folder of a model.

    Folders of stores and hub repositories are downloaded once and cached, those of stores in
    `$XDG_CACHE_HOME/jdpo/models`. Only safetensors, JSON, tokenizer and template files are downloaded.

    Args:
      name_or_path: a local folder, the address of a folder on a store, or a Hugging Face hub id.
      revision: branch, tag or commit of a hub repository.
      weights: False skips safetensors files, which then need not exist.

    Raises:
      ValueError: nothing at that path, no such repository, no network and not cached, or no safetensors in it.
    """
    if _ADDRESS.match(name_or_path):
        return _from_store(name_or_path, revision, weights=weights)
    path = Path(name_or_path).expanduser()
    # A local folder takes precedence over a hub repository of the same name, as in transformers.
    if path.is_dir():
        _refuse_special_files(path)
        _refuse_run(path)
        if weights:
            _require_safetensors(path, str(path))
        return path
    if path.exists():
        raise ValueError(f"model {name_or_path!r} is a file; expected a folder with config.json and *.safetensors")
    if _looks_like_path(name_or_path):
        raise ValueError(
            f"model folder {name_or_path!r} does not exist (looked in {path.absolute()}); "
            "give a Hugging Face model folder, or a hub name like org/name"
        )
    folder = _download(name_or_path, revision, [*_PATTERNS, *([SAFETENSORS_GLOB] if weights else [])])
    if weights:
        _require_safetensors(folder, name_or_path)
    return folder


def _from_store(url: str, revision: str | None, *, weights: bool) -> Path:
    from jdpo.models.weights.remote_folder import fetch_folder, matches

    if revision is not None:
        raise ValueError(f"model {url}: revision {revision!r} applies to hub repositories only; remove it")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jdpo" / "models"
    is_wanted = matches((*_PATTERNS, *((SAFETENSORS_GLOB,) if weights else ())))
    folder = fetch_folder(url, home, lambda name: is_wanted(name) and not matches(tuple(_IGNORED))(name))
    if weights:
        _require_safetensors(folder, url)
    return folder


def _looks_like_path(name: str) -> bool:
    # A hub id is "name" or "owner/name".
    return name.startswith((".", "/", "~")) or name.endswith("/") or "\\" in name or name.count("/") > 1


def _download(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, ignore_patterns=_IGNORED))
    except HFValidationError as error:
        raise ValueError(f"model {repo_id!r}: no such local folder, and not a valid hub id: {error}") from error
    # A subclass of RepositoryNotFoundError, so it comes first.
    except GatedRepoError as error:
        raise ValueError(
            f"model {repo_id!r} is gated: accept its terms on huggingface.co/{repo_id}, "
            "then log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"model {repo_id!r}: no such local folder, and no such repository on the Hugging Face hub "
            "(a private one needs `hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"model {repo_id!r} has no revision {revision!r} on the Hugging Face hub") from error
    # A subclass of OSError, so it comes first.
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"model {repo_id!r}{at}: no such local folder, the hub cannot be reached (or HF_HUB_OFFLINE=1 is set) "
            "and the local cache does not hold it; download it on a machine with network, or give a local folder"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"model {repo_id!r}{at}: the download from the hub failed: {error}") from error


def _refuse_special_files(folder: Path) -> None:
    """Refuses a folder in which a pipe or a device has the name of a model file, since reading it could wait forever.

    Raises:
      ValueError: there is such a file, which is named, or the folder cannot be listed.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ValueError(f"model folder {folder} cannot be listed: {error.strerror or error}") from error
    for name in names:
        path = folder / name
        if any(fnmatch(name, pattern) for pattern in (*_PATTERNS, SAFETENSORS_GLOB)) and not path.is_dir():
            require_plain_file(path)
    for path in sorted(folder.glob(_TEMPLATES_GLOB)):
        require_plain_file(path)


def require_plain_file(path: Path) -> None:
    """Refuses a path that is a folder, a pipe, a socket or a device. A missing file is not an error here.

    Raises:
      ValueError: the path exists and is not a file.
    """
    if path.exists() and not path.is_file():
        found = "a folder" if path.is_dir() else "a pipe or a device"
        raise ValueError(f"{path}: expected a file of the model, found {found}; put the file itself there")


def _refuse_run(folder: Path) -> None:
    if not (folder / "run.json").is_file() or (folder / "config.json").is_file():
        return
    exported = folder / "model"
    if has_weights(exported):
        what = f"give {exported}, the model that it has exported"
    else:
        what = "it has not exported a model yet: finish the run, or export a checkpoint with `jdpo export`"
    raise ValueError(f"model {str(folder)!r} is the output_dir of a run; {what}")


def has_weights(folder: Path) -> bool:
    """Returns True if a folder has safetensors files, whatever they contain."""
    return any(folder.glob(SAFETENSORS_GLOB))


def _require_safetensors(folder: Path, name: str) -> None:
    if has_weights(folder):
        return
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"adapter {name!r} has no adapter_model.safetensors. jdpo does not read pickles such as adapter_model.bin; "
            'convert it in its folder with `python -c "import torch; from safetensors.torch import save_file; '
            "save_file(torch.load('adapter_model.bin', weights_only=True), 'adapter_model.safetensors')\"`"
        )
    pickles = sorted(path.name for pattern in _BIN_GLOBS for path in folder.glob(pattern))
    found = f"only {terminal(pickles[0])}" if pickles else "none"
    raise ValueError(
        f"model {name!r} has no *.safetensors weights (found: {found}). jdpo reads no other format; convert it with "
        f"`python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{name}')"
        f".save_pretrained('converted')\"` and copy the tokenizer files next to them"
    )
