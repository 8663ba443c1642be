"""A model folder to a repository of the Hugging Face hub: only when asked, and private unless asked otherwise.

The token is the one that huggingface_hub finds (HF_TOKEN, or `hf auth login`); nothing here takes, keeps or prints it.
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
"""Files that loaders pick weights by: one that an older push left beside the new ones would be taken for the model."""


def check_push(repo_id: str) -> None:
    """Asks the hub who the token belongs to, so that a push can be refused before the work and not behind it.

    Raises:
      ValueError: the name is none that the hub can have, there is no token, or the hub does not take it.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import validate_repo_id

    with _explained(repo_id, "Nothing was done yet"):
        validate_repo_id(repo_id)
        if get_token() is None:
            raise ValueError(
                f"push_to_hub {repo_id}: no token to write with; log in with `hf auth login`, or set HF_TOKEN"
            )
        HfApi().whoami()


def push_folder(folder: Path, repo_id: str, *, public: bool, message: str) -> str:
    """Uploads a folder as one commit to a model repository, which is made where there is none.

    Weights of an older push that the folder does not have, such as shards where it has one file, are deleted, and so
    are files of an older tokenizer, such as another chat template.

    Args:
      public: whether a new repository is to be seen by everyone; a push that is not meant to be public is refused
        where the repository is.
      message: of the commit.

    Returns:
      the address of the repository.

    Raises:
      ValueError: the hub cannot be reached or refuses; or the repository is public and the push is not.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _explained(repo_id, f"The model stands whole in {folder}; the same command again goes on with the push"):
        # The hub's answer has the full name where the owner was left out.
        url: Any = api.create_repo(repo_id, private=not public, exist_ok=True)
        full_name = str(url.repo_id)
        if not public and not api.repo_info(full_name).private:
            raise ValueError(
                f"push_to_hub {full_name}: that repository is public; say so (--public, or push_public: true in a "
                "config), or choose another name. Nothing was uploaded"
            )
        stale = [name for name in api.list_repo_files(full_name) if _is_stale(name, folder)]
        api.upload_folder(
            repo_id=full_name,
            folder_path=str(folder),
            commit_message=message,
            ignore_patterns=[MARKER],
            delete_patterns=[glob.escape(name) for name in stale] or None,
        )
    return str(url)


def _is_stale(name: str, folder: Path) -> bool:
    """Tells whether a file of the repository is left from older weights, or from an older tokenizer under a new one.

    Files in folders of the repository are of something else.
    """
    of_weights = any(fnmatch(name, pattern) for pattern in _WEIGHTS)
    of_tokenizer = (folder / CONFIG_NAME).is_file() and is_tokenizer_file(name)
    return "/" not in name and (of_weights or of_tokenizer) and not (folder / name).is_file()


@contextlib.contextmanager
def _explained(repo_id: str, state: str) -> Iterator[None]:
    """Makes errors of the hub a ValueError; `state` says what was done by then and what to do."""
    # The error of the HTTP client underneath, whose package differs between versions, has its name there.
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"push_to_hub {repo_id!r}: not a name that the hub can have: {error}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        what = {401: "it does not know the token", 403: "the token may not write there"}.get(status, str(error))
        raise ValueError(f"push_to_hub {repo_id}: the hub refused: {what}. {state}") from None
    except RuntimeError as error:  # of a thread that uploads a file
        raise ValueError(f"push_to_hub {repo_id}: {error} {error.__cause__ or ''}".rstrip() + f". {state}") from None
    except (HTTPError, OSError) as error:  # no network, or HF_HUB_OFFLINE=1
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"push_to_hub {repo_id}: the hub cannot be reached: {why}. {state}") from None
