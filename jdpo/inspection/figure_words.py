"""Figures of an inspection as words, the same in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jdpo.inspection.raw_text import BIDI, CONTROL, INVISIBLE, REPLACEMENT, SPECIAL, SPECIAL_IN_PLAIN, SURROGATE
from jdpo.words import figure as figure  # the page calls it here, too

Json = Mapping[str, Any]

COLUMNS = ("mean", "min", "5 %", "25 %", "median", "75 %", "95 %", "99 %", "max")
_KEYS = ("mean", "minimum", "p5", "p25", "median", "p75", "p95", "p99", "maximum")

KINDS_OF_TEXT = {
    SPECIAL: "special tokens written out",
    SPECIAL_IN_PLAIN: "special tokens in plain text",
    CONTROL: "control characters",
    BIDI: "direction overrides",
    INVISIBLE: "invisible characters",
    REPLACEMENT: "U+FFFD, decoded wrongly",
    SURROGATE: "halves of surrogate pairs",
}


def percent(share: float) -> str:
    """A share for people.

    >>> percent(0.5), percent(0.0312), percent(0.00004), percent(0)
    ('50 %', '3.1 %', '< 0.01 %', '0 %')
    """
    if 0 < share < 1e-4:
        return "< 0.01 %"
    digits = 0 if share >= 0.0995 or share == 0 else 1 if share >= 0.00995 else 2
    return f"{100 * share:.{digits}f} %"


def number(value: float) -> str:
    """
    >>> number(1234.0), number(12.34), number(0.5)
    ('1,234', '12.3', '0.5')
    """
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.3g}"


def range_of(edges: Sequence[float], place: int) -> str:
    """What a bar of a histogram holds.

    >>> range_of([0, 5, 10], 1), range_of([3, 4, 5], 0), range_of([0, 0.5, 1], 1)
    ('5 - 9', '3', '0.5 - 1')
    """
    low, high = edges[place], edges[place + 1]
    if low != round(low) or high != round(high):
        return f"{low:g} - {high:g}"
    return f"{low:,.0f}" if high - low == 1 else f"{low:,.0f} - {high - 1:,.0f}"


def schemas_of(data_set: Json) -> str:
    """What reads the rows of a data set; with counts where there are several.

    >>> schemas_of({"schemas": {"hh": 3}}), schemas_of({"schemas": {"hh": 3, "nectar": 1200}})
    ('hh', 'hh 3, nectar 1,200')
    """
    schemas = data_set["schemas"]
    return ", ".join(schemas) if len(schemas) < 2 else ", ".join(f"{name} {n:,}" for name, n in schemas.items())


def length_rows(lengths: Json) -> Iterator[tuple[str, list[str]]]:
    """Rows of the table of lengths: a name, and cells under `COLUMNS`."""
    for name, one in lengths.items():
        yield ("longest sequence" if name == "sequence" else name), [number(one[key]) for key in _KEYS]


def repeat_rows(part: Json) -> tuple[list[tuple[str, Json]], list[str]]:
    """What is counted by row: (label, {rows, share, first}) where there is any, and the labels of the others."""
    repeats, edges = part["repeats"], part["edges"]
    rows = {
        "an earlier row is the same": repeats["same_row"],
        "an earlier row has the prompt, with other answers": repeats["same_prompt"],
    }
    if len(part["cut"]) == 2:
        rows["the pair stands the other way round too"] = repeats["contradictions"]
    rows |= {f"the {side} side is cut at max_length": counted for side, counted in part["cut"].items()}
    rows |= {
        "a whole answer has no end token": edges["no_end"],
        "an answer has its end token twice": edges["end_twice"],
        "an answer has an end token inside": edges["end_inside"],
        "BOS is missing": edges["no_bos"],
        "BOS stands twice at the start": edges["bos_twice"],
        "BOS stands inside": edges["bos_inside"],
        "an answer starts with BOS": edges["bos_in_answer"],
        "the row is longer than the model's positions": part["too_long_for_model"],
    }
    found = [(label, counted) for label, counted in rows.items() if counted["rows"]]
    return found, [label for label, counted in rows.items() if not counted["rows"]]


def bias_sentences(bias: Json) -> list[str]:
    """Whether the chosen side is longer, with what it means."""
    sentences = [
        f"Of {figure(bias['pairs'], 'pair')} the chosen side is longer in {bias['longer']:,}, shorter in "
        f"{bias['shorter']:,}, as long in {bias['equal']:,}; it has {bias['mean_chosen']:.1f} tokens in the mean, the "
        f"rejected one {bias['mean_rejected']:.1f} (difference {bias['mean_difference']:+.1f}, median "
        f"{bias['median_difference']:+.1f})."
    ]
    if bias["share_longer"] is None:
        return [*sentences, "All pairs have sides of the same length: length tells nothing."]
    chance = "less than 1 in 10,000" if bias["p_value"] < 1e-4 else f"{bias['p_value']:.2g}"
    sentences.append(
        f"Where lengths differ, the longer one is chosen in {percent(bias['share_longer'])} (95 % interval "
        f"{percent(bias['low'])} to {percent(bias['high'])}; by chance alone at least so far from half: {chance}). "
        f"Always preferring the longer is right in {percent(bias['longer_accuracy'])} of all pairs, the shorter in "
        f"{percent(bias['shorter_accuracy'])}, a tie counting as wrong."
    )
    best = max(bias["longer_accuracy"], bias["shorter_accuracy"])
    if bias["p_value"] >= 0.01:
        sentences.append("Chance alone may give as much: no sign that length is a clue.")
    else:
        way = "longer" if bias["share_longer"] > 0.5 else "shorter"
        sentences.append(
            f"So a model can reach an accuracy of {best:.2f} by preferring the {way} answer, without reading it: no "
            "accuracy up to there shows that it learnt more than length."
        )
    if bias["pairs_of_ranked_rows"]:
        sentences.append(
            f"{figure(bias['pairs_of_ranked_rows'], 'pair')} were made of ranked rows: those of one row share answers, "
            "so that there is less evidence than that many pairs of their own would be."
        )
    if bias["pairs_with_a_cut_side"]:
        sentences.append(
            f"{figure(bias['pairs_with_a_cut_side'], 'pair')} have a side that max_length cut, which makes sides alike."
        )
    return sentences


def step_sentence(steps: Json, command: str) -> str:
    """How many steps and tokens."""
    unit = "pairs" if command == "dpo" else "rows"
    return (
        f"{steps['epoch'][:1].upper()}{steps['epoch'][1:]}. That is {figure(steps['per_epoch'], 'step')} of "
        f"{steps['rows_per_step']:,} {unit}, {steps['of_run']:,} in the run; {steps['tokens_per_step']:,.0f} tokens a "
        f"step, {steps['tokens_per_epoch']:,.0f} an epoch."
    )


def cost_sentences(costs: Json) -> list[str]:
    """What padding costs, and packing saves."""
    sharing = costs["sequence_tokens"] != costs["shared_tokens"]
    parts = f"{costs['fewer_by_packing']:.2f} from leaving padding out"
    if sharing:
        parts += f", {costs['fewer_by_sharing_prompts']:.2f} from prompts that stand once"
    tokens, rows = costs["tokens_per_device"], costs["rows_per_device"]
    room = figure(rows, "example") if tokens is None else f"{tokens:,} slots"
    return [
        f"Counted over {figure(costs['steps'], 'step')}: a trainer that pads every sequence to the longest of its step "
        f"computes {costs['padded_positions']:,} positions for {costs['sequence_tokens']:,} tokens: "
        f"{percent(costs['padded_padding'])} is padding.",
        f"Packed rows (one row of up to {room} on each of {costs['devices']:,} "
        f"device{'' if costs['devices'] == 1 else 's'}) take {costs['packed_slots']:,} slots, of which "
        f"{percent(costs['packed_padding'])} stays empty.",
        f"That is {costs['fewer_in_all']:.2f} times fewer positions to compute ({parts}). It is arithmetic, not a "
        "measurement: attention and the LM head scale otherwise, and so does a device that is not busy.",
    ]
