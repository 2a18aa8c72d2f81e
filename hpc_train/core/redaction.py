"""Removes secrets from commands, URLs and variables, and control characters from what is printed.

Secrets are recognised by their form or by the name of their variable or option. Anything else passes, such as a bare
token among the words of a command.
"""

import re
from collections.abc import Sequence

REDACTED = "(redacted)"

_SECRET = re.compile(
    r"TOKEN(?!IZ|S(?![A-Za-z]))|SECRET|PASSW|PASSPHRASE|CREDENTIAL|COOKIE|SIGNATURE|JWT|BEARER"  # not TOKENIZER
    r"|KEYS?(?![A-Za-z])|(?:API|ACCESS|PRIVATE)[_.-]?KEY|(?<![A-Za-z])(?:AUTH|AUTHORIZATION|PASS|PWD|SIG)(?![A-Za-z])",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"[^\s'\"]+")
_USER = re.compile(
    r"[^/:@]*:(?!\d{1,5}(?:[/?#]|$)).*@|[^/]*@"
)  # a password may have any character; host:8080/a@b has none
_QUERY = re.compile(r"\?(?=[\w.~%-]+=)[^)]+")  # a path with a query but no host, as in the errors of HTTP clients
# Tokens with a known prefix: Hugging Face, GitHub, GitLab, Slack, AWS.
_KNOWN = re.compile(r"\b(?:hf_|gh[opsu]_|github_pat_|glpat-|xox[abp]-|AKIA)[A-Za-z0-9_-]{12,}")
_BEARER = re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{8,}", re.IGNORECASE)
_PAIR = re.compile(
    r"""(?<![\w.-])(?P<name>[\w.-]+)(?P<is>["']?\s*[=:]\s*)(?P<value>"[^"]*"|'[^']*'|[^\s,;&"'(){}\[\]]+)"""
)
_OPTION = re.compile(r"(?P<name>-{0,2}[A-Za-z_][\w.-]*)=.*", re.DOTALL)


def looks_secret(name: str, value: str = "") -> bool:
    """Whether a variable's name is that of a secret, or its value a URL with credentials."""
    return bool(_SECRET.search(name)) or without_secrets(value) != value


def variable(name: str, value: str) -> str:
    """The value of a variable or key, redacted if its name says that it is a secret."""
    return REDACTED if _SECRET.search(name) else without_secrets(value)


def command(words: Sequence[str]) -> list[str]:
    """A command line without the values of `--api-key=...`, `--token ...`, `KEY=...`, and without secrets in URLs."""
    redacted: list[str] = []
    for word in words:
        is_value = redacted and _names_secret(redacted[-1]) and not word.startswith("--")
        redacted.append(REDACTED if is_value else _word(word))
    return redacted


def without_secrets(text: str, mark: str = REDACTED) -> str:
    """`text` without credentials, queries and fragments of URLs, and without bearer tokens.

    mark: replaces them.
    """
    text = _TOKEN.sub(lambda token: _token(token[0], mark), text)
    return _KNOWN.sub(mark, _BEARER.sub(rf"\1 {mark}", text))


def _token(token: str, mark: str) -> str:
    scheme, is_url, rest = token.partition(":/")  # pathlib makes one slash of two
    if not is_url or not scheme[-1:].isalnum():
        return _QUERY.sub(f"?{mark}" if mark else "", token)
    slashes, rest = ("/", rest[1:]) if rest.startswith("/") else ("", rest)
    if user := _USER.match(rest):
        rest = (f"{mark}@" if mark else "") + rest[user.end() :]
    place = re.match(r"[^?#]*", rest)
    assert place is not None
    cut, after = rest[place.end() : place.end() + 1], rest[place.end() :].rstrip(")")
    closing = rest[place.end() + len(after) :]  # a bracket around the URL
    return f"{scheme}:/{slashes}{place[0]}{cut + mark if cut and mark else ''}{closing}"


def message(text: str) -> str:
    """A message to print: without secrets and control characters."""
    return printable(without_secrets(text))


def printable(text: str) -> str:
    """Text from a file, a name or a command line, safe for a terminal.

    Control characters except line ends and tabs become the replacement character.
    """
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def _names_secret(word: str) -> bool:
    """Whether a word is an option without a value whose name says that it is a secret."""
    return word.startswith("-") and "=" not in word and bool(_SECRET.search(word))


def _word(word: str) -> str:
    whole = _OPTION.fullmatch(word)
    if whole and _SECRET.search(whole["name"]):
        return f"{whole['name']}={REDACTED}"
    return _PAIR.sub(_pair, without_secrets(word))


def _pair(found: re.Match[str]) -> str:
    """One `name = value` inside a word, as in --set task.options='{api_key = "..."}'."""
    return f"{found['name']}{found['is']}{REDACTED}" if _SECRET.search(found["name"]) else found[0]
