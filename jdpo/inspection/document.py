"""What a run would train on, as one document: counts, lengths, costs, repeats, texts, rows, and what is wrong.

The document is made of dicts, lists, strings and finite numbers, so that it is JSON as it stands; docs/data.md lists
its keys. Terminal and HTML page show nothing that is not in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jdpo._version import __version__
from jdpo.config import without_queries
from jdpo.data.prepared import token_checks
from jdpo.data.prepared.chunks import RANKED_PAIRS
from jdpo.data.prepared.prepare import DROPPED, KEPT, READ, PreparedData
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.inspection.data_faults import findings_of
from jdpo.inspection.material import Material, ModelFacts, Part
from jdpo.inspection.raw_text import Mark, TextFacts
from jdpo.inspection.row_measures import RowFacts, row_facts
from jdpo.inspection.row_statistics import distribution, length_bias, nice_edges, repeats, step_costs
from jdpo.inspection.token_display import RowView, one_line, view_row
from jdpo.models.weights.embedding_rows import UntrainedToken
from jdpo.safe_text import terminal_lines

DOCUMENT_VERSION = 1
"""To be raised when a key changes its meaning or goes away."""

TOKENS_PER_DEVICE = 16384
"""Slots of a packed row in the prediction, where the config leaves max_tokens_per_device open."""

EDGES = {
    "no_bos": token_checks.NO_BOS,
    "bos_twice": token_checks.BOS_TWICE,
    "bos_inside": token_checks.BOS_INSIDE,
    "bos_in_answer": token_checks.STARTS_WITH_BOS,
    "no_end": token_checks.NO_END,
    "end_twice": token_checks.END_TWICE,
    "end_inside": token_checks.END_INSIDE,
}
"""Keys of how sequences begin and end, and what the count of each is called."""

Json = dict[str, Any]


def document_of(material: Material, *, num_rows: int = 0) -> Json:
    """The whole report.

    Args:
      num_rows: rows to show token by token, in the order of the steps.
    """
    config, tokenizer = material.config, material.tokenizer
    facts = _facts(material.train, material)
    document: Json = {
        "jdpo": __version__,
        "version": DOCUMENT_VERSION,
        "command": material.command,
        "command_chosen_by": material.chosen_by,
        "config": {
            "model_name_or_path": without_queries(config.model_name_or_path),
            "max_length": config.max_length,
            "max_prompt_length": config.max_prompt_length,
            "global_batch_size": config.global_batch_size,
            "packing": config.packing,
            "seed": config.seed,
        },
        "model": _model(material.model, tokenizer),
        "train": _part(material.train, facts, material),
        "eval": None,
        "leakage": None,
        "steps": _steps(material, facts),
        "rows": _rows(material, num_rows),
    }
    if material.eval is not None:
        document["eval"] = _part(material.eval, _facts(material.eval, material), material)
        document["leakage"] = _leakage(material.train.data, material.eval.data)
    document["findings"] = [finding._asdict() for finding in findings_of(document)]
    clean: Json = _clean(document)
    return clean


def _facts(part: Part, material: Material) -> RowFacts:
    return row_facts(part.data, material.tokenizer, max_length=material.config.max_length)


def _model(model: ModelFacts, tokenizer: Tokenizer) -> Json:
    hf = tokenizer.hf
    return {
        "max_positions": model.max_positions,
        "vocab_size": model.vocab_size,
        "problem": model.problem,
        "tokenizer_size": tokenizer.size,
        "added_tokens": list(tokenizer.added_tokens),
        "untrained_tokens": None if model.untrained is None else [_untrained(token) for token in model.untrained],
        "starts_untrained_tokens": model.starts_untrained,
        "bos": None if tokenizer.bos_token_id is None else str(hf.bos_token),
        "end_tokens": [str(hf.convert_ids_to_tokens(index)) for index in tokenizer.end_token_ids],
        "has_chat_template": tokenizer.has_chat_template,
        "chat_template_kwargs": dict(tokenizer.probe.renderer.kwargs),
        "notes": list(tokenizer.notes),
        "warnings": list(tokenizer.warnings),
    }


def _untrained(token: UntrainedToken) -> Json:
    return {"id": token.id, "token": token.token, "rows": token.num_rows, "first": token.first}


# --- rows of one part


def _part(part: Part, facts: RowFacts, material: Material) -> Json:
    data = part.data
    sequence = data.lengths.astype(np.int64)
    prompt_tokens, sequence_tokens = int(facts.prompt.sum()), int(facts.sequence_tokens.sum())
    return {
        "digest": data.digest,
        **_counts(data.counts, data.examples),
        "data_sets": [_data_set(part, number, facts) for number in range(len(data.names))],
        "tokens": {
            "prompt": prompt_tokens,
            "sequences": sequence_tokens,
            "prompt_share": len(facts.sides) * prompt_tokens / sequence_tokens,
            "longest": int(np.max(sequence)),
            "longest_row": data[int(np.argmax(sequence))].origin,
        },
        "lengths": _lengths(facts, sequence),
        "answer_cut": _rows_where(_cut(facts), data),
        "cut": {name: _rows_where(side.cut, data) for name, side in facts.sides.items()},
        "edges": {name: _counted(fault, data) for name, fault in EDGES.items()},
        "too_long_for_model": _rows_where(sequence > (material.model.max_positions or np.inf), data),
        "repeats": _repeats(data, facts),
        "length_bias": _bias(data, facts),
        "margins": _margins(data),
        "text": _texts(part.texts),
    }


def _counts(counts: Mapping[str, int], examples: Mapping[str, str]) -> Json:
    """What was read, kept, dropped and noted; the most frequent first."""
    dropped, notes = [], []
    for name in sorted(counts, key=lambda name: (-counts[name], name)):
        one = {"rows": counts[name], "first": examples.get(name)}
        if name.startswith(DROPPED):
            dropped.append({"reason": name.removeprefix(DROPPED), **one})
        elif name not in (READ, KEPT):
            notes.append({"note": name, **one})
    return {
        "rows_read": counts.get(READ, 0),
        "rows_kept": counts.get(KEPT, 0),
        "rows_dropped": sum(counts[name] for name in counts if name.startswith(DROPPED)),
        "dropped": dropped,
        "notes": notes,
    }


def _data_set(part: Part, number: int, facts: RowFacts) -> Json:
    data = part.data
    text = part.texts[number] if part.texts else None
    return {
        "name": data.names[number],
        "schemas": {} if text is None else text.schemas,
        **_counts(data.counts_of[number], data.examples_of[number]),
        "tokens": int(facts.sequence_tokens[data.dataset_of == number].sum()),
        "text": {} if text is None else _texts([text]),
    }


def _counted(name: str, data: PreparedData) -> Json:
    """What was counted while rows were tokenized, as `_rows_where` has it."""
    rows = data.counts.get(name, 0)
    return {"rows": rows, "share": rows / len(data), "first": data.examples.get(name)}


def _rows_where(mask: np.ndarray, data: PreparedData) -> Json:
    """How many rows, which share of all, and where the first comes from."""
    rows = int(mask.sum())
    first = data[int(np.argmax(mask))].origin if rows else None
    return {"rows": rows, "share": rows / len(mask), "first": first}


def _cut(facts: RowFacts) -> np.ndarray:
    """Whether an answer of each row lost its end to max_length."""
    cut: np.ndarray = np.any([side.cut for side in facts.sides.values()], axis=0)
    return cut


def _lengths(facts: RowFacts, sequence: np.ndarray) -> Json:
    """Sides share the edges of their bars, so that they can be compared."""
    sides = [side.length for side in facts.sides.values()]
    edges = nice_edges(min(int(side.min()) for side in sides), max(int(side.max()) for side in sides), whole=True)
    found = {"prompt": distribution(facts.prompt)}
    found |= {name: distribution(side.length, edges) for name, side in facts.sides.items()}
    found["sequence"] = distribution(sequence)
    return {name: None if one is None else one._asdict() for name, one in found.items()}


def _repeats(data: PreparedData, facts: RowFacts) -> Json:
    found = repeats(data.prompt_keys, [side.key for side in facts.sides.values()])
    return {
        "same_prompt": _rows_where(found.prompt, data),
        "same_row": _rows_where(found.row, data),
        "contradictions": _rows_where(found.reversed, data),
    }


def _bias(data: PreparedData, facts: RowFacts) -> Json | None:
    if len(facts.sides) < 2:
        return None
    found = length_bias(facts.sides["chosen"].length, facts.sides["rejected"].length)._asdict()
    return found | {
        "pairs_with_a_cut_side": int(_cut(facts).sum()),
        "pairs_of_ranked_rows": data.counts.get(RANKED_PAIRS, 0),
    }


def _margins(data: PreparedData) -> Json | None:
    present = np.isfinite(data.margins)
    if not present.any():
        return None
    found = distribution(data.margins)
    assert found is not None
    return {
        "rows": int(present.sum()),
        "share": float(present.mean()),
        "negative": _rows_where(present & (data.margins < 0), data),
        "zero": _rows_where(present & (data.margins == 0), data),
        "distribution": found._asdict(),
    }


def _texts(texts: Sequence[TextFacts]) -> Json:
    """What was found in the texts of data sets together, by kind."""
    all_marks: dict[str, Mark] = {}
    for text in texts:
        for kind, mark in text.marks.items():
            before = all_marks.get(kind, mark._replace(rows=0))
            all_marks[kind] = before._replace(rows=before.rows + mark.rows)
    return {
        kind: {"rows": mark.rows, "first": mark.first, "excerpt": one_line(mark.excerpt)}
        for kind, mark in sorted(all_marks.items())
    }


# --- both parts


def _leakage(train: PreparedData, held_out: PreparedData) -> Json:
    """Evaluation rows whose prompt is trained on, and a few of them with the training row that has it."""
    leaked = np.isin(held_out.prompt_keys, train.prompt_keys)
    rows = np.flatnonzero(leaked)[:5]
    examples = []
    for row in rows.tolist():
        twin = int(np.flatnonzero(train.prompt_keys == held_out.prompt_keys[row])[0])
        examples.append({"eval": held_out[row].origin, "train": train[twin].origin})
    return {**_rows_where(leaked, held_out), "examples": examples}


def _steps(material: Material, facts: RowFacts) -> Json:
    config, data, steps = material.config, material.train.data, material.steps
    shards = max(config.mesh.data, 1) * max(config.mesh.fsdp, 1) * max(config.mesh.expert, 1)
    budget = config.max_tokens_per_device or TOKENS_PER_DEVICE
    costs = step_costs(
        data.sizes(),
        facts.sequence_tokens,
        steps,
        num_shards=shards,
        max_tokens_per_device=budget,
        micro_batch_size=config.micro_batch_size,
    )
    return {
        "epoch": material.epoch,
        "per_epoch": material.steps_per_epoch,
        "of_run": material.num_steps,
        "rows_per_step": config.global_batch_size,
        "tokens_per_step": costs.sequence_tokens / costs.steps,
        "tokens_per_epoch": costs.sequence_tokens / costs.steps * material.steps_per_epoch,
        "costs": {
            **costs._asdict(),
            "devices": shards,
            "tokens_per_device": None if config.micro_batch_size else budget,
            "rows_per_device": config.micro_batch_size,
            "padded_padding": costs.padded_padding,
            "packed_padding": costs.packed_padding,
            "fewer_by_packing": costs.from_padding,
            "fewer_by_sharing_prompts": costs.from_sharing,
            "fewer_in_all": costs.speed_up,
        },
    }


# --- rows, token by token


def _rows(material: Material, num_rows: int) -> list[Json]:
    data = material.train.data
    wanted = itertools.islice(itertools.chain.from_iterable(indices.tolist() for indices in material.steps), num_rows)
    return [_row(view_row(data[index], index, material.tokenizer)) for index in wanted]


def _row(view: RowView) -> Json:
    return {
        "origin": view.origin,
        "row": view.row,
        "segments": [
            {
                "name": segment.name,
                "learnt": segment.is_learnt,
                "num_tokens": segment.num_tokens,
                "pieces": [
                    {"text": piece.text, "ids": list(piece.ids), "special": piece.is_special}
                    for piece in segment.pieces
                ],
            }
            for segment in view.segments
        ],
    }


def _clean(value: Any) -> Any:
    """Tuples as lists, and in origins and names, too, every character that cannot be seen written out."""
    if isinstance(value, str):
        return terminal_lines(value)
    if isinstance(value, Mapping):
        return {key: _clean(inner) for key, inner in value.items()}
    return [_clean(inner) for inner in value] if isinstance(value, list | tuple) else value
