"""Formats numbers for people."""


def format_count(count: float) -> str:
    """Formats with three significant digits and an SI prefix: `12.3 k`."""
    count = float(f"{count:.3g}")
    for factor, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= factor:
            return f"{count / factor:#.3g}".rstrip(".") + prefix
    return f"{count:.3g}"


def format_duration(seconds: float) -> str:
    """Formats with the two largest units: `1 m 20 s`, `2 d 3 h`."""
    seconds = round(seconds)
    for size, unit, size_below, unit_below in ((86_400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // size_below} {unit_below}"
    return f"{seconds} s"
