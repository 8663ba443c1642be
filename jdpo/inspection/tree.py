"""Turns a document of `jdpo.inspection.document` into the parts that terminal and page show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jdpo.inspection.data_faults import SEVERITIES
from jdpo.reports.data_summary import nodes
from jdpo.reports.data_summary.nodes import Data, Heading, Node, Paragraph, Section, Words
from jdpo.reports.data_summary.part_tree import part_section
from jdpo.reports.data_summary.row_statistics import Json
from jdpo.words import figure, percent


def report_of(document: Json) -> nodes.Report:
    """Returns the report of a document; findings come last, where the terminal still shows them at the end."""
    sections = [
        part_section("train", "Training rows", document["train"]),
        Section("steps", "Steps, padding and packing", [Paragraph(text) for text in _steps(document)]),
    ]
    if document["eval"] is not None:
        sections.append(part_section("eval", "Evaluation rows", document["eval"], _leakage(document)))
    if document["rows"]:
        title = f"The first {figure(len(document['rows']), 'row')} of the run, token by token"
        sections.append(Section("rows", title, list(_token_rows(document["rows"]))))
    title = f"What jdpo {document['command']} would train on"
    return nodes.Report(title, list(_facts(document)), [*sections, _findings(document["findings"])])


def _facts(document: Json) -> Iterator[tuple[str, Words]]:
    config, model = document["config"], document["model"]
    yield "jdpo", document["jdpo"]
    yield "model", Data(config["model_name_or_path"])
    yield "command", f"jdpo {document['command']} ({document['command_chosen_by']})"
    prompt = "" if config["max_prompt_length"] is None else f", {config['max_prompt_length']:,} of the prompt"
    yield "tokens", f"at most {config['max_length']:,} per sequence{prompt}"
    template = f"{'with' if model['has_chat_template'] else 'without'} a chat template"
    ends = Data(" ".join(model["end_tokens"]) or "none")
    yield "tokenizer", (f"{template}; BOS ", Data(model["bos"] or "none"), "; answers end in ", ends)
    for note in model["notes"]:
        yield "note", Data(note)


def _steps(document: Json) -> Iterator[str]:
    steps, costs = document["steps"], document["steps"]["costs"]
    rows = figure(steps["rows_per_step"], "pair" if document["command"] == "dpo" else "row")
    yield (
        f"{steps['epoch'][:1].upper()}{steps['epoch'][1:]}. That is {figure(steps['per_epoch'], 'step')} of {rows} per "
        f"epoch and {steps['of_run']:,} in the whole run, with {steps['tokens_per_step']:,.0f} tokens per step and "
        f"{steps['tokens_per_epoch']:,.0f} per epoch."
    )
    yield (
        f"Counted over {figure(costs['steps'], 'step')}: a trainer that pads every sequence to the longest of its step "
        f"computes {costs['padded_positions']:,} positions for {costs['sequence_tokens']:,} tokens; "
        f"{percent(costs['padded_padding'])} of them are padding."
    )
    examples, slots = costs["rows_per_device"], costs["tokens_per_device"]
    capacity = figure(examples, "example") if slots is None else f"{slots:,} slots"
    yield (
        f"Packed rows (one row of up to {capacity} on each of {figure(costs['devices'], 'device')}) take "
        f"{costs['packed_slots']:,} slots, of which {percent(costs['packed_padding'])} are empty."
    )
    factors = f"{costs['fewer_by_packing']:.2f} from padding"
    if costs["sequence_tokens"] != costs["shared_tokens"]:
        factors += f", {costs['fewer_by_sharing_prompts']:.2f} from computing each prompt twice"
    yield (
        f"So padding needs {costs['fewer_in_all']:.2f} times as many positions as packing ({factors}). This is "
        "arithmetic, not a measurement: attention and the LM head scale differently, and so does a device that is not "
        "fully used."
    )


def _leakage(document: Json) -> Iterator[Node]:
    leakage = document["leakage"]
    yield Heading("Prompts in both training and evaluation")
    yield Paragraph(f"{leakage['rows']:,} of {document['eval']['rows_kept']:,} evaluation rows have a training prompt.")
    for one in leakage["examples"]:
        yield Paragraph((Data(one["eval"]), " has the prompt of ", Data(one["train"])))


def _token_rows(rows: Sequence[Json]) -> Iterator[Node]:
    yield Paragraph(
        # Python code reads this, too, so an option comes with its command.
        "· is a space, ⏎ a line feed, ⇥ a tab; special tokens are shown by name. The ids of tokens are under the "
        "pointer on the page, and in the terminal with `jdpo inspect --ids`."
    )
    for number, row in enumerate(rows, 1):
        segments = []
        for one in row["segments"]:
            learnt = "learnt" if one["learnt"] else "not learnt"
            name = one["name"] if one["name"] == learnt else f"{one['name']}, {learnt}"
            segments.append((f"{name}, {figure(one['num_tokens'], 'token')}", one["name"], one["pieces"]))
        yield nodes.TokenRow((f"Row {number}: ", Data(row["origin"])), segments)


def _findings(findings: Sequence[Json]) -> Section:
    counts = [figure(sum(one["severity"] == severity for one in findings), severity) for severity in SEVERITIES]
    found = []
    for one in findings:
        lines = [("first", Data(one["first"] or "")), ("effect", one["effect"]), ("to do", one["remedy"])]
        summary = f"{one['summary']} [{one['name']}]"
        found.append(nodes.Finding(one["severity"], summary, lines if one["first"] else lines[1:]))
    return Section("findings", f"Findings: {', '.join(counts)}", found)
