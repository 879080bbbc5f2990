"""Checkpoints that say other things than what was written, under a checksum that fits: always one line."""

import copy
import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutations import mutate
from small_models import random_weights, small_config, state_after
from typer.testing import CliRunner

from triplane.checkpoint.manifest import MANIFEST, Manifest, write_manifest
from triplane.checkpoint.reader import Checkpoint
from triplane.checkpoint.tensors import write_tensors
from triplane.checkpoint.tiling import tiles
from triplane.checkpoint.weights import CheckpointWeights
from triplane.launcher.cli import app
from triplane.parallel.placement import Fragment
from triplane.storage.errors import CheckpointError, DamagedError

CONFIG = small_config(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, hidden_dim=8, vocab_size=12)
WEIGHTS = random_weights(CONFIG)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two files, in which matrices are cut in two at different places."""
    folder = tmp_path_factory.mktemp("run") / "step_4"
    folder.mkdir()
    parts: tuple[list[Fragment], list[Fragment]] = ([], [])
    for name, weight in WEIGHTS.items():
        cut = (len(weight) + 1) // 3
        for part, (start, data) in zip(parts, ((0, weight[:cut]), (cut, weight[cut:]))):
            offsets = (start, *[0] * (weight.dim() - 1))
            part.append(
                Fragment(
                    kind="weight",
                    name=name,
                    shape=weight.shape,
                    offsets=offsets,
                    data=data.contiguous(),
                    primary=True,
                )
            )
    boxes, sizes = [], {}
    for number, part in enumerate(parts):
        file = folder / f"rank_{number}.safetensors"
        found, sizes[file.name] = write_tensors(file, part)
        boxes += found
    run = {"model": CONFIG.model_dump(mode="json"), "imported_from": "elsewhere"}
    write_manifest(folder, Manifest(state_after(4) | {"run": run}, boxes, sizes))
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "step_4"))


def _body(folder: Path) -> Any:
    return json.loads(json.loads((folder / MANIFEST).read_text())["body"])


def _write(folder: Path, body: Any) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    outer = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": text}
    (folder / MANIFEST).write_text(json.dumps(outer))


def _read_all(folder: Path) -> None:
    """Verifies a checkpoint and loads each weight, as the commands do."""
    checkpoint = Checkpoint(folder)
    checkpoint.verify()
    for name, weight in CheckpointWeights(checkpoint).items():
        assert weight.equal(WEIGHTS[name]), name


def _change(**changes: Any) -> Callable[[Any], Any]:
    return lambda body: body | changes


def _change_box(**changes: Any) -> Callable[[Any], Any]:
    return lambda body: body | {"boxes": [body["boxes"][0] | changes, *body["boxes"][1:]]}


def _change_state(**changes: Any) -> Callable[[Any], Any]:
    return lambda body: body | {"state": body["state"] | changes}


HOSTILE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "list": (lambda body: [], "no table of keys"),
    "deep": (lambda body: '{"format": 1, "state": ' + "[" * 100_000, "recursion limit"),
    "another format": (_change(format=2), "format 2, but this version of triplane reads 1"),
    "no format": (lambda body: {key: body[key] for key in body if key != "format"}, "no format"),
    "no boxes": (_change(boxes=...), "no boxes"),
    "unknown key": (_change(colour=1), "the key colour is unknown"),
    "size of text": (_change(file_bytes={"rank_0.safetensors": "9"}), "file_bytes.rank_0.safetensors is '9'"),
    "endless size": (_change(file_bytes={"rank_0.safetensors": 10**30}), "file_bytes.rank_0.safetensors is"),
    "file elsewhere": (_change(file_bytes={"../rank_0.safetensors": 9}), "not a plain file name"),
    "box elsewhere": (_change_box(file="/etc/passwd"), "boxes.0.file is '/etc/passwd': not a plain"),
    "a file of two lines": (_change(file_bytes={"a\nb": 1}), "'a.nb'.*: contains unprintable characters"),
    "a key of two lines": (
        _change_box(key="weight/a\nb"),
        "boxes.0.key is 'weight/a.nb': contains unprintable characters",
    ),
    "box in no file": (_change_box(file="rank_9.safetensors"), "rank_9.safetensors: has no bytes"),
    "negative": (_change_box(offsets=[-1, 0]), "boxes.0.offsets.0 is -1"),
    "endless shape": (_change_box(shape=[10**18, 16]), "its 2 boxes leave a gap or overlap"),
    "endless box": (_change_box(sizes=[10**18, 16]), "boxes of"),
    "other dims": (_change_box(sizes=[4]), "a box of 1 dims in a tensor of 2"),
    "checksum": (_change_box(crc32=2**32), "boxes.0.crc32 is 4294967296"),
    "doubled": (
        lambda body: body | {"boxes": [*body["boxes"], body["boxes"][0]]},
        "3 boxes leave a gap or overlap",
    ),
    "gap": (lambda body: body | {"boxes": body["boxes"][1:]}, "its 1 boxes leave a gap or overlap"),
    "all boxes lost": (_change(boxes=[]), "the manifest lists no weight/"),
    "a tensor lost": (
        lambda body: body | {"boxes": [box for box in body["boxes"] if box["key"] != body["boxes"][0]["key"]]},
        "the manifest lists no weight/",
    ),
    "two at one place": (
        lambda body: body | {"boxes": [body["boxes"][0], body["boxes"][0], *body["boxes"][3:]]},
        "boxes leave a gap or overlap|bytes, but boxes of",
    ),
    "no step": (_change_state(step=...), "no state.step"),
    "step of text": (_change_state(step="4"), "state.step is '4'"),
    "skipped": (_change_state(skipped=5), "state.skipped is 5"),
    "run a list": (_change_state(run=[]), r"state.run is \[\]"),
}


def _without_ellipsis(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_ellipsis(below) for key, below in value.items() if below is not ...}
    return value


@pytest.mark.parametrize(("change", "expected"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_manifest_is_refused_in_a_line(change: Callable[[Any], Any], expected: str, folder: Path) -> None:
    _read_all(folder)
    _write(folder, _without_ellipsis(change(_body(folder))))
    with pytest.raises(CheckpointError, match=expected) as caught:
        _read_all(folder)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(folder))


def test_links_and_pipes_are_refused_in_a_line(folder: Path) -> None:
    for name in ("rank_0.safetensors", MANIFEST):
        path = folder / name
        kept = path.read_bytes()
        for put in (lambda path: path.symlink_to(path.name), os.mkfifo):
            path.unlink()
            put(path)
            with pytest.raises(CheckpointError, match=f"{name}: (missing|not a regular file|0 bytes|Too many levels)"):
                _read_all(folder)
        path.unlink()
        path.write_bytes(kept)
    _read_all(folder)


def _header(data: bytes, change: Callable[[Any], Any]) -> bytes:
    """A safetensors file with another header, of the length of the old one where it fits."""
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(change(json.loads(data[8 : 8 + length]))).encode().ljust(length)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@pytest.mark.parametrize("seed", range(50))
def test_fifty_damaged_checkpoints(seed: int, written: Path, tmp_path: Path) -> None:
    """Whatever is changed, the commands say it in a line, or nothing of what is read has changed."""
    draw = random.Random(seed)
    folder = Path(shutil.copytree(written, tmp_path / "step_4"))
    before = sorted(path.name for path in folder.iterdir())
    file = folder / f"rank_{draw.randrange(2)}.safetensors"
    match draw.choice(["manifest", "manifest", "manifest", "header", "header", "length", "cut", "swap", "outer"]):
        case "manifest":
            _write(folder, mutate(_body(folder), draw, times=draw.randint(1, 3)))
        case "header":
            data = _header(file.read_bytes(), lambda header: mutate(header, draw, times=draw.randint(1, 3)))
            file.write_bytes(data)
            body = _body(folder)
            body["file_bytes"][file.name] = len(data)
            _write(folder, body)
        case "length":
            data = file.read_bytes()
            file.write_bytes(draw.choice([0, 1, len(data), 2**40, 2**64 - 1]).to_bytes(8, "little") + data[8:])
        case "cut":
            os.truncate(file, draw.randrange(file.stat().st_size))
        case "swap":
            other = folder / f"rank_{1 - int(file.stem[-1])}.safetensors"
            mine, theirs = file.read_bytes(), other.read_bytes()
            file.write_bytes(theirs)
            other.write_bytes(mine)
        case "outer":
            outer = mutate(json.loads((folder / MANIFEST).read_text()), draw, times=1)
            (folder / MANIFEST).write_text(json.dumps(outer))
    told = ""
    try:
        _read_all(folder)
    except CheckpointError as error:
        told = str(error)
    assert "\n" not in told
    shown = CliRunner().invoke(app, ["inspect", "--verify", str(folder)])
    assert shown.exception is None or isinstance(shown.exception, CheckpointError), repr(shown.exception)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_state_of_the_next_version_is_a_line(folder: Path) -> None:
    body = _body(folder)
    body["state"]["run"] = {"corpus_digests": [], "model": body["state"]["run"]["model"] | {"experts": 8}}
    _write(folder, body)
    for command in (["generate"], ["evaluate"], ["export"], ["inspect"]):
        arguments = [*command, str(folder), *([str(folder.parent / "out")] if command == ["export"] else [])]
        error = CliRunner().invoke(app, arguments).exception
        assert isinstance(error, CheckpointError) and "\n" not in str(error)
        assert "written by another version of triplane" in str(error)


@given(st.data())
def test_only_boxes_that_tile_a_tensor_are_taken(data: st.DataObject) -> None:
    """A tensor is cut at random; then a box is moved, resized, doubled or left out. Counted element by element."""
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=0, max_size=3)))
    boxes = [((0,) * len(shape), shape)]
    for _ in range(data.draw(st.integers(0, 4))):
        offsets, sizes = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        if not shape:
            boxes.append((offsets, sizes))
            break
        dim = data.draw(st.integers(0, len(shape) - 1))
        cut = data.draw(st.integers(0, sizes[dim]))
        first, second = list(sizes), list(sizes)
        first[dim], second[dim] = cut, sizes[dim] - cut
        moved = list(offsets)
        moved[dim] += cut
        boxes += [(offsets, tuple(first)), (tuple(moved), tuple(second))]
    assert tiles(shape, boxes)
    changed = copy.deepcopy(boxes)
    number = data.draw(st.integers(0, len(boxes) - 1))
    offsets, sizes = changed[number]
    match data.draw(st.sampled_from(["drop", "double", "move", "resize"])):
        case "drop":
            del changed[number]
        case "double":
            changed.append(changed[number])
        case "move" if shape:
            changed[number] = (tuple(offset + data.draw(st.integers(-1, 1)) % 4 for offset in offsets), sizes)
        case "resize" if shape:
            changed[number] = (offsets, tuple(data.draw(st.integers(0, 4)) for _ in sizes))
    room = [8] * len(shape)
    count = torch.zeros(room, dtype=torch.int64)
    for offsets, sizes in changed:
        count[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))] += 1
    expected = torch.zeros(room, dtype=torch.int64)
    expected[tuple(slice(0, s) for s in shape)] = 1
    assert tiles(shape, changed) == bool(count.equal(expected)), math.prod(shape)


def test_damage_is_told_apart_from_what_does_not_fit(folder: Path) -> None:
    """A damaged checkpoint is passed over by a resume; one of another format ends it."""
    _write(folder, _body(folder) | {"boxes": [{}]})
    with pytest.raises(DamagedError):
        Checkpoint(folder)
    _write(folder, _body(folder) | {"boxes": [], "format": 7})
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    assert not isinstance(caught.value, DamagedError)
