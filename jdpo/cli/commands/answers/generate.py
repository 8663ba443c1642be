"""`jdpo generate MODEL --prompts FILE --output_dir GEN`: answers of a model to many prompts."""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdpo.cli.failures import leaving_on_signals
from jdpo.cli.model_options import add_model, add_sampling, log, log_model, refuse_clusters, sampling_of
from jdpo.cli.option_types import folder_to_write, not_empty
from jdpo.cli.parsing import Parser, add_help, spellings
from jdpo.cli.server_options import add_server_options, asks_a_server, server_source
from jdpo.safe_text import terminal
from jdpo.words import figure

if TYPE_CHECKING:
    from jdpo.generation.answer_manifest import Manifest
    from jdpo.generation.prompts import Prompts
    from jdpo.generation.values import Sampling
    from jdpo.generation.writing import AnswerSource

AXES = ("data", "fsdp", "expert", "tensor")

_MOST_NAMED = 5
"""Prompts without an answer that are named at the end; all are in the files."""


def parser() -> Parser:
    """Returns the parser of the command."""
    parser = Parser(
        "generate",
        "MODEL | --endpoint URL --prompts FILE --output_dir GEN [--n N] [--temperature T] ...",
        "Draws answers of a model to every prompt of a file, and writes them to GEN as shards of about "
        "--answers_per_shard answers. The command may be stopped at any time: run again with the same options, it "
        "continues after the last whole shard, and the files are the same as without the stop.",
    )
    arguments = parser.add_argument_group("Arguments")
    options = add_help(parser, keys=False)
    arguments.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        type=not_empty,
        help="A Hugging Face model folder or hub name, a PEFT adapter, the output_dir of a run (the model of a "
        "finished run, otherwise its newest checkpoint), or checkpoints/STEP of one.",
    )
    options.add_argument(
        "--prompts",
        required=True,
        type=not_empty,
        metavar="FILE",
        help="Prompts: a file, folder, URL or hub dataset with rows of any schema that jdpo reads, pairs included; "
        "answers in it are not used. A repeated prompt is asked once.",
    )
    options.add_argument(
        *spellings("--output_dir"), required=True, type=folder_to_write, metavar="GEN", help="The folder to write."
    )
    _add_sampling(parser.add_argument_group("Sampling"))
    _add_prompts(parser.add_argument_group("Prompts"))
    _add_model(parser.add_argument_group("Model"))
    add_server_options(parser.add_argument_group("Server"))
    options.add_argument(
        *spellings("--answers_per_shard"),
        type=int,
        default=256,
        metavar="N",
        help="Answers per file; a kill costs at most these (default: 256).",
    )
    return parser


def _add_sampling(group: Any) -> None:
    group.add_argument("--n", type=int, default=1, metavar="N", help="Answers to each prompt (default: 1).")
    add_sampling(group, max_new_tokens=1024)
    group.add_argument(
        *spellings("--top_k"),
        type=int,
        metavar="K",
        help="Draw from the K most probable tokens (default: from all).",
    )


def _add_prompts(group: Any) -> None:
    group.add_argument(
        "--split",
        default="train",
        type=not_empty,
        help="Split of a hub dataset; for files a slice such as train[:100] (default: train).",
    )
    group.add_argument("--name", type=not_empty, help="Configuration (subset) of a hub dataset.")
    group.add_argument(
        *spellings("--prompts_revision"), type=not_empty, metavar="REVISION", help="Hub revision of the prompts."
    )
    group.add_argument(
        *spellings("--column_map"),
        type=not_empty,
        metavar="MAP",
        help="Names of columns, as YAML: from jdpo's to those of the file, such as '{prompt: query}'.",
    )
    group.add_argument(
        *spellings("--num_prompts"), type=int, metavar="N", help="Ask the first N different prompts (default: all)."
    )
    group.add_argument(
        "--system",
        type=not_empty,
        metavar="TEXT",
        help="System turn of conversations that have none, and of plain text.",
    )
    group.add_argument(
        "--chat",
        action="store_true",
        help="Make plain text the user turn of a conversation. Without it plain text is continued as it is, without "
        "the chat template.",
    )


def _add_model(group: Any) -> None:
    add_model(group)
    group.add_argument("--revision", type=not_empty, help="Hub revision of the model.")
    group.add_argument(
        *spellings("--chat_template_kwargs"),
        type=not_empty,
        metavar="MAP",
        help="Variables for the chat template, as YAML, such as '{enable_thinking: false}'.",
    )
    for axis in AXES:
        default = -1 if axis == "fsdp" else 1
        group.add_argument(
            f"--mesh.{axis}",
            dest=f"mesh_{axis}",
            type=int,
            default=default,
            metavar="N",
            help=f"Devices along the axis {axis} of the mesh, as in a run (default: {default}).",
        )


def main(command: str, words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    assert command == "generate", command
    options = parser()
    asked = options.parse_args(words)
    asked.of_server = asks_a_server(asked, options)
    sampling = sampling_of(asked)
    try:
        with leaving_on_signals("the same command continues after the last whole shard"):
            manifest, prompts = _generate(asked, sampling, Path(asked.output_dir))
    except ConnectionError as error:
        raise ConnectionError(f"{error}\nThe same command continues after the last whole shard") from error
    return _report(Path(asked.output_dir), manifest, prompts)


def _generate(asked: argparse.Namespace, sampling: Sampling, folder: Path) -> tuple[Manifest, Prompts]:
    # Imported here, so that --help loads no jax.
    from jdpo.generation.pace import Pace
    from jdpo.generation.writing import check_counts, write_answers

    check_counts(asked.n, asked.answers_per_shard)
    prompts = _read_prompts(asked)
    # Before the model is loaded, so that a wrong file costs no time.
    for line in prompts.lines():
        log(line)
    pace = Pace(len(prompts.questions) * asked.n, log)
    with _source(asked, sampling, prompts, pace) as source:
        manifest = write_answers(
            folder,
            prompts,
            source,
            sampling=sampling,
            num_samples=asked.n,
            answers_per_shard=asked.answers_per_shard,
            log=log,
            skipped=pace.skip,
        )
    return manifest, prompts


def _read_prompts(asked: argparse.Namespace) -> Prompts:
    from jdpo.config import DatasetConfig
    from jdpo.generation.prompts import read_prompts

    if asked.num_prompts is not None and asked.num_prompts < 1:
        raise ValueError(f"num_prompts: expected 1 or more, found {asked.num_prompts}")
    dataset = DatasetConfig(
        path=asked.prompts,
        split=asked.split,
        name=asked.name,
        revision=asked.prompts_revision,
        column_map=_mapping(asked.column_map, "--column_map"),
    )
    return read_prompts(dataset, num_prompts=asked.num_prompts, system=asked.system, chat=asked.chat)


@contextlib.contextmanager
def _source(
    asked: argparse.Namespace, sampling: Sampling, prompts: Prompts, on_answer: Callable[[int], None]
) -> Iterator[AnswerSource]:
    """Opens the model or the server; while the block runs, compiled programs are kept for later runs."""
    refuse_clusters("generate", "; or give each process a --split and an --output_dir of its own")
    kwargs = _mapping(asked.chat_template_kwargs, "--chat_template_kwargs")
    if asked.of_server:
        with server_source(asked, sampling, kwargs, on_answer, log) as source:
            yield source
        return
    from jdpo.config import MeshConfig
    from jdpo.data.prepared.prepare import cache_folder
    from jdpo.generation.asking.model_source import ModelSource
    from jdpo.training.saved.opening import load
    from jdpo.training.setup.numerics import persistent_cache

    with persistent_cache(cache_folder(None) / "programs"):
        model = load(
            asked.model,
            dtype=asked.dtype,
            mesh=MeshConfig(**{axis: getattr(asked, f"mesh_{axis}") for axis in AXES}),
            revision=asked.revision,
            chat_template=asked.chat_template,
            chat_template_kwargs=kwargs,
        )
        for note in model.tokenizer.notes:
            log(f"tokenizer: {note}")
        log_model(model)
        plain = sum(isinstance(question.prompt, str) for question in prompts.questions)
        if plain and model.tokenizer.has_chat_template:
            log(
                f"note: {figure(plain, 'prompt')} in plain text: the chat template is not applied to them; --chat "
                "makes each the user turn of a conversation"
            )
        yield ModelSource(model, sampling, on_answer)


def _report(folder: Path, manifest: Manifest, prompts: Prompts) -> int:
    """Logs what is in the folder; returns the exit code."""
    from jdpo.generation.answer_files import read_unanswered

    if cut := sum(shard.cut_off for shard in manifest.shards):
        log(f"{cut:,} of {figure(manifest.num_answers, 'answer')} are cut off")
    # Rows of the prompts file, which users know, not ids.
    origins = {question.prompt_id: question.origin for question in prompts.questions}
    # reason -> the rows, each once and in order
    rows: dict[str, dict[str, None]] = defaultdict(dict)
    for one in itertools.chain.from_iterable(read_unanswered(folder, number) for number in range(len(manifest.shards))):
        rows[one.reason][origins[one.prompt_id]] = None
    for reason, count in manifest.unanswered.items():
        named = rows[reason]
        shown = ", ".join([*named][:_MOST_NAMED]) + (" ..." if len(named) > _MOST_NAMED else "")
        log(f"{figure(count, 'answer')} missing: {reason} ({figure(len(named), 'prompt')}: {shown})")
    print(f"done: {figure(manifest.num_answers, 'answer')} in {terminal(folder)}", flush=True)
    again = sum(shard.again for shard in manifest.shards)
    if again:
        log(f"the same command asks again for {figure(again, 'answer')} of these")
    return 0 if manifest.num_answers and not again else 1


def _mapping(text: str | None, option: str) -> dict[str, Any] | None:
    if text is None:
        return None
    import yaml

    from jdpo.config.yaml_text import load_yaml

    try:
        found = load_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{option}: expected a mapping in YAML, such as '{{prompt: query}}': {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{option}: expected a mapping in YAML, such as '{{prompt: query}}', found {text!r}")
    return found
