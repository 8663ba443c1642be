"""Names that Kubernetes accepts, checked before anything is created."""

from __future__ import annotations

import re

_PART = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_LABEL = r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"


def checked_object(name: str, option: str) -> str:
    """Returns the name of an object of Kubernetes, such as a claim or a Secret.

    Raises:
      ValueError: Kubernetes would refuse it; it names the option that it is the value of.

    >>> checked_object("jdpo-secrets.v2", "secret_store")
    'jdpo-secrets.v2'
    """
    if not re.fullmatch(rf"{_PART}(\.{_PART})*", name) or len(name) > 253:
        raise ValueError(
            f"--{option} {name!r}: Kubernetes names consist of lower-case letters, digits, dashes and dots, with a "
            "letter or a digit first and last"
        )
    return name


def checked_namespace(name: str) -> str:
    """Returns the name of a namespace.

    Raises:
      ValueError: Kubernetes would refuse it.
    """
    if not re.fullmatch(_PART, name) or len(name) > 63:
        raise ValueError(
            f"--namespace {name!r}: expected at most 63 lower-case letters, digits and dashes, with a letter or a "
            "digit first and last"
        )
    return name


def checked_label(key: str, value: str, option: str) -> None:
    """Checks a label.

    Raises:
      ValueError: Kubernetes would refuse it.

    >>> checked_label("cloud.google.com/gke-nodepool", "pool-1", "node_selector")
    """
    prefix, _, name = key.rpartition("/")
    key_is_good = re.fullmatch(_LABEL, name) and len(name) <= 63
    if not key_is_good or (prefix and not re.fullmatch(rf"{_PART}(\.{_PART})*", prefix)):
        raise ValueError(f"--{option} {key}={value}: {key!r} is no key of a label, such as example.com/pool or pool")
    if value and (not re.fullmatch(_LABEL, value) or len(value) > 63):
        raise ValueError(
            f"--{option} {key}={value}: expected a value of at most 63 letters, digits, -, _ and ., with a letter or a "
            "digit first and last"
        )


def checked_image(image: str) -> str:
    """Returns the name of a container image.

    Raises:
      ValueError: it cannot be one.

    >>> checked_image("us-docker.pkg.dev/project/repository/jdpo:0.2.0")
    'us-docker.pkg.dev/project/repository/jdpo:0.2.0'
    """
    digest, tag = r"@sha256:[0-9a-f]{64}", r":[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
    if not re.fullmatch(rf"[a-z0-9]([a-z0-9._/-]|:\d+/)*[a-z0-9](({tag})?{digest}|{tag})", image):
        raise ValueError(
            f"--image {image!r}: expected the name of an image with its tag or digest, such as "
            "us-docker.pkg.dev/PROJECT/REPOSITORY/jdpo:0.2.0, with a lower-case name; without a tag, pods that start "
            "later may get another image"
        )
    return image
