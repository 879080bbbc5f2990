"""Reads the weights of a Hugging Face folder: names, shapes and dtypes are checked in the headers, before a weight."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from triplane.hf.config import describe
from triplane.hf.family import Described, Family
from triplane.hf.tensors import Names, Stored
from triplane.hf.weights import INDEX, SINGLE
from triplane.model.config import ModelConfig
from triplane.model.describe import model_weights
from triplane.storage.errors import CheckpointError
from triplane.storage.foreign import FileName, Name, first_problem, read_json, regular_file

_DTYPES = ("F64", "F32", "F16", "BF16")
_FREQUENCIES = "rotary_emb.inv_freq"
"""Old conversions hold rotary frequencies, which follow from config.json; transformers passes over them too."""


class _Index(BaseModel, strict=True):
    weight_map: dict[Name, FileName]
    metadata: dict[str, Any] | None = None


_Names = TypeAdapter(list[Name])


class _Found(NamedTuple):
    """A tensor, as the header of its file describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def described(folder: Path) -> Described:
    """Returns what the config.json of a folder describes.

    Without modules that predict further if it holds none: transformers, which writes no such, keeps their number.
    """
    path = folder / "config.json"
    found = describe(read_json(path), str(path))
    first = f"{found.family.names_of(found.model).layers}.{found.model.n_layers}."
    if found.model.predict_further is None or any(name.startswith(first) for name in _headers(folder)):
        return found
    return found._replace(model=found.model.model_copy(update={"predict_further": None}))


class FolderWeights(Mapping[str, Tensor]):
    """The weights of a folder by our names, read when they are asked for; holds none of them.

    Raises CheckpointError, with Hugging Face's names, unless the headers hold exactly the tensors of `config`. A head
    beside tied embeddings, output biases that the model lacks, and what follows from config.json are passed over: see
    `check_values`.
    """

    def __init__(self, folder: Path, family: Family, config: ModelConfig):
        self.folder = folder
        names = family.names_of(config)
        headers = _headers(folder)
        self._found, self._own_names = _by_family_names(headers, names)
        self.left_out = [
            other for other in names.others if any(_today(name, names).startswith(other) for name in headers)
        ]
        """Beginnings of the names of tensors that our model has no place for."""
        if (layers := _layers(self._found, names.layers)) != config.n_blocks:
            raise CheckpointError(
                f"{folder}: config.json has {config.n_blocks} layers, but {layers} have weights, as "
                f"{names.layers}.NUMBER.NAME"
            )
        self._tensors = family.tensors(config)
        self._places: dict[str, list[tuple[Stored, int]]] = {}
        for stored in self._tensors.values():
            for number, weight in enumerate(stored.weights):
                self._places.setdefault(weight.name, []).append((stored, number))
        self._optional = {name: shape for name, shape in _optional(names, config).items() if name in self._found}
        self._copied = {copy: of for copy, of in self._copies(names, config).items() if copy in self._found}
        self._check_names()
        copied = {copy: self._tensors[of].shape for copy, of in self._copied.items()}
        for name, shape in ({name: t.shape for name, t in self._tensors.items()} | self._optional | copied).items():
            self._check(name, shape)

    def __getitem__(self, name: str) -> Tensor:
        places = self._places[name]
        parts = [stored.part(self._read(stored.name), number) for stored, number in places]
        return parts[0] if places[0][0].expert is None else torch.stack(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def check_values(self) -> None:
        """Reads every tensor; raises CheckpointError if one is not finite, or if one that is passed over matters."""
        for name in self._tensors:
            if not (finite := self._read(name).float().isfinite()).all():
                bad = int((~finite).sum())
                raise CheckpointError(f"{self._where(name)}: {bad} of {finite.numel()} elements are not finite in fp32")
        for name in self._optional:
            if name.endswith(".bias"):
                if self._read(name).count_nonzero():
                    raise CheckpointError(f"{self._where(name)}: not zero, and this model has no output bias")
            else:
                why = "but config.json ties them: set tie_word_embeddings to false, or remove it"
                self._check_equal(name, self._places["embedding.weight"][0][0].name, why)
        for copy, of in self._copied.items():
            self._check_equal(copy, of, "of which it is a copy in this model")

    def _check_equal(self, name: str, other: str, why: str) -> None:
        if (difference := (self._read(name).float() - self._read(other).float()).abs().max().item()) != 0:
            raise CheckpointError(f"{self._where(name)}: differs from {other} by {difference:.2e}, {why}")

    def _copies(self, names: Names, config: ModelConfig) -> dict[str, str]:
        """Maps what layers that predict further may hold once more to what it must equal."""
        tied = {"head": "embedding"} if config.tie_embeddings else {}
        return {
            f"{names.layers}.{number}.{inside}.weight": self._places[f"{tied.get(ours, ours)}.weight"][0][0].name
            for number in range(config.n_layers, config.n_blocks)
            for inside, ours in names.copies
        }

    def _check_names(self) -> None:
        if missing := sorted(self._tensors.keys() - self._found.keys()):
            raise CheckpointError(f"{self.folder}: {_count(missing)} missing; the first is {missing[0]}")
        if unknown := sorted(self._found.keys() - self._tensors.keys() - self._optional.keys() - self._copied.keys()):
            raise CheckpointError(
                f"{self.folder}: {_count(unknown)} in excess of what config.json describes; the first is {unknown[0]}"
            )

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        stored = self._found[name]
        if stored.shape != shape:
            raise CheckpointError(
                f"{self._where(name)}: its shape is {list(stored.shape)}, but config.json makes it {list(shape)}"
            )
        if stored.dtype not in _DTYPES:
            raise CheckpointError(
                f"{self._where(name)}: its dtype is {stored.dtype}; save it as one of {', '.join(_DTYPES)}"
            )

    def _where(self, name: str) -> str:
        return f"{self._found[name].file}: {name}"

    def _read(self, name: str) -> Tensor:
        try:
            with safe_open(self._found[name].file, framework="pt") as file:
                weight: Tensor = file.get_tensor(self._own_names[name])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._where(name)}: unreadable: {error}") from error
        return weight


def _headers(folder: Path) -> dict[str, _Found]:
    """Reads the headers of the files, by Hugging Face's names; a single file beats an index, as in transformers."""
    if (folder / SINGLE).exists() or not (folder / INDEX).exists():
        return _header(folder / SINGLE)
    stored: dict[str, _Found] = {}
    listed = _listed(folder)
    for file in sorted(set(listed.values())):
        for name, found in _header(folder / file).items():
            if name in stored:
                raise CheckpointError(f"{folder}: {name} is in {stored[name].file.name} and in {file}")
            stored[name] = found
    for name, file in listed.items():
        if name not in stored or stored[name].file.name != file:
            raise CheckpointError(f"{folder / file}: lacks {name}, which {INDEX} says is there")
    return stored


def _listed(folder: Path) -> dict[str, str]:
    """The file of each weight, by the index."""
    path = folder / INDEX
    try:
        index = _Index.model_validate(read_json(path))
    except ValidationError as error:
        raise CheckpointError(f"{path}: {first_problem(error)}") from None
    if index.metadata is None:
        raise CheckpointError(f'{path}: no metadata, without which transformers reads no index; add "metadata": {{}}')
    return index.weight_map


def _header(path: Path) -> dict[str, _Found]:
    try:
        regular_file(path)
        with safe_open(path, framework="pt") as file:
            names = _Names.validate_python(list(file.keys()))
            slices = {name: file.get_slice(name) for name in names}
            return {name: _Found(path, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except ValidationError as error:
        raise CheckpointError(f"{path}: the weight {first_problem(error)}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_hint(path)}") from error
    except (OSError, SafetensorError, MemoryError) as error:
        raise CheckpointError(f"{path}: unreadable: {' '.join(str(error).split())[:200]}") from error


def _hint(path: Path) -> str:
    other = [file.name for kind in ("bin", "pt", "pth", "gguf") for file in path.parent.glob(f"*.{kind}")]
    if path.exists() or not other:
        return ""
    return f"; {other[0]} is not read: save the model as safetensors, by transformers' save_pretrained"


def _by_family_names(headers: Mapping[str, _Found], names: Names) -> tuple[dict[str, _Found], dict[str, str]]:
    """Returns the tensors of the text model, and what each is called in its file, by the names of the family today."""
    own = {}
    for name in headers:
        today = _today(name, names)
        if today.startswith(names.others or (" ",)) or today.endswith(_FREQUENCIES):
            continue
        own[today] = name
    heads = {f"{name}.{leaf}" for name, held in names.ends.items() if held == "head" for leaf in ("weight", "bias")}
    if not any(name.startswith(names.base) for name in own):
        own = {name if name in heads else f"{names.base}{name}": theirs for name, theirs in own.items()}
    buffers = re.compile(rf"{re.escape(names.layers)}\.\d+\.({'|'.join(map(re.escape, names.buffers))})")
    own = {name: theirs for name, theirs in own.items() if not (names.buffers and buffers.fullmatch(name))}
    return {name: headers[theirs] for name, theirs in own.items()}, own


def _today(name: str, names: Names) -> str:
    """Returns what the family calls a tensor today."""
    return next((new + name.removeprefix(old) for old, new in names.renamed if name.startswith(old)), name)


def _optional(names: Names, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the tensors that may be stored besides the weights of our model."""
    shapes: dict[str, tuple[int, ...]] = {}
    if config.tie_embeddings:
        head = next(name for name, held in names.ends.items() if held == "head")
        shapes[f"{head}.weight"] = (config.vocab_size, config.dim)
    output = next((name for name, held in names.layer.items() if held == "attention.wo"), None)
    ours = model_weights(config)
    for number in range(config.n_layers):
        has_bias = [f"blocks.{number}.attention.{layer}.bias" in ours for layer in ("wq", "wo")]
        if output is not None and has_bias == [True, False]:
            shapes[f"{names.layers}.{number}.{output}.bias"] = (config.dim,)
    return shapes


def _layers(names: Mapping[str, object], layers: str) -> int:
    number = re.compile(rf"{re.escape(layers)}\.(\d+)\.")
    return len({match[1] for name in names if (match := number.match(name))})


def _count(names: list[str]) -> str:
    return f"{len(names)} weights are" if len(names) > 1 else "1 weight is"
