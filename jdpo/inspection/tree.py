"""Turns a document of `jdpo.inspection.document` into the parts that terminal and page show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from jdpo.inspection import nodes
from jdpo.inspection.check_table import CHECKS
from jdpo.inspection.data_faults import SEVERITIES
from jdpo.inspection.nodes import Data, Heading, Node, Paragraph, Section, Words
from jdpo.inspection.row_statistics import QUANTILES, Json
from jdpo.words import figure, percent

_MEASURES = ("mean", "min", "5 %", "25 %", "median", "75 %", "95 %", "99 %", "max")


def report_of(document: Json) -> nodes.Report:
    """Returns the report of a document; findings come last, where the terminal still shows them at the end."""
    sections = [
        _part("train", "Training rows", document["train"]),
        Section("steps", "Steps, padding and packing", [Paragraph(text) for text in _steps(document)]),
    ]
    if document["eval"] is not None:
        sections.append(_part("eval", "Evaluation rows", document["eval"], _leakage(document)))
    if document["rows"]:
        title = f"The first {figure(len(document['rows']), 'row')} of the run, token by token"
        sections.append(Section("rows", title, list(_token_rows(document["rows"]))))
    title = f"What jdpo {document['command']} would train on"
    return nodes.Report(title, list(_facts(document)), [*sections, _findings(document["findings"])])


def _facts(document: Json) -> Iterator[tuple[str, Words]]:
    config, model = document["config"], document["model"]
    yield "jdpo", document["jdpo"]
    yield "model", Data(config["model_name_or_path"])
    yield "command", document["command_chosen_by"]
    prompt = "" if config["max_prompt_length"] is None else f", {config['max_prompt_length']:,} of the prompt"
    yield "tokens", f"at most {config['max_length']:,} per sequence{prompt}"
    template = f"{'with' if model['has_chat_template'] else 'without'} a chat template"
    ends = Data(" ".join(model["end_tokens"]) or "none")
    yield "tokenizer", (f"{template}; BOS ", Data(model["bos"] or "none"), "; answers end in ", ends)
    for note in model["notes"]:
        yield "note", Data(note)


def _part(anchor: str, title: str, part: Json, more: Iterable[Node] = ()) -> Section:
    kept, read = part["rows_kept"], part["rows_read"]
    # Ranked answers and conversations give several rows each.
    made = f"{kept:,} of {read:,} kept" if kept <= read else f"{kept:,} made of {read:,} read"
    found: list[Node] = [_datasets(part["data_sets"])]  # plain: as it is
    for heading, key, entries in (("Not trained on", "reason", part["dropped"]), ("Noted", "note", part["notes"])):
        found += _counted(heading, [(one[key], one, Data(one["first"] or "")) for one in entries])
    found += _lengths(part)
    marks = part["text"].items()
    excerpts = [(CHECKS[kind].what, one, (Data(one["first"]), ": ", Data(one["excerpt"]))) for kind, one in marks]
    found += [*_counted("Found in the text of raw rows", excerpts), *_repeats(part)]
    if part["length_bias"] is not None:
        found += [Heading("Are chosen answers longer?"), *map(Paragraph, _bias_sentences(part["length_bias"]))]
    if (margins := part["margins"]) is not None:
        pairs, negative = figure(margins["rows"], "pair"), _share(margins["negative"])
        found += [
            Heading("Margins of scores"),
            Paragraph(f"{pairs} with scores; {negative} have a margin below zero."),
            _histogram("margin", [("pairs", margins["distribution"])]),
        ]
    return Section(anchor, f"{title}: {made}", [*found, *more])


def _datasets(datasets: Sequence[Json]) -> nodes.Table:
    numbers = {"rows read": "rows_read", "kept": "rows_kept", "dropped": "rows_dropped", "tokens": "tokens"}
    rows: list[list[Words]] = []
    for one in datasets:
        schemas = one["schemas"]
        # Counts only where several schemas read the rows of one dataset.
        read_as = ", ".join(f"{name} {n:,}" if len(schemas) > 1 else name for name, n in schemas.items())
        rows.append([Data(one["name"]), Data(read_as), *(f"{one[key]:,}" for key in numbers.values())])
    columns = [("dataset", "words"), ("read as", "words"), *((name, "number") for name in numbers)]
    return nodes.Table("datasets", columns, rows)


def _counted(heading: str, rows: Sequence[tuple[str, Json, Words]]) -> list[Node]:
    """Returns a heading and a table of (what, count, the first row), or nothing if there are no rows."""
    columns = [("which", "words"), ("rows", "number"), ("first", "words")]
    cells = [[what, _share(count), first] for what, count, first in rows]
    return [Heading(heading), nodes.Table(heading, columns, cells)] if cells else []


def _share(count: Json) -> str:
    return f"{count['rows']:,}" + (f" ({percent(count['share'])})" if "share" in count else "")


def _lengths(part: Json) -> list[Node]:
    lengths, tokens = part["lengths"], part["tokens"]
    columns = [("tokens in the", "words"), *((title, "number") for title in _MEASURES)]
    names = {"sequence": "longest sequence"}
    rows = [
        [names.get(name, name), *(_number(one[key]) for key in ("mean", *QUANTILES))] for name, one in lengths.items()
    ]
    share = f"Prompts are {percent(tokens['prompt_share'])} of {tokens['sequences']:,} tokens."
    longest = (f"The longest row has {tokens['longest']:,} tokens: ", Data(tokens["longest_row"]), f". {share}")
    answers = [(name, one) for name, one in lengths.items() if name not in ("prompt", "sequence")]
    return [
        Heading("Lengths in tokens"),
        nodes.Table("lengths", columns, rows),
        Paragraph(longest),
        _histogram("prompt tokens", [("prompt", lengths["prompt"])]),
        _histogram("answer tokens", answers),
    ]


def _number(value: float) -> str:
    """
    >>> _number(1234.0), _number(12.34), _number(0.5)
    ('1,234', '12.3', '0.5')
    """
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.3g}"


def _histogram(title: str, named: Sequence[tuple[str, Json]]) -> nodes.Table:
    """Returns the bars of distributions that share their edges."""
    # One scale for all, so that bars of different sides can be compared.
    edges, most = named[0][1]["edges"], max(max(one["bars"]) for _, one in named)
    columns = [(title, "number")]
    rows: list[list[Words | float]] = [[_range(*edges[place : place + 2])] for place in range(len(edges) - 1)]
    for name, one in named:
        columns += [("rows", "number"), (name, "bar")]
        for row, count in zip(rows, one["bars"], strict=True):
            row += [f"{count:,}", count / most]
    return nodes.Table(f"rows by {title}", columns, rows)


def _range(low: float, high: float) -> str:
    """
    >>> _range(5, 10), _range(3, 4), _range(0, 0.5)
    ('5 - 9', '3', '0 - 0.5')
    """
    if low != round(low) or high != round(high):
        return f"{low:g} - {high:g}"
    # Whole numbers: a bar ends before its upper edge.
    return f"{low:,.0f}" if high - low == 1 else f"{low:,.0f} - {high - 1:,.0f}"


def _repeats(part: Json) -> list[Node]:
    counts = {CHECKS[name].what: count for name, count in {**part["repeats"], **part["edges"]}.items()}
    counts |= {f"rows whose {side} side is cut at max_length": count for side, count in part["cut"].items()}
    counts[CHECKS["too_long_for_model"].what] = part["too_long_for_model"]
    if len(part["cut"]) < 2:  # a supervised row has no other side to contradict
        del counts[CHECKS["contradictions"].what]
    found = [(what, count, Data(count["first"])) for what, count in counts.items() if count["rows"]]
    absent = "; ".join(what for what, count in counts.items() if not count["rows"])
    title = "Repeats, cuts and edges"
    return [*(_counted(title, found) or [Heading(title)]), Paragraph(f"Not found: {absent}.")]


def _bias_sentences(bias: Json) -> Iterator[str]:
    yield (
        f"In {figure(bias['pairs'], 'pair')} the chosen side is longer {figure(bias['longer'], 'time')}, shorter "
        f"{figure(bias['shorter'], 'time')}, and equally long {figure(bias['equal'], 'time')}. Its mean length is "
        f"{bias['mean_chosen']:.1f} tokens, that of the rejected side {bias['mean_rejected']:.1f} (mean difference "
        f"{bias['mean_difference']:+.1f}, median {bias['median_difference']:+.1f})."
    )
    if bias["share_longer"] is None:
        yield "The sides of every pair have the same length, so length says nothing about which one is chosen."
        return
    chance = "< 0.0001" if bias["p_value"] < 1e-4 else f"= {bias['p_value']:.2g}"
    right, wrong = bias["longer_accuracy"], bias["shorter_accuracy"]
    yield (
        f"Where lengths differ, the longer side is chosen in {percent(bias['share_longer'])} of the pairs (95 % "
        f"interval {percent(bias['low'])} to {percent(bias['high'])}; sign test p {chance}). Always preferring the "
        f"longer side is right in {percent(right)} of all pairs, the shorter in {percent(wrong)}; ties count as wrong."
    )
    if bias["p_value"] >= 0.01:
        yield "This is compatible with chance: there is no sign that length gives the chosen side away."
    else:
        way = "longer" if bias["share_longer"] > 0.5 else "shorter"
        yield (
            f"A model can therefore reach an accuracy of {max(right, wrong):.2f} by always preferring the {way} "
            "answer; an accuracy up to there does not show that it learnt anything else."
        )
    if bias["pairs_of_ranked_rows"]:
        pairs = figure(bias["pairs_of_ranked_rows"], "pair")
        yield f"{pairs} come from ranked rows and share answers, so they are weaker evidence than independent pairs."
    if bias["pairs_with_a_cut_side"]:
        yield f"{figure(bias['pairs_with_a_cut_side'], 'pair')} have a side cut at max_length, which evens lengths out."


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
    factors = f"{costs['fewer_by_packing']:.2f} from leaving out padding"
    if costs["sequence_tokens"] != costs["shared_tokens"]:
        factors += f", {costs['fewer_by_sharing_prompts']:.2f} from computing each prompt once"
    yield (
        f"That is {costs['fewer_in_all']:.2f} times fewer positions to compute ({factors}). This is arithmetic, not a "
        "measurement: attention and the LM head scale differently, and so does a device that is not fully used."
    )


def _leakage(document: Json) -> Iterator[Node]:
    leakage = document["leakage"]
    yield Heading("Prompts in both training and evaluation")
    yield Paragraph(f"{leakage['rows']:,} of {document['eval']['rows_kept']:,} evaluation rows have a training prompt.")
    for one in leakage["examples"]:
        yield Paragraph((Data(one["eval"]), " has the prompt of ", Data(one["train"])))


def _token_rows(rows: Sequence[Json]) -> Iterator[Node]:
    yield Paragraph(
        "· is a space, ⏎ a line feed, ⇥ a tab; special tokens are shown by name. --ids shows ids in the terminal; on "
        "the page, they are under the pointer."
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
