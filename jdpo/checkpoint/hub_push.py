"""Pushes a model folder to a repository of the Hugging Face hub, which is private unless asked otherwise.

The token is the one that huggingface_hub finds (HF_TOKEN, or `hf auth login`); it is never stored or printed here.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from jdpo.checkpoint.output_folders import MARKER
from jdpo.checkpoint.tokenizer_export import CONFIG_NAME, is_tokenizer_file

_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin*",
    "adapter_config.json",
    "adapter_model.*",
)
"""Files that loaders look for: one that remains from an older push would be mistaken for the model."""


def check_push(repo_id: str) -> None:
    """Checks name and token with the hub, so that a push is refused before the work and not after it.

    Raises:
      ValueError: the name is not a valid hub id, there is no token, or the hub does not accept it.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import validate_repo_id

    with _explained(repo_id, "Nothing was done"):
        validate_repo_id(repo_id)
        if get_token() is None:
            raise ValueError(f"push_to_hub {repo_id}: there is no token; log in with `hf auth login`, or set HF_TOKEN")
        HfApi().whoami()


def push_folder(folder: Path, repo_id: str, *, public: bool, message: str) -> str:
    """Uploads a folder as one commit to a model repository, which is created if it does not exist.

    Weight files of an older push that the folder does not have are deleted, and so are files of an older tokenizer,
    such as another chat template.

    Args:
      public: True makes a new repository public; False refuses to push to a repository that is public.
      message: the commit message.

    Returns:
      the address of the repository.

    Raises:
      ValueError: the hub cannot be reached or refuses, or the repository is public and `public` is False.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _explained(repo_id, f"The complete model is in {folder}; run the same command again to continue the push"):
        # The hub's answer has the full name even if the owner was omitted.
        url: Any = api.create_repo(repo_id, private=not public, exist_ok=True)
        full_name = str(url.repo_id)
        if not public and not api.repo_info(full_name).private:
            raise ValueError(
                f"push_to_hub {full_name}: that repository is public; allow it (--public, or push_public: true in "
                "a config) or choose another name. Nothing was uploaded"
            )
        stale = [name for name in api.list_repo_files(full_name) if _is_stale(name, folder)]
        api.upload_folder(
            repo_id=full_name,
            folder_path=str(folder),
            commit_message=message,
            # The marker is only for jdpo's own folders on a disk.
            ignore_patterns=[MARKER],
            # These are patterns, so the characters of a name must not act as wildcards.
            delete_patterns=[glob.escape(name) for name in stale] or None,
        )
    return str(url)


def _is_stale(name: str, folder: Path) -> bool:
    """Returns True for a file of the repository that remains from older weights or an older tokenizer.

    Files in subfolders of the repository are not ours.
    """
    of_weights = any(fnmatch(name, pattern) for pattern in _WEIGHTS)
    of_tokenizer = (folder / CONFIG_NAME).is_file() and is_tokenizer_file(name)
    return "/" not in name and (of_weights or of_tokenizer) and not (folder / name).is_file()


@contextlib.contextmanager
def _explained(repo_id: str, state: str) -> Iterator[None]:
    """Turns errors of the hub into a ValueError; `state` is a sentence on what was done so far and what to do."""
    # HTTPError is that of the HTTP client, whose package differs between versions of huggingface_hub.
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"push_to_hub {repo_id!r}: not a valid name for the hub: {error}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        what = {401: "the token is not valid", 403: "the token has no write access"}.get(status, str(error))
        raise ValueError(f"push_to_hub {repo_id}: the hub refused: {what}. {state}") from None
    except RuntimeError as error:  # from a thread that uploads a file
        raise ValueError(f"push_to_hub {repo_id}: {error} {error.__cause__ or ''}".rstrip() + f". {state}") from None
    except (HTTPError, OSError) as error:  # no network, or HF_HUB_OFFLINE=1
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"push_to_hub {repo_id}: the hub cannot be reached: {why}. {state}") from None
