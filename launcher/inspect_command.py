"""`triplane inspect`: what a path holds, whatever it is."""

from pathlib import Path

from rich.console import Console

from triplane.launcher.corpus_commands import show_corpus


def inspect(path: Path, documents: int, verify: bool) -> None:
    """Prints what is in a corpus, a run's newest checkpoint, or a checkpoint."""
    console = Console(highlight=False, soft_wrap=True)
    if (path / "tokenizer.model").exists():
        show_corpus(console, path, documents, verify)
        return
    from triplane.launcher.model_commands import show_checkpoint  # imports torch

    show_checkpoint(console, path, verify)
