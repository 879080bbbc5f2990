"""Tokens per CPU-second of loaders in one process on one corpus, side by side.

    python benchmarks/data_order.py [--tokens 40_000_000] [--repeats 5]

Needs the extra `bench`. Each reader gives batches of 8 sequences of 2,048 int64 tokens from a warm page cache.
"""

import argparse
import io
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from triplane.data.corpus import Corpus
from triplane.data.cuts import Even
from triplane.data.loader import SequenceDataset, batches
from triplane.data.manifest import Manifest
from triplane.data.plan import Phase, TrainingPlan
from triplane.data.shards import write_shard

_SEQ_LEN = 2048
_BATCH = 8
_VOCAB_SIZE = 32_000


def _corpus(folder: Path, tokens: int) -> Corpus:
    """Random documents of log-normal length, mean about 800 tokens, in ten shards."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    shards = []
    for number in range(10):
        documents: list[np.ndarray] = []
        size = 0
        while size < tokens // 10:
            length = int(np.clip(draw.lognormal(6.0, 1.2), 20, 60_000))
            document = draw.integers(3, _VOCAB_SIZE, length, dtype=np.uint16)
            document[0], document[-1] = 1, 2
            documents.append(document)
            size += length
        stored = io.BytesIO(np.concatenate(documents).tobytes())
        lengths = np.array([len(document) for document in documents], np.uint32)
        shards.append(write_shard(folder, number, tokens=stored, lengths=lengths, dtype=np.dtype(np.uint16)))
    digest = "0" * 64
    Manifest(tokenizer_digest=digest, vocab_size=_VOCAB_SIZE, bos_id=1, text_bytes=1, shards=tuple(shards)).save(folder)
    return Corpus(folder)


def _stored(corpus: Corpus) -> np.ndarray:
    return corpus.read(0, corpus.tokens)[0]


def triplane(folder: Path, num_workers: int = 0) -> Callable[[], Iterator[int]]:
    """Shuffled, with boundaries, targets and loss masks; read ahead in a thread, as training does."""
    dataset = _dataset(folder)
    steps = len(dataset) // _BATCH
    settings = {"global_batch_size": _BATCH, "micro_batch_size": _BATCH, "dp_rank": 0, "dp_size": 1}

    def read() -> Iterator[int]:
        for batch in batches(dataset, consumed_sequences=0, steps=steps, num_workers=num_workers, **settings):
            yield len(batch.tokens_T)

    return read


def triplane_without_thread(folder: Path) -> Callable[[], Iterator[int]]:
    """The same batches, each read when it is asked for, as the other readers do."""
    dataset = _dataset(folder)

    def read() -> Iterator[int]:
        for first in range(0, len(dataset) - _BATCH, _BATCH):
            yield len(dataset[range(first, first + _BATCH)].tokens_T)

    return read


def _dataset(folder: Path) -> SequenceDataset:
    corpus = Corpus(folder / "triplane")
    cut = Even(corpus.tokens, _SEQ_LEN, 64 * _SEQ_LEN)
    phase = Phase(start=0, weights=[1.0], cuts=[cut], seq_len=_SEQ_LEN)
    plan = TrainingPlan([phase], 0, window_runs=64, lanes=1)
    return SequenceDataset([corpus], plan, document_mask=True)


def webdataset(folder: Path) -> Callable[[], Iterator[int]]:
    """The same shards, in stored order, without boundaries, targets or masks."""
    import webdataset as wds

    shards = sorted(map(str, (folder / "triplane").glob("*.tar")))

    def read() -> Iterator[int]:
        left = np.empty(0, np.uint16)
        size = _BATCH * _SEQ_LEN
        for sample in wds.WebDataset(shards, shardshuffle=False).decode():
            left = np.concatenate([left, sample["tok.npy"]])
            whole = len(left) // size * size
            for start in range(0, whole, size):
                yield torch.from_numpy(left[start : start + size].astype(np.int64)).numel()
            left = left[whole:]

    return read


def litdata(folder: Path) -> Callable[[], Iterator[int]]:
    """TokensLoader, shuffled, without boundaries, targets or masks."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader
    from litdata.streaming.writer import BinaryWriter

    target = folder / "litdata"
    if not target.exists():
        writer = BinaryWriter(str(target), chunk_size=4_000_000, item_loader=TokensLoader(_SEQ_LEN))
        for i, part in enumerate(np.array_split(_stored(Corpus(folder / "triplane")), 10_000)):
            writer[i] = torch.from_numpy(part)
        writer.done()
        writer.merge()
    dataset = StreamingDataset(str(target), item_loader=TokensLoader(_SEQ_LEN), shuffle=True, drop_last=True)

    def read() -> Iterator[int]:
        for batch in StreamingDataLoader(dataset, batch_size=_BATCH, num_workers=0):
            yield batch.to(torch.int64).numel()

    return read


def streaming(folder: Path) -> Callable[[], Iterator[int]]:
    """mosaicml-streaming, shuffled (py1e), without boundaries, targets or masks; a sample is a sequence."""
    from streaming import MDSWriter, StreamingDataset

    target = folder / "streaming"
    if not target.exists():
        tokens = _stored(Corpus(folder / "triplane"))
        with MDSWriter(out=str(target), columns={"tokens": f"ndarray:uint16:{_SEQ_LEN}"}) as writer:
            for start in range(0, len(tokens) - _SEQ_LEN, _SEQ_LEN):
                writer.write({"tokens": tokens[start : start + _SEQ_LEN]})
    dataset = StreamingDataset(local=str(target), shuffle=True, batch_size=_BATCH)

    def read() -> Iterator[int]:
        for batch in torch.utils.data.DataLoader(dataset, _BATCH, collate_fn=_stack, drop_last=True):
            yield batch.numel()

    return read


def _stack(samples: list[dict[str, np.ndarray]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))


READERS = (triplane, triplane_without_thread, webdataset, litdata, streaming)


def _measure(reader: Callable[[Path], Callable[[], Iterator[int]]], folder: Path, repeats: int) -> list[float]:
    """Mtok per CPU-second of each pass, all threads of this process counted."""
    read = reader(folder)
    for _ in islice(read(), 50):
        pass
    rates = []
    for _ in range(repeats):
        started = time.process_time()
        tokens = sum(read())
        rates.append(tokens / (time.process_time() - started) / 1e6)
    return rates


def _cold_start() -> tuple[float, float]:
    """Milliseconds and MiB to open a plan of 10^12 sequences and find what is at position 10^12, in a fresh process."""
    started, held_kib = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cut = Even(10**12 * _SEQ_LEN, _SEQ_LEN, 64 * _SEQ_LEN)
    phase = Phase(start=0, weights=[1.0, 2.0], cuts=[cut, cut], seq_len=_SEQ_LEN)
    TrainingPlan([phase], 0, window_runs=64, lanes=1).chunk(10**12)
    taken_ms = 1e3 * (time.process_time() - started)
    return taken_ms, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held_kib) / 1024


def _data_time_percent(folder: Path, num_workers: int, tokens_per_s: float) -> float:
    """Returns the percentage of a step that a consumer of `tokens_per_s` waits for its data."""
    waited = steps = 0.0
    batches_read = triplane(folder, num_workers)()
    next(batches_read)
    for _ in range(200):
        started = time.perf_counter()
        tokens = next(batches_read)
        waited += time.perf_counter() - started
        steps += tokens / tokens_per_s
        time.sleep(tokens / tokens_per_s)
    return 100 * waited / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=40_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only == "cold":
        print(json.dumps(_cold_start()))
        return
    if options.only:
        (reader,) = (reader for reader in READERS if reader.__name__ == options.only)
        print(json.dumps(_measure(reader, options.folder, options.repeats)))
        return
    folder = Path(tempfile.mkdtemp(prefix="triplane-bench-"))
    try:
        _corpus(folder / "triplane", options.tokens)
        print(f"| reader | Mtok per CPU-second: median (lowest, highest) of {options.repeats} | what it gives |")
        print("| --- | --- | --- |")
        # Each in a process of its own: caches and threads of one would be counted for another.
        for reader in READERS:
            arguments = ["--only", reader.__name__, "--folder", str(folder), "--repeats", str(options.repeats)]
            rates = _in_a_process(arguments)
            spread = f"{statistics.median(rates):.0f} ({min(rates):.0f}, {max(rates):.0f})" if rates else "failed"
            print(f"| {reader.__name__} | {spread} | {reader.__doc__} |", flush=True)
        cold = [_in_a_process(["--only", "cold"]) for _ in range(options.repeats)]
        taken_ms, held_mib = (statistics.median(figure) for figure in zip(*cold))
        print(f"\nplan of 10^12 sequences, position 10^12, fresh process: {taken_ms:.1f} ms, {held_mib:.1f} MiB more")
        for workers in (0, 1):
            percent = _data_time_percent(folder, workers, 1e6)
            print(f"data time of a 1 M tokens/s consumer, {workers} workers, blocks not yet verified: {percent:.2f} %")
    finally:
        shutil.rmtree(folder)


def _in_a_process(arguments: list[str]) -> Any:
    ran = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    return json.loads(ran.stdout.splitlines()[-1]) if ran.returncode == 0 else []


if __name__ == "__main__":
    main()
