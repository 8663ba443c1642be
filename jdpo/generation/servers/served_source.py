"""Answers from a server that is started for them."""

from __future__ import annotations

import contextlib
import functools
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from jdpo.file_digests import files_digest
from jdpo.generation.servers.endpoint import EndpointSource
from jdpo.generation.servers.server_process import START_SECONDS, running_server, server_words, shown_command
from jdpo.generation.servers.server_settings import ServerSettings
from jdpo.generation.values import Answer, Question, Sampling, Unanswered

LOG_FILE = "server.log"

_READ_BY_SERVERS = ("*.json", "*.jinja", "*.model", "*.safetensors")
"""Files of a model folder that decide answers: weights, configs (also of the generation), tokenizer, chat template."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """The command line of a server to start; see `running_server`.

    Raises:
      ValueError: the command cannot start a server.
    """

    command: str
    model: str
    log_file: Path
    start_seconds: float = START_SECONDS

    def __post_init__(self) -> None:
        server_words(self.command, model=self.model, port=0)


class ServedSource:
    """Starts a server with the first questions, and ends it with the context."""

    def __init__(
        self,
        serving: Serving,
        settings: ServerSettings,
        sampling: Sampling,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        on_answer: Callable[[int], None] = lambda num_tokens: None,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        """
        Args:
          settings: how the server is asked; its address is replaced.
          sampling, template_kwargs, on_answer: see `EndpointSource`.
          log: is called with sentences on what happens to the server.
        """
        self._serving, self._settings, self._sampling = serving, settings, sampling
        self._template_kwargs, self._on_answer, self._log = dict(template_kwargs or {}), on_answer, log
        self._opened = contextlib.ExitStack()
        self._source: EndpointSource | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._opened.__exit__(*error)

    def describe(self) -> dict[str, Any]:
        """Returns the model that is served, with a digest of its files if it is a folder; the server need not run."""
        of_server = self._source.describe()["about"] if self._source else {}
        kwargs = {"template_kwargs": self._template_kwargs} if self._template_kwargs else {}
        # The path of a folder may change, and so may the model at a path.
        name = {"model_digest": self._digest} if self._digest else {"served_model": self._serving.model}
        about = {"model": self._serving.model, "serve": shown_command(shlex.split(self._serving.command))}
        return {**name, **kwargs, "about": {**about, **of_server}}

    @functools.cached_property
    def _digest(self) -> str:
        folder = Path(self._serving.model).expanduser()
        if not folder.is_dir():
            return ""
        return files_digest(sorted(path for pattern in _READ_BY_SERVERS for path in folder.glob(pattern)))

    def answers(
        self, questions: Sequence[Question], num_samples: int, following: Sequence[Question] = ()
    ) -> list[Answer | Unanswered]:
        """As `EndpointSource.answers`.

        Raises:
          OSError: the server does not start, or has stopped responding; the message has the end of its log.
        """
        if self._source is None:
            self._source = self._open()
        return self._source.answers(questions, num_samples, following)

    def _open(self) -> EndpointSource:
        serving = self._serving
        url = self._opened.enter_context(
            running_server(
                serving.command,
                model=serving.model,
                log_file=serving.log_file,
                start_seconds=serving.start_seconds,
                log=self._log,
            )
        )
        source = EndpointSource(
            replace(self._settings, url=url),
            self._sampling,
            template_kwargs=self._template_kwargs,
            on_answer=self._on_answer,
        )
        return self._opened.enter_context(source)
