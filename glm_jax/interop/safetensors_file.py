"""The safetensors container: 8 bytes with the length of a header, the header in JSON, then the tensors' bytes.

The library `safetensors` checks what is read. Tensors stay on disk until a region of one is read, as in torch_archive.
The library writes from whole tensors only, so files are written here, in chunks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from glm_jax.config.fields import shown
from glm_jax.errors import UserError
from glm_jax.interop.torch_archive import StoredTensor, TensorStream
from glm_jax.storage.files import open_atomic, open_regular
from glm_jax.types import Json

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
ALIGNMENT = 8  # of the first tensor's first byte, as the library aligns it


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Open the tensors of a file, by name.

    Raises:
        UserError: no such file, one that the library refuses (a header of another length, offsets that overlap or leave
            the file), a tensor that is not of floats, or the library is not installed.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError(f"reading {path} needs the package safetensors: pip install -e '.[huggingface]'") from error
    tensors = {}
    try:
        with open_regular(path) as stream:
            offset = 8 + int.from_bytes(stream.read(8), "little")
        with safe_open(path, "numpy") as file:
            for name in file.offset_keys():  # they follow one another without gaps: the library has checked that
                view = file.get_slice(name)
                shape, dtype = tuple(view.get_shape()), DTYPES.get(view.get_dtype())
                if dtype is None:
                    listed = ", ".join(DTYPES)
                    raise UserError(f"{path}: {shown(name)} is {view.get_dtype()}, it must be of floats ({listed})")
                tensors[name] = StoredTensor(path, dtype, shape, _strides(shape, dtype.itemsize), offset)
                offset += math.prod(shape) * dtype.itemsize
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or no safetensors file: {str(error).splitlines()[0]}") from error
    return tensors


def _strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the steps in bytes of an array in row-major order."""
    return tuple(math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape)))


def write_safetensors(path: Path, tensors: Mapping[str, TensorStream]) -> None:
    """Write tensors by name, one chunk in memory at a time; the file appears whole or not at all.

    The format is that of https://github.com/huggingface/safetensors; "pt" in it is what transformers asks for.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: Json = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": codes[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)
    with open_atomic(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors.items():
            written = sum(map(file.write, tensor.buffers()))
            assert written == tensor.nbytes, (name, written, tensor.nbytes)
