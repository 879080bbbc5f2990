"""Reads the weights of a Hugging Face folder: names, shapes and dtypes are checked in the headers, before a weight."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from triplane.hf.names import OUTPUT_BIAS, to_hf_name
from triplane.hf.weights import INDEX, SINGLE
from triplane.model.config import ModelConfig
from triplane.model.transformer import Transformer
from triplane.storage.errors import CheckpointError
from triplane.storage.foreign import FileName, Name, first_problem, read_json, regular_file

_DTYPES = ("F64", "F32", "F16", "BF16")
_NO_WEIGHT = re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq")
"""Old conversions hold rotary frequencies, which follow from config.json; transformers passes over them too."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class _Index(BaseModel, strict=True):
    weight_map: dict[Name, FileName]


_Names = TypeAdapter(list[Name])


class _Stored(NamedTuple):
    """A tensor, as the header of its file describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class FolderWeights(Mapping[str, Tensor]):
    """The weights of a folder by our names, read when they are asked for; holds none of them.

    Raises CheckpointError, with Hugging Face's names, unless the headers hold exactly the weights of `config`. A head
    beside tied embeddings, an output bias and rotary frequencies are passed over: see `check_values`.
    """

    def __init__(self, folder: Path, config: ModelConfig):
        self.folder = folder
        self._stored = {name: stored for name, stored in _stored(folder).items() if not _NO_WEIGHT.fullmatch(name)}
        if (layers := _layers(self._stored)) != config.n_layers:
            raise CheckpointError(
                f"{folder}: config.json has num_hidden_layers {config.n_layers}, but {layers} have weights, as "
                f"model.layers.NUMBER.NAME"
            )
        with torch.device("meta"):
            shapes = {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}
        self._hf_names = {name: to_hf_name(name) for name in shapes}
        expected = {self._hf_names[name]: shape for name, shape in shapes.items()}
        self._check_names(expected, self._optional(config))
        for name, shape in (expected | self._optional(config)).items():
            self._check(name, shape)

    def __getitem__(self, name: str) -> Tensor:
        return self._read(self._hf_names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._hf_names)

    def __len__(self) -> int:
        return len(self._hf_names)

    def check_values(self) -> None:
        """Reads every weight; raises CheckpointError if one is not finite, or if one that is passed over matters."""
        for name in self._hf_names.values():
            if not (finite := self._read(name).float().isfinite()).all():
                bad = int((~finite).sum())
                raise CheckpointError(f"{self._where(name)}: {bad} of {finite.numel()} elements are not finite in fp32")
        for name in self._stored.keys() - set(self._hf_names.values()):
            if name == _HEAD:
                self._check_tied()
            elif self._read(name).count_nonzero():
                raise CheckpointError(f"{self._where(name)}: not zero, and this model has no output bias")

    def _check_tied(self) -> None:
        head, embedding = self._read(_HEAD).float(), self._read(_EMBEDDING).float()
        if (difference := (head - embedding).abs().max().item()) != 0:
            raise CheckpointError(
                f"{self._where(_HEAD)}: differs from {_EMBEDDING} by {difference:.2e}, but config.json ties them: set "
                f"tie_word_embeddings to false, or remove it"
            )

    def _optional(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Returns the tensors that may be stored besides the weights of our model."""
        shapes: dict[str, tuple[int, ...]] = {}
        if config.tie_embeddings:
            shapes[_HEAD] = (config.vocab_size, config.dim)
        if config.attention.qkv_bias:
            biases = [to_hf_name(f"blocks.{number}.{OUTPUT_BIAS}") for number in range(config.n_layers)]
            shapes |= dict.fromkeys(biases, (config.dim,))
        return {name: shape for name, shape in shapes.items() if name in self._stored}

    def _check_names(self, expected: Mapping[str, object], optional: Mapping[str, object]) -> None:
        if missing := sorted(expected.keys() - self._stored.keys()):
            raise CheckpointError(f"{self.folder}: {_count(missing)} missing; the first is {missing[0]}")
        if unknown := sorted(self._stored.keys() - expected.keys() - optional.keys()):
            raise CheckpointError(
                f"{self.folder}: {_count(unknown)} in excess of what config.json describes; the first is {unknown[0]}"
            )

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        stored = self._stored[name]
        if stored.shape != shape:
            raise CheckpointError(
                f"{self._where(name)}: its shape is {list(stored.shape)}, but config.json makes it {list(shape)}"
            )
        if stored.dtype not in _DTYPES:
            raise CheckpointError(
                f"{self._where(name)}: its dtype is {stored.dtype}; save it as one of {', '.join(_DTYPES)}"
            )

    def _where(self, name: str) -> str:
        return f"{self._stored[name].file}: {name}"

    def _read(self, name: str) -> Tensor:
        try:
            with safe_open(self._stored[name].file, framework="pt") as file:
                weight: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._where(name)}: unreadable: {error}") from error
        return weight


def _stored(folder: Path) -> dict[str, _Stored]:
    """Reads the headers of the files, by Hugging Face's names; a single file beats an index, as in transformers."""
    if (folder / SINGLE).exists() or not (folder / INDEX).exists():
        return _header(folder / SINGLE)
    stored: dict[str, _Stored] = {}
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
        return _Index.model_validate(read_json(path)).weight_map
    except ValidationError as error:
        raise CheckpointError(f"{path}: {first_problem(error)}") from None


def _header(path: Path) -> dict[str, _Stored]:
    try:
        regular_file(path)
        with safe_open(path, framework="pt") as file:
            names = _Names.validate_python(list(file.keys()))
            slices = {name: file.get_slice(name) for name in names}
            return {name: _Stored(path, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
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


def _layers(names: Mapping[str, object]) -> int:
    return len({match[1] for name in names if (match := _LAYER.match(name))})


def _count(names: list[str]) -> str:
    return f"{len(names)} weights are" if len(names) > 1 else "1 weight is"
