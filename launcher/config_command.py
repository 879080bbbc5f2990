"""`triplane config`: prints the keys of a run config; imports no torch."""

import json

from triplane.config.reference import reference
from triplane.config.schema import file_schema, keys_schema


def show_reference() -> None:
    """Prints docs/config.md."""
    print(reference(keys_schema()), end="")


def show_schema() -> None:
    """Prints the JSON schema of a config file."""
    print(json.dumps(file_schema(), indent=1))
