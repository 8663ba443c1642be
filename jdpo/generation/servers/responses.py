"""Reading what a server sends: JSON, messages of errors, and how long to wait."""

from __future__ import annotations

import email.utils
import json
import math
import time
from typing import Any


class UnreadableReplyError(ValueError):
    """A reply that is not what the API promises."""


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise UnreadableReplyError(f"not JSON: {text[:100]!r}") from None
    if not isinstance(value, dict):
        raise UnreadableReplyError(f"expected a JSON object, found {text[:100]!r}")
    return value


def error_message(error: Any) -> str:
    """Returns a server's own words about an error."""
    body = error.body
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body.get("error") or body
    return str(body or error.response.text or error)


def retry_after(header: str | None) -> float:
    """Returns the seconds that a Retry-After header asks for, as a number or a date; 0 without one.

    >>> retry_after("2"), retry_after("0.5"), retry_after(None), retry_after("soon")
    (2.0, 0.5, 0.0, 0.0)
    """
    if header is None:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return 0.0
    return seconds if 0 < seconds < math.inf else 0.0
