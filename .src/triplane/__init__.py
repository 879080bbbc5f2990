"""triplane pretrains decoder-only language models over tensor, pipeline and data parallel ranks.

`triplane.load(checkpoint)` returns a model with its tokenizer: `triplane.launcher.api.LoadedModel`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triplane.launcher.api import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for, so that `import triplane` does not load torch."""
    if name == "load":
        from triplane.launcher.api import load

        return load
    if name == "__version__":
        from importlib.metadata import version

        return version("triplane")
    raise AttributeError(f"module 'triplane' has no attribute {name!r}")
