"""Addresses in settings: passwords in them are refused, and queries, which may hold keys, are not written to files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jdpo.safe_text import terminal_lines

_USER = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<user>[^/?#\s]*)@")
# A question mark in s3:// or a path may be part of a name, so only web addresses have queries.
_QUERY = re.compile(r"(https?://[^?#\s]*)[?#]\S*", re.IGNORECASE)
_ONLY_NAMES = ("abfs", "abfss", "wasb", "wasbs", "hf", "sftp", "ssh", "ftp", "smb")
"""Schemes in which the part before the @ is the name of a user, a container or a repository, and no secret."""

_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)(://|::)(?P<rest>.*)", re.DOTALL)
_READ_ONLY = ("http", "https", "hf", "data", "git", "github")


def local_folder(path: str) -> str:
    """Returns the path of a folder to write, unless it is an address.

    >>> local_folder("runs/first")
    'runs/first'

    Raises:
      ValueError: saying what to do instead.
    """
    if _ADDRESS.match(path):
        raise ValueError(
            "expected a local or shared folder, found an address. A run locks, renames and appends to its files, which "
            "object stores cannot do. Choose a folder on a disk (with several hosts, on one that they share); and, to "
            f"keep a copy of the run in the object store, set `mirror: {public_text(path)}`"
        )
    return path


def on_a_disk(path: str) -> str:
    """Returns the path of a folder to write that no mirror can have, unless it is an address.

    Raises:
      ValueError: saying what to do instead.
    """
    if _ADDRESS.match(path):
        raise ValueError(
            "expected a local or shared folder, found an address. Its files are locked and renamed, which object "
            "stores cannot do; choose a folder on a disk"
        )
    return path


def as_mirror(url: str) -> str:
    """Returns the address of a folder in a store that can be written, without a slash at its end.

    >>> as_mirror("s3://bucket/runs/first/")
    's3://bucket/runs/first'

    Raises:
      ValueError: it is no such address.
    """
    found = _ADDRESS.match(url)
    if found is None or "::" in url:
        raise ValueError("expected an address such as s3://bucket/runs/first or gs://bucket/runs/first")
    if found["scheme"].lower() in _READ_ONLY:
        raise ValueError("expected a store that can be written, such as s3:// or gs://")
    # All objects under the address belong to the run.
    if "/" not in found["rest"].strip("/") and found["scheme"] != "file":
        raise ValueError(f"expected a folder in a bucket, such as {found['scheme']}://bucket/runs/first")
    return url.rstrip("/")


def shown_text(text: str) -> str:
    """Returns text as it may be shown in a terminal: without passwords in addresses, and without control characters."""
    return terminal_lines(public_text(text))


def refuse_passwords(values: Any, key: str = "") -> None:
    """Refuses settings with an address that holds a password, a key or a token, since settings are written to files.

    Args:
      values: the settings as plain values.
      key: the key whose value they are.

    Raises:
      ValueError: naming the key, but not the address.
    """
    if isinstance(values, Mapping):
        for name, value in values.items():
            refuse_passwords(value, f"{key}.{name}".lstrip("."))
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            refuse_passwords(value, f"{key}.{index}")
    elif isinstance(values, str):
        for match in _USER.finditer(values):
            if not _is_name(match):
                raise ValueError(
                    f"{key!r}: an address may not hold a password, a key or a token before its @, since settings "
                    "are written to files that others read. Leave it out, and give it to the store in the environment "
                    "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN) or in "
                    "fsspec's own config (~/.config/fsspec/conf.json, or FSSPEC_<PROTOCOL>_<OPTION>)"
                )


def _is_name(login: re.Match[str]) -> bool:
    """Returns whether the part before the @ is only a name."""
    # A colon separates a name from its password.
    return ":" not in login["user"] and login["scheme"].lower() in _ONLY_NAMES


def public_text(text: str) -> str:
    """Removes from the addresses in a text whatever may be a password, a key or a signature.

    >>> public_text("zip://a.csv::https://me:secret@host/a.zip?sig=0a1b"), public_text("s3://KEY:secret@bucket/why?.csv")
    ('zip://a.csv::https://host/a.zip', 's3://bucket/why?.csv')
    """
    found: str = without_queries(text)
    return _USER.sub(lambda login: login[0] if _is_name(login) else f"{login['scheme']}://", found)


def without_queries(value: Any) -> Any:
    """Removes the queries of web addresses, which may be signatures or tokens; leaves everything else as it is.

    >>> without_queries({"path": "https://host/rows.jsonl?X-Amz-Signature=0a1b", "split": "train"})
    {'path': 'https://host/rows.jsonl', 'split': 'train'}
    >>> without_queries("s3://bucket/why?.csv")
    's3://bucket/why?.csv'
    """
    if isinstance(value, Mapping):
        return {key: without_queries(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(without_queries, value))
    return _QUERY.sub(r"\1", value) if isinstance(value, str) else value
