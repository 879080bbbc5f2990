"""Writes the boxes of global tensors that a rank holds to one file."""

import zlib
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import save_file

from triplane.checkpoint.manifest import Box
from triplane.data.files import sync
from triplane.parallel.placement import Fragment


def write_tensors(path: Path, fragments: Sequence[Fragment]) -> list[Box]:
    """Puts the fragments on the disk; returns what is where. Without fragments there is no file."""
    if not fragments:
        return []
    arrays, boxes = {}, []
    for fragment in fragments:
        array = fragment.data.cpu().numpy()
        checksum = zlib.crc32(array.data)
        box = Box(fragment.key, tuple(fragment.shape), fragment.offsets, array.shape, path.name, checksum)
        arrays[box.entry] = array
        boxes.append(box)
    try:
        save_file(arrays, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # else the owner's alone
    sync(path)
    return boxes
