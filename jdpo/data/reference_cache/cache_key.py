"""Keys of the reference cache, and explanations of a cache miss.

An entry of the cache has `parts`, which determine its key, and `about`, which is used only to explain a miss.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jdpo.config import DatasetConfig, without_queries
from jdpo.data.sources import open_source

CACHE_VERSION = 2
"""Must be raised whenever the same reference and rows would give other log-probs, or another file format."""

KEY_FILE = "key.json"


class CacheEntry(NamedTuple):
    """The description of one folder of the cache, in JSON values.

    Attributes:
      parts: everything that the log-probs depend on.
      about: the settings that it came from, for messages.
    """

    parts: dict[str, Any]
    about: dict[str, Any]

    @property
    def key(self) -> str:
        return key_of(self.parts)

    def text(self) -> str:
        """Returns the content of `key.json`, digest included."""
        values = {"parts": self.parts, "about": self.about}
        # The digest covers `about` too, which is not part of the folder's name.
        return json.dumps(values | {"digest": key_of(values)}, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def parts_of(
    *, weights: str, rows: str, compute_dtype: str, model: Mapping[str, Any], started: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Returns everything that log-probs depend on. Beta, loss, learning rate, order and mesh are never part of it.

    Args:
      weights: digest of the reference's weights and config.
      rows: digest of the tokenized rows.
      compute_dtype: dtype of the activations.
      model: the model's config as used.
      started: ids of the tokens whose embeddings do not start as in the weights, and the seed of their noise; None if
        all start so.
    """
    return {
        # In the parts, so that caches of other versions are never found.
        "version": CACHE_VERSION,
        "weights": weights,
        "rows": rows,
        "compute_dtype": compute_dtype,
        "model": json.loads(json.dumps(dict(model))),  # tuples become lists, as they come back from disk
        "started": started if started is None else dict(started),
    }


def about_rows(
    datasets: Sequence[DatasetConfig],
    *,
    role: str,
    model: str,
    tokenizer: str,
    chat_template: str | None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_length: int,
    max_prompt_length: int | None,
    eval_fraction: float,
) -> dict[str, Any]:
    """Describes the rows and the model of an entry for people. Reads the datasets once, for their digest.

    Args:
      datasets: the datasets of the rows.
      role: "training" or "evaluation".
      model: the reference's name.
      tokenizer: digest of the tokenizer with its chat template.
      chat_template: as in the config; its kwargs, lengths and eval_fraction too.
    """
    return {
        # Training and evaluation rows have separate entries, since runs often share only one of the two.
        "role": role,
        "model": model,
        "datasets": [
            # Without queries of addresses, which may contain keys.
            " ".join(filter(None, (without_queries(d.path), d.name, f"({d.split})", d.revision)))
            for d in datasets
        ],
        "sources": key_of([open_source(dataset).digest() for dataset in datasets]),
        "tokenizer": tokenizer,
        "chat_template": chat_template,
        "chat_template_kwargs": None if chat_template_kwargs is None else dict(chat_template_kwargs),
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "eval_fraction": float(eval_fraction),
        "column_map": [dict(dataset.column_map or {}) for dataset in datasets],
        "ranked": [dataset.ranked for dataset in datasets],
        "min_margin": [dataset.min_margin for dataset in datasets],
    }


def key_of(value: Any) -> str:
    """Returns the digest of a JSON value, which does not depend on the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_entry(folder: Path) -> CacheEntry | None:
    """Reads the entry of a folder of the cache; returns None if there is no `key.json`.

    Raises:
      ValueError: the file is damaged, or belongs to another folder.
    """
    path = folder / KEY_FILE
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
        entry = CacheEntry(values["parts"], values["about"])
        # Byte for byte: an edited file, or one copied to another folder, must not vouch for the log-probs.
        if text == entry.text() and entry.key == folder.name:
            return entry
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is damaged")


def most_similar_entry(root: Path, now: CacheEntry) -> CacheEntry | None:
    """Returns the entry under `root` of the most similar run, with which a miss is explained; None if none is similar.

    Only entries of the same role with the datasets or the model of `now` count. The same datasets come before others,
    then more equal values, then newer entries. Folders without a finished shard or with a damaged `key.json` do not
    count.
    """
    ranked = []
    for folder in sorted(root.glob("*")):
        try:
            then = read_entry(folder)
        except ValueError:
            continue
        # An entry without a finished shard saved no work, so a miss against it needs no explanation.
        if then is None or folder.name == now.key or next(folder.glob("[0-9]*.json"), None) is None:
            continue
        same = {name for name, value in _flat(now).items() if _flat(then).get(name) == value}
        if "role" in same and same & {"datasets", "model", "weights"}:
            # The tuple orders the candidates; its last element is the entry itself.
            ranked.append(("datasets" in same, len(same), (folder / KEY_FILE).stat().st_mtime_ns, then))
    return max(ranked, key=lambda rank: rank[:3])[-1] if ranked else None


def _flat(entry: CacheEntry) -> dict[str, Any]:
    config = {f"config.{name}": value for name, value in entry.parts["model"].items()}
    return entry.about | config | {name: value for name, value in entry.parts.items() if name != "model"}


def changes(then: CacheEntry, now: CacheEntry) -> list[str]:
    """Returns what differs between two entries, in terms of the config; never empty for different keys."""
    lines = []
    if then.parts["version"] != now.parts["version"]:
        lines.append(_then_now("the version of jdpo's cache", then.parts["version"], now.parts["version"]))
    # A renamed model and changed weights of the same name need different sentences.
    if then.parts["weights"] != now.parts["weights"]:
        name = now.about["model"]
        renamed = then.about["model"] != name
        lines.append(
            _then_now("the reference model", then.about["model"], name)
            if renamed
            else f"the weights of the reference model {name}"
        )
    lines += [
        _then_now(f"the model's {name}", then.parts["model"].get(name), value)
        for name, value in now.parts["model"].items()
        if then.parts["model"].get(name) != value
    ]
    titles = {"compute_dtype": "compute_dtype", "started": "tokens that start at the mean, and the seed of the noise"}
    for name, title in titles.items():
        if then.parts.get(name) != now.parts[name]:
            lines.append(_then_now(title, then.parts.get(name), now.parts[name]))
    if then.parts["rows"] != now.parts["rows"]:  # settings of the rows matter only if the tokens differ
        lines += _row_changes(then.about, now.about)
    return lines or ["a part that this version of jdpo does not know"]


def _row_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    settings = ("max_length", "max_prompt_length", "chat_template", "chat_template_kwargs", "eval_fraction")
    lines = [_then_now(name, then.get(name), now.get(name)) for name in settings if then.get(name) != now.get(name)]
    # Settings of each dataset can be compared only if the datasets are the same.
    if then.get("datasets") == now["datasets"]:
        for name in ("column_map", "ranked", "min_margin"):
            for dataset, was, is_now in zip(now["datasets"], then.get(name, ()), now[name], strict=False):
                if was != is_now:
                    lines.append(_then_now(f"{name} of {dataset}", was, is_now))
    # A changed chat_template changes the tokenizer's digest too, and was reported already.
    if then.get("tokenizer") != now["tokenizer"] and then.get("chat_template") == now["chat_template"]:
        lines.append("the tokenizer or its chat template")
    if then.get("datasets") != now["datasets"]:
        lines.append(_then_now("the data", ", ".join(then.get("datasets", [])), ", ".join(now["datasets"])))
    elif then.get("sources") != now["sources"]:
        lines.append(f"the rows of {', '.join(now['datasets'])}")
    return lines or [f"how the rows of {', '.join(now['datasets'])} are tokenized"]


def _then_now(name: str, then: Any, now: Any) -> str:
    """Describes one difference.

    >>> _then_now("max_prompt_length", None, 64)
    'max_prompt_length: null then, 64 now'
    """
    return f"{name}: {'null' if then is None else then} then, {'null' if now is None else now} now"
