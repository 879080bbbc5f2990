"""Reads environment variables that other programs set; every error names the variable."""

from collections.abc import Mapping

from triplane.storage.errors import LaunchError


def whole_number(
    environment: Mapping[str, str], name: str, *, default: int | None = None, least: int = 0, below: int | None = None
) -> int:
    """Returns the value of `name`; LaunchError if it is missing without a default, not a number, or out of range."""
    given = environment.get(name)
    if given is None:
        if default is None:
            raise LaunchError(f"{name} is not set, but this process was started as one of several ranks; set it")
        return default
    if not given.strip().isdecimal():
        raise LaunchError(f"{name} is {given!r}; set a whole number")
    number = int(given)
    if number < least or (below is not None and number >= below):
        allowed = f"{least} or more" if below is None else f"a number from {least} to {below - 1}"
        raise LaunchError(f"{name} is {number}; set {allowed}")
    return number
