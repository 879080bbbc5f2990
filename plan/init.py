"""`triplane init`: writes the config of a run on a prepared corpus, with a reason for each value."""

from collections.abc import Iterator
from pathlib import Path

from triplane.checkpoint.manifest import read_manifest
from triplane.config.checks import check
from triplane.config.preflight import find_checkpoint, model_of
from triplane.config.toml import format_value
from triplane.data.config import DataConfig, SourceConfig
from triplane.data.opening import open_sources
from triplane.parallel.devices import missing_to_compile
from triplane.plan.amount import Amount
from triplane.plan.choices import Cluster, Start, Table, Text, choose, values
from triplane.plan.gpus import find_gpu
from triplane.plan.sizes import Choice
from triplane.storage.errors import ConfigError
from triplane.storage.files import write_whole
from triplane.training.config import RunConfig


def init(corpus: str, out: Path, *, size: str | None, initial: str | None, gpus: int | None, kind: str | None) -> str:
    """Writes `out`; returns how much text the run reads. Without `gpus` the run is for this machine's CPUs.

    `initial` is a checkpoint, or a run with one, whose weights the run starts from. Raises ConfigError if `out` exists,
    or no layout of the size fits the GPUs.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; remove it or give another --out")
    if (gpus is None) != (kind is None):
        raise ConfigError("--gpus and --gpu: give both, or neither for a run on CPUs")
    if size is not None and initial is not None:
        raise ConfigError("--size and --initial: give one; a checkpoint has a size of its own")
    source = SourceConfig(corpus=corpus)
    if source.is_tars:
        raise ConfigError(f"{corpus}: tars are not a corpus yet; write one with `triplane prepare`")
    sources = open_sources(DataConfig(sources=[source], seq_len=1), out.parent)
    (train,), (validation,) = sources.train, sources.validation
    text = Text(corpus, sources.tokenizer.vocab_size, train.tokens, validation.tokens)
    cluster = Cluster(gpus, kind, find_gpu(kind)) if gpus is not None and kind is not None else None
    start = None if initial is None else _start(initial, text)
    tables = choose(text, f"runs/{out.stem}", size=size, start=start, cluster=cluster)
    if size is not None and cluster is None and missing_to_compile(on_gpu=False) is None:
        tables["parallel"] = {"compile": Choice(True, "a tenth faster, after some seconds at the start")}
    config = RunConfig.model_validate(values(tables))
    assert start is None or config.model == start.model
    if problems := check(config, gpus or 1):
        raise ConfigError("\n".join(problems))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, "\n".join(_lines(tables)).encode())
    return Amount.of(config, sources).describe()


def _start(initial: str, text: Text) -> Start:
    found = find_checkpoint(initial)
    model = model_of(read_manifest(found).state["run"], found)
    if text.vocab_size > model.vocab_size:
        raise ConfigError(
            f"{text.corpus} has {text.vocab_size} token ids, but {initial} {model.vocab_size}; prepare the text with "
            "the tokenizer of the checkpoint"
        )
    return Start(initial, model)


def _lines(tables: dict[str, Table]) -> Iterator[str]:
    yield "# Written by `triplane init`; docs/config.md describes these keys and all others."
    for name, table in tables.items():
        if name:
            yield from ("", f"[{name}]")
        for key, (value, why) in table.items():
            yield f"{key} = {format_value(value)}  # {why}"
    yield ""
