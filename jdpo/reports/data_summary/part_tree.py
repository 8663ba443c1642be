"""The part of a report that describes training rows or evaluation rows, as nodes for terminal and page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from jdpo.reports.data_summary import nodes
from jdpo.reports.data_summary.check_table import CHECKS
from jdpo.reports.data_summary.nodes import Data, Heading, Node, Paragraph, Section, Words
from jdpo.reports.data_summary.row_statistics import QUANTILES, Json
from jdpo.words import figure, percent

_MEASURES = ("mean", "min", "5 %", "25 %", "median", "75 %", "95 %", "99 %", "max")


def part_section(anchor: str, title: str, part: Json, more: Iterable[Node] = ()) -> Section:
    """Returns the section about a part of data.json or of the report of `jdpo inspect`, with `more` at its end."""
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
    # A run does not read its files a second time to find out.
    is_known = any(one["schemas"] for one in datasets)
    rows: list[list[Words]] = []
    for one in datasets:
        schemas = one["schemas"]
        # Counts only where several schemas read the rows of one dataset.
        read_as = ", ".join(f"{name} {n:,}" if len(schemas) > 1 else name for name, n in schemas.items())
        schema = [Data(read_as)] if is_known else []
        rows.append([Data(one["name"]), *schema, *(f"{one[key]:,}" for key in numbers.values())])
    schema_column = [("read as", "words")] if is_known else []
    columns = [("dataset", "words"), *schema_column, *((name, "number") for name in numbers)]
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
        yield "This may be chance (p is 0.01 or more): there is no clear sign that length gives the chosen side away."
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
