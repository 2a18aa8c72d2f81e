"""Values of meta.json: any may be absent, damaged or of another version, so each reader checks what it returns."""

from typing import Any

_LARGEST = 1e30  # a larger number is damage


def dict_at(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """The object at `key`, {} if there is none."""
    value = tree.get(key)
    return value if isinstance(value, dict) else {}


def list_at(tree: dict[str, Any], key: str) -> list[Any]:
    """The list at `key`, [] if there is none."""
    value = tree.get(key)
    return value if isinstance(value, list) else []


def text_at(tree: dict[str, Any], key: str) -> str | None:
    """The text at `key`, None if there is none or it is empty."""
    value = tree.get(key)
    return value if isinstance(value, str) and value else None


def positive_number(value: object) -> float | None:
    """The value as a float if it is a number that can measure or count something, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 < value < _LARGEST else None  # type: ignore[arg-type,operator]


def attempts(meta: dict[str, Any]) -> list[dict[str, Any]]:
    """The entry of each time that the run was started or resumed."""
    return [each for each in list_at(meta, "attempts") if isinstance(each, dict)]
