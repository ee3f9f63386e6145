"""Keeping secrets in settings out of files, trackers and messages."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from robust_dist.documents import DocumentError, parse_yaml

HIDDEN = "(hidden)"
# A shorter value would also match ordinary words.
_TELLING = 8
_remembered: set[str] = set()
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}|(?<=Bearer )[\w.~+/-]{8,}=*")
_WORDS = {"apikey", "authorization", "bearer", "credential", "credentials", "passphrase", "passwd", "password", "pwd"}
_WORDS |= {"secret", "token"}
_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("secret", "key"), ("account", "key"), ("auth", "key")}
_URL = re.compile(r"(://[^/@\s:]*:)[^/@\s]+(?=@)")
_IN_TEXT = re.compile(
    r"(?i)([\w.-]*(?:token|passw(?:or)?d|passphrase|secret|credentials?|api[_-]?key|access[_-]?key|private[_-]?key|signature)"
    r"[\"']?\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^\s,;}&\]]+)"
)


def is_secret(key: object) -> bool:
    """Whether a setting's name (the last part of a dotted one) looks like that of a secret."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(key).rpartition(".")[2])
    words = [word for word in re.split(r"[^A-Za-z0-9]+", name.lower()) if word]
    return not _WORDS.isdisjoint(words) or not _PAIRS.isdisjoint(pairwise(words))


def hidden(value: Any, key: object = "") -> Any:
    """A copy of nested plain values with `HIDDEN` for apparent secrets and for passwords in URLs.

    Numbers and booleans under a name such as `class_token` are kept; under a password's name they are hidden. `key` is
    the name of the value.
    """
    if isinstance(value, Mapping):
        return {name: hidden(inner, name if not is_secret(key) else key) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [hidden(inner, key) for inner in value]
    if is_secret(key) and (isinstance(value, str) or (type(value) is int and "token" not in str(key).lower())):
        return HIDDEN
    return _URL.sub(rf"\g<1>{HIDDEN}", value) if isinstance(value, str) else value


def remember_secrets(value: Any, key: object = "") -> None:
    """Remember the secrets in nested settings, so that `hidden_text` finds them in other packages' messages."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            remember_secrets(inner, name if not is_secret(key) else key)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            remember_secrets(inner, key)
    elif isinstance(value, str) and is_secret(key) and len(value) >= _TELLING:
        _remembered.add(value)


def hidden_text(text: str) -> str:
    """A text, such as another package's error, with secrets hidden.

    Hidden are the settings given to `remember_secrets`, environment variables named like secrets, what follows such a
    name and a colon or equals sign, passwords in URLs, and Hub tokens.
    """
    environment = {value for name, value in os.environ.items() if is_secret(name) and len(value) >= _TELLING}
    # The shell's working directories.
    environment -= {os.environ.get("PWD"), os.environ.get("OLDPWD")}
    for secret in sorted(_remembered | environment, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _TOKEN.sub(HIDDEN, _URL.sub(rf"\g<1>{HIDDEN}", _IN_TEXT.sub(rf"\g<1>{HIDDEN}", text)))


def hidden_words(words: Sequence[str]) -> list[str]:
    """A command line with secrets hidden: in `--a.api_key X`, `--a.api_key=X` and `--a '{api_key: X}'`."""
    shown: list[str] = []
    before = ""
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("--") else (before, "", word)
        if word.startswith("--") and not equals:
            shown.append(word)
        else:
            shown.append((f"{option}=" if equals else "") + _hidden_word(option, value))
        before = option if word.startswith("--") and not equals else ""
    return shown


def _hidden_word(option: str, value: str) -> str:
    if option.startswith("--") and is_secret(option):
        return HIDDEN
    try:
        data = parse_yaml(value, option).data if value[:1] in ("{", "[") else None
    except DocumentError:
        data = None
    if isinstance(data, (dict, list)):
        without = hidden(data)
        return value if without == data else json.dumps(without)
    return hidden_text(value)


def without_hidden(value: Any) -> Any:
    """Nested values without the entries replaced by `hidden`, which must be given again."""
    if isinstance(value, Mapping):
        return {key: without_hidden(inner) for key, inner in value.items() if inner != HIDDEN}
    return [without_hidden(inner) for inner in value if inner != HIDDEN] if isinstance(value, list) else value


def has_options(recipe: Any) -> bool:
    """Whether a recipe, as nested mappings, has options for a tracker, model or optimizer."""
    sections = recipe.values() if isinstance(recipe, Mapping) else ()
    return any(isinstance(section, Mapping) and bool(section.get("options")) for section in sections)
