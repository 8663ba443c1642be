"""Addresses in settings: passwords in them are refused, and queries, which may hold keys, are not written to files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_USER = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<user>[^/?#\s]*)@")
# A question mark in s3:// or a path may be part of a name, so only web addresses have queries.
_QUERY = re.compile(r"(https?://[^?#\s]*)[?#]\S*", re.IGNORECASE)
_ONLY_NAMES = ("abfs", "abfss", "wasb", "wasbs", "hf", "sftp", "ssh", "ftp", "smb")
"""Schemes in which the part before the @ is the name of a user, a container or a repository, and no secret."""


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
