"""Errors for wrong arguments: which argument, what it got, what it takes."""


class Words(str):
    """What was got, in words: printed without quotes."""

    def __repr__(self):
        return str(self)


def wrong(name: str, got, takes: str) -> ValueError:
    return ValueError(f"{name}: got {got!r}, takes {takes}")


def positive_int(value, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise wrong(name, value, "an integer of at least 1")
    return value


def positive_number(value, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise wrong(name, value, "a number above 0")
    return value


def number_or_none(value, name: str) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise wrong(name, value, "a number or None")
    return value


def one_of(value, allowed, name: str):
    if not isinstance(value, str) or value not in allowed:
        raise wrong(name, value, f"one of {', '.join(allowed)}")
    return value


def callable_or_none(value, name: str):
    if value is not None and not callable(value):
        raise wrong(name, value, "a callable or None")
    return value
