"""The inspection of a run in the terminal. Text of the data is never read as markup, nor sent as it stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jdpo.inspection.figure_words import (
    COLUMNS,
    KINDS_OF_TEXT,
    bias_sentences,
    cost_sentences,
    figure,
    length_rows,
    percent,
    range_of,
    repeat_rows,
    schemas_of,
    step_sentence,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Json = Mapping[str, Any]

MOST_WIDTH = 110
BAR_WIDTH = 28
STYLES = {"fault": "bold red", "warning": "yellow", "note": "cyan"}
SEGMENT_STYLES = {"prompt": "dim", "not learnt": "dim", "chosen": "green", "rejected": "red", "learnt": "green"}
SPECIAL_STYLE = "bold magenta"
BOUNDARY = "│"
"""Stands between tokens where there is no colour to tell them apart."""

_EIGHTHS = " ▏▎▍▌▋▊▉"


def print_document(document: Json, console: Console, *, with_ids: bool = False) -> None:
    """Prints a document of `jdpo.inspection.document`.

    Args:
      with_ids: print the id of each token behind it.
    """
    if console.width > MOST_WIDTH:
        console.width = MOST_WIDTH
    _print_head(document, console)
    _print_part(document["train"], "Training rows", console)
    _print_costs(document["steps"], document["command"], console)
    if document["eval"] is not None:
        _print_part(document["eval"], "Evaluation rows", console)
        _print_leakage(document["leakage"], document["eval"], console)
    if document["rows"]:
        print_rows(document["rows"], console, with_ids=with_ids)
    _print_findings(document["findings"], console)


def _print_head(document: Json, console: Console) -> None:
    config, model = document["config"], document["model"]
    _line(console, f"What `jdpo {document['command']}` would train on", "bold")
    _line(console, f"  {document['command_chosen_by']}", hang=4)
    cut = "" if config["max_prompt_length"] is None else f", of the prompt {config['max_prompt_length']:,}"
    _line(console, f"  model {config['model_name_or_path']}; at most {config['max_length']:,} tokens{cut}", hang=4)
    template = "with" if model["has_chat_template"] else "without"
    ends = " ".join(model["end_tokens"]) or "none"
    _line(console, f"  tokenizer {template} chat template; BOS {model['bos'] or 'none'}; answers end in {ends}", hang=4)
    for note in model["notes"]:
        _line(console, f"  {note}", hang=4)


# --- one part


def _print_part(part: Json, title: str, console: Console) -> None:
    kept, read = part["rows_kept"], part["rows_read"]
    made = f"{kept:,} of {read:,} kept" if kept <= read else f"{kept:,} made of {read:,} read"
    _heading(console, f"{title}: {made}")
    console.print(_data_sets(part["data_sets"]))
    for name, key in (("not trained on", "dropped"), ("noted", "notes")):
        for index, one in enumerate(part[key]):
            if not index:
                _line(console, name, "bold")
            first = f" (the first: {one['first']})" if one["first"] else ""
            _line(console, f"  {one['rows']:>7,}  {one['reason' if key == 'dropped' else 'note']}{first}", hang=11)
    _print_lengths(part, console)
    _print_text(part, console)
    found, none = repeat_rows(part)
    table = _table("rows where", "rows", "share", "first")
    for label, counted in found:
        table.add_row(label, f"{counted['rows']:,}", percent(counted["share"]), _text(counted["first"] or ""))
    _heading(console, "Repeats, cuts and edges")
    if found:
        console.print(table)
    _line(console, f"  no row where {'; '.join(none)}", hang=4)
    if part["length_bias"] is not None:
        _heading(console, "Are chosen answers longer?")
        for sentence in bias_sentences(part["length_bias"]):
            _line(console, f"  {sentence}", hang=2)
    if part["margins"] is not None:
        _heading(console, f"Margins of scores, in {part['margins']['rows']:,} pairs")
        console.print(_histogram([("pairs", part["margins"]["distribution"])], "margin"))
        negative = part["margins"]["negative"]
        _line(console, f"  below zero: {negative['rows']:,} ({percent(negative['share'])})")


def _data_sets(data_sets: Sequence[Json]) -> Table:
    table = _table("data set", "rows read", "read as", "kept", "dropped", "tokens")
    for one in data_sets:
        counts = [f"{one[key]:,}" for key in ("rows_read", "rows_kept", "rows_dropped", "tokens")]
        table.add_row(_text(one["name"]), counts[0], _text(schemas_of(one)), *counts[1:])
    return table


def _print_lengths(part: Json, console: Console) -> None:
    lengths, tokens = part["lengths"], part["tokens"]
    _heading(console, "Lengths in tokens")
    table = _table("", *COLUMNS)
    for name, cells in length_rows(lengths):
        table.add_row(name, *cells)
    console.print(table)
    shares = f"prompts are {percent(tokens['prompt_share'])} of {tokens['sequences']:,} tokens"
    _line(console, f"  longest: {tokens['longest']:,} tokens, {tokens['longest_row']}; {shares}", hang=2)
    console.print(_histogram([("prompt", lengths["prompt"])], "prompt tokens"))
    sides = [(name, one) for name, one in lengths.items() if name not in ("prompt", "sequence")]
    console.print(_histogram(sides, "answer tokens"))


def _histogram(named: Sequence[tuple[str, Json]], title: str) -> Table:
    """Bars of distributions that share their edges."""
    columns = [title]
    for name, _ in named:
        columns += [name, f"{name} "]
    table = _table(*columns, bars=True)
    edges = named[0][1]["edges"]
    most = max(max(one["bars"]) for _, one in named)
    width = BAR_WIDTH if len(named) == 1 else BAR_WIDTH // 2 + 4
    for place in range(len(edges) - 1):
        cells: list[Any] = [range_of(edges, place)]
        for name, one in named:
            count = one["bars"][place]
            cells += [
                f"{count:,}",
                _text(bar(count / most, width), SEGMENT_STYLES.get(name, "cyan").replace("dim", "cyan")),
            ]
        table.add_row(*cells)
    return table


def bar(share: float, width: int) -> str:
    """A bar of up to `width` characters; what is not nothing shows.

    >>> bar(0.5, 4), bar(0.3, 1), bar(0.001, 4), bar(0, 4)
    ('██', '▎', '▏', '')
    """
    eighths = max(round(share * width * 8), 1) if share > 0 else 0
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _print_text(part: Json, console: Console) -> None:
    if not part["text"]:
        return
    _heading(console, "Found in the text of raw rows")
    table = _table("", "rows", "first")
    for kind, mark in part["text"].items():
        table.add_row(KINDS_OF_TEXT[kind], f"{mark['rows']:,}", _text(f"{mark['first']}: {mark['excerpt']}"))
    console.print(table)


# --- the run


def _print_costs(steps: Json, command: str, console: Console) -> None:
    _heading(console, "Steps, padding and packing")
    _line(console, f"  {step_sentence(steps, command)}", hang=2)
    for sentence in cost_sentences(steps["costs"]):
        _line(console, f"  {sentence}", hang=2)


def _print_leakage(leakage: Json, held_out: Json, console: Console) -> None:
    _heading(console, "Prompts on both sides")
    _line(
        console, f"  {leakage['rows']:,} of {held_out['rows_kept']:,} evaluation rows have a prompt that is trained on"
    )
    for example in leakage["examples"]:
        _line(console, f"    {example['eval']} is {example['train']}")


def _print_findings(findings: Sequence[Json], console: Console) -> None:
    counts = {severity: sum(one["severity"] == severity for one in findings) for severity in STYLES}
    said = ", ".join(f"{count} {severity}{'' if count == 1 else 's'}" for severity, count in counts.items())
    _heading(console, f"Findings: {said}")
    for one in findings:
        _labelled(console, one["severity"], STYLES[one["severity"]], f"{one['summary']} [{one['name']}]")
        if one["first"]:
            _line(console, f"  first: {one['first']}", hang=9, indent=9)
        _line(console, f"  effect: {one['effect']}", hang=9, indent=9)
        _line(console, f"  to do: {one['remedy']}", hang=9, indent=9)


# --- rows, token by token


def print_rows(rows: Sequence[Json], console: Console, *, with_ids: bool = False) -> None:
    """Prints rows token by token."""
    _heading(console, f"The first {figure(len(rows), 'row')} of the run, token by token")
    _line(console, "  · is a space, ⏎ a line feed, ⇥ a tab; special tokens stand by name", hang=2)
    for number, row in enumerate(rows, 1):
        console.print()
        _line(console, f"row {number}: {row['origin']}", "bold")
        for segment in row["segments"]:
            learnt = "learnt" if segment["learnt"] else "not learnt"
            name = segment["name"] if segment["name"] in ("learnt", "not learnt") else f"{segment['name']}, {learnt}"
            style = SEGMENT_STYLES[segment["name"]]
            _line(console, f"  {name}, {figure(segment['num_tokens'], 'token')}", f"italic {style}")
            for line in token_lines(segment["pieces"], console, style, with_ids=with_ids):
                console.print(line, soft_wrap=True)


def token_lines(pieces: Sequence[Json], console: Console, style: str, *, with_ids: bool) -> Iterator[Any]:
    """Lines of at most the console's width, broken between tokens.

    Where there is colour, every other token is underlined; where there is none, a sign stands between them.
    """
    from rich.cells import cell_len
    from rich.text import Text

    coloured, room = console.color_system is not None, max(console.width - 4, 20)
    boundary = "" if coloured else BOUNDARY
    line, used = Text("    "), 0
    for number, piece in enumerate(pieces):
        ids = f"[{','.join(map(str, piece['ids']))}]" if with_ids else ""
        for part_number, part in enumerate(_broken(piece["text"], room)):
            width = cell_len(part + ids + boundary)
            if part_number or used + width > room:
                yield line
                line, used = Text("    "), 0
            shown = SPECIAL_STYLE if piece["special"] else style + (" underline" if number % 2 else "")
            line.append(part, shown)
            used += cell_len(part)
        line.append(ids, "dim")
        line.append(boundary)
        used += cell_len(ids + boundary)
        if piece["text"].endswith("\n"):
            yield line
            line, used = Text("    "), 0
    if used:
        yield line


def _broken(text: str, room: int) -> list[str]:
    """A token's text, line by line; one that is longer than a line is cut."""
    lines = text.removesuffix("\n").split("\n")
    return [line[start : start + room // 2] for line in lines for start in range(0, len(line) or 1, room // 2)]


# --- pieces of rich


def _text(text: str, style: str = "") -> Any:
    from rich.text import Text

    return Text(text, style)


def _line(console: Console, text: str, style: str = "", *, hang: int = 0, indent: int = 0) -> None:
    """A line whose continuations stand `hang` further in."""
    from rich.text import Text

    if not hang:
        console.print(Text(" " * indent + text, style), soft_wrap=True)
        return
    lead = len(text) - len(text.lstrip())
    wrapped = Text(text.lstrip(), style).wrap(console, max(console.width - hang - indent, 20))
    for number, line in enumerate(wrapped):
        line.rstrip()
        console.print(Text(" " * (indent + (hang if number else min(lead, hang)))) + line)


def _labelled(console: Console, label: str, style: str, text: str) -> None:
    from rich.table import Table

    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=10)
    grid.add_column()
    grid.add_row(_text(f"  {label}", style), _text(text))
    console.print(grid)


def _heading(console: Console, text: str) -> None:
    console.print()
    console.rule(_text(text, "bold"), align="left", characters="─", style="dim")


def _table(*columns: str, bars: bool = False) -> Table:
    """The first column and those of words on the left, numbers on the right."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=True, padding=(0, 2, 0, 0), show_edge=False)
    words = {"read as", "first"}
    for number, name in enumerate(columns):
        is_bar = bars and number and number % 2 == 0
        is_left = number == 0 or name in words or is_bar
        header = "" if is_bar else name
        table.add_column(header, justify="left" if is_left else "right", no_wrap=name not in words, overflow="fold")
    return table
