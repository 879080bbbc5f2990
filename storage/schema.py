"""Says in one line what is wrong with a file that a pydantic schema refuses."""

from pydantic import ValidationError


def first_problem(error: ValidationError) -> str:
    """The first refused key, by its name in the file, with what stands there and why that is wrong."""
    first = error.errors(include_url=False)[0]
    parts = map(str, first["loc"])  # keys of the file among them, which may hold anything
    key = ".".join(part if part.isprintable() else ascii(part) for part in parts)
    if first["type"] == "missing":
        return f"no {key}"
    if first["type"] == "extra_forbidden":
        return f"the key {key} is unknown"
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("model_type", "dict_type"):
        reason = "no table of keys"
    if not key:
        return reason
    found = repr(first["input"])
    return f"{key} is {found if len(found) <= 60 else found[:57] + '...'}: {reason[0].lower()}{reason[1:]}"
