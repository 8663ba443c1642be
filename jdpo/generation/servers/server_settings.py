"""The settings of a server: its address, and how it is asked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from urllib.parse import urlsplit

from jdpo.config.addresses import public_text


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The address of a server, and how it is asked.

    Attributes:
      url: its address, which usually ends in /v1.
      model: the name of the model; None: the only one that the server lists.
      api_key_env: the environment variable that holds the API key; the key is "none" if it is not set.
      concurrency: largest number of requests at a time.
      timeout: seconds until a request counts as failed.
      retries: how often a failed request is sent again.
      backoff: seconds before the first of them, doubled before each further one.

    Raises:
      ValueError: a value is out of range, or the address holds a password.
    """

    url: str
    model: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 32
    timeout: float = 600.0
    retries: int = 5
    backoff: float = 1.0

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"concurrency: expected 1 or more, found {self.concurrency}")
        # Not `<= 0`, so that NaN is refused as well.
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout: expected seconds above 0, found {self.timeout}")
        if self.retries < 0:
            raise ValueError(f"retries: expected 0 or more, found {self.retries}")
        try:
            parts = urlsplit(self.url)
            found = parts.scheme in ("http", "https") and parts.hostname
        except ValueError:
            found = None
        if not found:
            raise ValueError(f"expected the address of a server, as http://localhost:8000/v1, found {self.shown!r}")
        if "@" in parts.netloc or parts.query:
            raise ValueError(
                f"{self.shown}: the address of a server may not hold a password or a query, since it is written to "
                f"files; put the API key into the environment variable {self.api_key_env}"
            )

    @property
    def shown(self) -> str:
        """The address without anything that may be secret, for messages and files."""
        return public_text(self.url).rstrip("/")
