"""Settings of config.json with a record of those that a family's reader asked for.

A key that no reader asks for is a setting that the decoder does not follow. `refuse_unread` refuses it, unless the key
is listed in `jdpo.models.families.config_keys` as one that changes no forward pass, or has a value that means "off". So
a mechanism that jdpo lacks is refused by name even if nobody has thought of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jdpo.models.families.config_keys import CHANGE_NOTHING, MEAN_NOTHING, OF_FAMILY, OF_ROPES, OFF
from jdpo.safe_text import terminal

ROPES = "rope_parameters"


class RecordedConfig:
    """transformers' config of a model, read-only; remembers the names of the attributes that were read.

    Attributes of another name for the same key (`hidden_size` for GPT-2's `n_embd`) are remembered under the key.
    """

    def __init__(self, hf_config: Any, raw: dict[str, Any]) -> None:
        """Wraps `hf_config`; `raw` is the content of its file, or that of the part of it that describes this config."""
        self._hf_config, self._raw = hf_config, raw
        self._read: set[str] = set()
        self._parts: dict[str, RecordedConfig | RecordedSettings] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own protocols, such as copying, before there is a config
            raise AttributeError(name)
        # Before the value, which may be missing: a reader that asks for a key and has a default follows that key.
        self._read.add(self._hf_config.attribute_map.get(name, name))
        value = getattr(self._hf_config, name)
        if name not in self._parts:
            if hasattr(value, "attribute_map"):  # the config of a part of the model
                raw = self._raw.get(name)
                self._parts[name] = RecordedConfig(value, raw if isinstance(raw, dict) else {})
            elif name == ROPES and isinstance(value, dict):
                self._parts[name] = RecordedSettings(value)
        return self._parts.get(name, value)

    def unread(self) -> dict[str, Any]:
        """Returns the keys that the file sets and that nobody has read, with their values."""
        found, defaults = {}, self._defaults()
        for key, value in vars(self._hf_config).items():
            # A key that the file lacks has the default of transformers' class, which the tests go through.
            is_set = key in self._raw or key not in defaults or value != defaults[key]
            # Names with an underscore are transformers' own.
            if is_set and key not in self._read and not key.startswith("_") and not self._repeats(key):
                found[key] = value
        return found

    def _repeats(self, key: str) -> bool:
        """Returns True for a setting that the file has in text_config as well: transformers 4 wrote some twice."""
        text = self._raw.get("text_config")
        # transformers makes rope_parameters of these.
        keys = [old for old in (ROPES, "rope_scaling", "rope_theta") if old in self._raw] if key == ROPES else [key]
        return isinstance(text, dict) and all(
            each in self._raw and each in text and self._raw[each] == text[each] for each in keys
        )

    def parts(self) -> list[RecordedConfig | RecordedSettings]:
        """Returns the configs and settings within this one that were read."""
        return list(self._parts.values())

    @property
    def read_keys(self) -> frozenset[str]:
        """The keys that were read."""
        return frozenset(self._read)

    @property
    def known_keys(self) -> frozenset[str]:
        """The keys that transformers' class of this config has."""
        return frozenset(self._defaults())

    def _defaults(self) -> dict[str, Any]:
        own_class = type(self._hf_config)
        if dataclasses.is_dataclass(own_class):
            return {field.name: field.default for field in dataclasses.fields(own_class)}
        # Of early versions 5 of transformers, whose classes do not list their fields.
        return vars(own_class())


class RecordedSettings(dict[str, Any]):
    """The settings of a rope, or those of each type of layer; remembers the keys that were read."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(
            {key: RecordedSettings(value) if isinstance(value, dict) else value for key, value in settings.items()}
        )
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return super().get(key, default)

    def unread(self) -> dict[str, Any]:
        """Returns the settings that nobody has read."""
        return {key: value for key, value in self.items() if key not in self._read}

    def parts(self) -> list[RecordedSettings]:
        """Returns the settings of the types of layers that were read."""
        return [value for key, value in self.items() if key in self._read and isinstance(value, RecordedSettings)]


def refuse_unread(config: RecordedConfig) -> None:
    """Refuses settings that the reader of a config has not read, unless they change no forward pass.

    Raises:
      ValueError: a key and its value are named.
    """
    family = config.model_type
    for key, value in config.unread().items():
        if not changes_nothing(family, key, value):
            raise ValueError(
                f"{key}: {terminal(_short(value))} is not supported in a model of the family {family}, expected "
                f"{_neutral(family, key)}. "
                + ("" if key in config.known_keys else "transformers does not know the key. ")
                + "If it changes no result of the model, remove it from config.json"
            )
    for part in config.parts():
        if isinstance(part, RecordedConfig):
            refuse_unread(part)
        else:
            _refuse_unread_of_ropes(part)


def _refuse_unread_of_ropes(settings: RecordedSettings) -> None:
    for key, value in settings.unread().items():
        if key not in OF_ROPES and not _is_off(value) and value not in MEAN_NOTHING.get(key, ()):
            raise ValueError(
                f"{key} of rope_parameters: {terminal(_short(value))} is not supported with rope_type "
                f"{settings.get('rope_type', 'default')!r}"
            )
    for part in settings.parts():
        _refuse_unread_of_ropes(part)


def changes_nothing(family: str, key: str, value: Any) -> bool:
    """Returns True if a key that no reader follows leaves the results of a model as they are."""
    if key in CHANGE_NOTHING:
        return True
    own = OF_FAMILY.get(family, {})
    if key in own:
        accepted = own[key]
        return accepted is None or value in accepted
    if key in MEAN_NOTHING:
        return value in MEAN_NOTHING[key]
    return _is_off(value)


def _is_off(value: Any) -> bool:
    # By equality, so that 0.0 is off, too; a list or dict must be empty.
    return any(value == off for off in OFF)


def _neutral(family: str, key: str) -> str:
    values = OF_FAMILY.get(family, {}).get(key) or MEAN_NOTHING.get(key) or (None, False, 0)
    return " or ".join(repr(value) for value in values)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}.."
