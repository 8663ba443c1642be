"""The options of commands that ask a server: for answers, with the source that they describe, and for judges."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdpo.cli.option_types import count, first_given
from jdpo.cli.parsing import spellings
from jdpo.safe_text import terminal

if TYPE_CHECKING:
    from jdpo.generation.servers.endpoint import EndpointSource
    from jdpo.generation.servers.served_source import ServedSource
    from jdpo.generation.values import Sampling

_OF_A_SERVER = ("endpoint_model", "api_key_env", "concurrency", "timeout", "retries", "serve_timeout")
_OF_A_PROCESS = ("dtype", "revision", "chat_template", "mesh_data", "mesh_fsdp", "mesh_expert", "mesh_tensor")
"""Options of a model in this process, which a server does not read."""


def add_server_options(group: Any) -> None:
    """Adds the options. None of them has a default here, so that those that were given can be told."""
    group.add_argument(
        "--endpoint",
        metavar="URL",
        help="Ask the server at this address, such as http://localhost:8000/v1, instead of a MODEL in this process. "
        "Any server with an OpenAI-compatible API will do: vLLM, SGLang, `transformers serve`.",
    )
    group.add_argument(
        "--serve",
        metavar="COMMAND",
        help="Start this server, ask it, and end it, such as 'vllm serve {model} --port {port}'; {model} is MODEL. Its "
        "output is in GEN/server.log.",
    )
    group.add_argument(
        *spellings("--endpoint_model"),
        metavar="NAME",
        help="The server's name of the model; by default the only one that it lists.",
    )
    _add_request_options(group)
    group.add_argument(
        *spellings("--serve_timeout"),
        type=float,
        metavar="SECONDS",
        help="Time for the server of --serve to start (default: 1800).",
    )


def add_judge_options(group: Any) -> None:
    """Adds the options of a judge on a server."""
    group.add_argument("--rubric", metavar="FILE", help="Text that tells the judge what makes an answer better.")
    group.add_argument(*spellings("--judge_model"), metavar="NAME", help="The server's model, if it has several.")
    _add_request_options(group)


def _add_request_options(group: Any) -> None:
    group.add_argument(
        *spellings("--api_key_env"),
        metavar="NAME",
        help="The environment variable that holds the API key (default: OPENAI_API_KEY).",
    )
    group.add_argument(
        "--concurrency", type=count, metavar="N", help="Largest number of requests at a time (default: 32)."
    )
    group.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="Time after which a request has failed (default: 600)."
    )
    group.add_argument(
        "--retries", type=int, metavar="N", help="How often a failed request is sent again (default: 5)."
    )


def asks_a_server(asked: argparse.Namespace, parser: argparse.ArgumentParser) -> bool:
    """Returns whether the options name a server; refuses options that would not be read.

    Raises:
      ValueError: MODEL, --endpoint and --serve do not go together, or an option belongs to the other way of answering.
    """
    if asked.endpoint is None and asked.serve is None:
        if asked.model is None:
            raise ValueError("expected MODEL, the model to ask, or the address of a server with --endpoint")
        if given := first_given(asked, _OF_A_SERVER, parser):
            raise ValueError(f"{given} is an option of --endpoint and --serve; give one of these, or leave it out")
        return False
    if asked.endpoint is not None and asked.serve is not None:
        raise ValueError("--endpoint names a server that runs, and --serve starts one; give one of them")
    if asked.endpoint is not None and asked.model is not None:
        raise ValueError(
            f"MODEL ({terminal(asked.model)}) is asked in this process, and --endpoint names a server; leave MODEL "
            "out, and name the server's model with --endpoint_model"
        )
    if asked.endpoint is not None and (given := first_given(asked, ("serve_timeout",), parser)):
        raise ValueError(f"{given} is an option of --serve; --endpoint starts no server")
    if asked.serve is not None and (asked.model is None or "{model}" not in asked.serve):
        raise ValueError(
            "--serve: expected MODEL, and {model} in the command where it goes, such as "
            "'vllm serve {model} --port {port}'"
        )
    if given := first_given(asked, _OF_A_PROCESS, parser):
        raise ValueError(f"{given} is read for a MODEL in this process; with a server, give it to the server")
    return True


def server_source(
    asked: argparse.Namespace,
    sampling: Sampling,
    template_kwargs: Mapping[str, Any] | None,
    on_answer: Callable[[int], None],
    log: Callable[[str], None],
) -> EndpointSource | ServedSource:
    """Returns the source that the options describe, to be used as a context."""
    from jdpo.generation.servers.endpoint import EndpointSource
    from jdpo.generation.servers.served_source import LOG_FILE, ServedSource, Serving
    from jdpo.generation.servers.server_settings import ServerSettings

    names = ("api_key_env", "concurrency", "timeout", "retries")
    given = {name: value for name in names if (value := getattr(asked, name)) is not None}
    if asked.serve is None:
        settings = ServerSettings(url=asked.endpoint, model=asked.endpoint_model, **given)
        return EndpointSource(settings, sampling, template_kwargs=template_kwargs, on_answer=on_answer)
    start = {"start_seconds": asked.serve_timeout} if asked.serve_timeout is not None else {}
    log_file = Path(asked.output_dir) / LOG_FILE
    serving = Serving(command=asked.serve, model=_servable(asked.model), log_file=log_file, **start)
    settings = ServerSettings(url="http://localhost/v1", model=asked.endpoint_model, **given)
    return ServedSource(serving, settings, sampling, template_kwargs=template_kwargs, on_answer=on_answer, log=log)


def _servable(model: str) -> str:
    """Returns a folder or hub name that a server can load; the exported model of a run.

    Raises:
      ValueError: it is a run without one, a checkpoint, or an adapter.
    """
    path = Path(model).expanduser()
    if (path / "config.json").is_file() or not path.is_dir():
        return model
    if (path / "model" / "config.json").is_file():
        return str(path / "model")
    raise ValueError(
        f"{terminal(model)} is no model folder that a server can load (it has no config.json); write one with "
        f"`jdpo export {terminal(model)} OUT --merge`, and give OUT"
    )
