"""Show with torch itself that torch reads our .pt files, and that we read torch's correctly.

    pip install torch && python tests/proofs/torch_files.py --directory /some/disk

1. Files that `write_archive` makes, of every dtype and one of more than 4 GB, open with
   `torch.load(weights_only=True)`, memory-mapped or not, with the same names, shapes and values.
2. Checkpoints that `sat.save` makes of the goldens open in the same way, for 1, 2 and 4 ranks, in float32 and float16.
3. We read back what torch.save writes: every dtype, tensors that share a storage, transposed and expanded views.

Needs 5 GB of disk; takes about a minute.
"""

from __future__ import annotations

import argparse
import collections
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]  (the project does not need it elsewhere)

from glm_jax.interop import sat
from glm_jax.interop.torch_archive import DTYPES, TensorStream, read_archive, write_archive
from glm_jax.model import GLMConfig

GOLDENS = Path(__file__).parent.parent / "goldens"


def same(ours: np.ndarray, theirs: Any) -> bool:
    """Compare an array and a torch tensor: dtype, shape and bits."""
    if DTYPES[str(theirs.dtype).removeprefix("torch.")][1] != ours.dtype or tuple(theirs.shape) != ours.shape:
        return False
    flat = theirs.contiguous().reshape(-1)
    return (flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0)).tobytes() == ours.tobytes()


def prove_written_dtypes(directory: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {
        f"{dtype.name} {shape}": np.asarray(random.standard_normal(shape) * 50).astype(dtype)
        for _, dtype in DTYPES.values()
        for shape in [(), (0,), (5,), (7, 3), (2, 3, 4)]
    }
    streams = {name: TensorStream(array.shape, array.dtype, [array]) for name, array in arrays.items()}
    write_archive(directory / "dtypes.pt", "module", streams)
    for mapped in (False, True):
        loaded = torch.load(directory / "dtypes.pt", weights_only=True, mmap=mapped)["module"]
        assert list(loaded) == list(arrays)
        assert all(same(array, loaded[name]) for name, array in arrays.items())
    print(f"torch {torch.__version__} reads {len(arrays)} tensors of {len(DTYPES)} dtypes as they were written")


def prove_large(directory: Path) -> None:
    rows, width = 4600, 2**18
    chunks = (np.full((1, width), row, np.float32) for row in range(rows))
    small = TensorStream((3,), np.dtype(np.float32), [np.arange(3, dtype=np.float32)])
    path = directory / "large.pt"
    write_archive(path, "module", {"a": TensorStream((rows, width), np.dtype(np.float32), chunks), "b": small})
    assert path.stat().st_size > 2**32
    loaded = torch.load(path, weights_only=True, mmap=True)["module"]
    assert bool((loaded["a"][:, :: width // 7] == torch.arange(rows)[:, None]).all())
    assert loaded["b"].tolist() == [0, 1, 2]
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    print(f"and a file of {path.stat().st_size / 1e9:.2f} GB, whose checksums are right")
    path.unlink()


def prove_checkpoints(directory: Path) -> None:
    cfg = GLMConfig(num_layers=3, hidden_size=64, num_heads=4, ffn_size=176, vocab_size=256)
    params, count = sat.load(GOLDENS / "glm130b/ckpt_tp1", cfg), 0
    for dtype in ("float32", "float16"):
        for ranks in (1, 2, 4):
            root = directory / f"{dtype}-{ranks}"
            sat.save(root, cfg, params, tensor_parallel=ranks, iteration=1000, dtype=dtype)
            for rank in range(ranks):
                loaded = torch.load(root / f"1000/mp_rank_{rank:02d}_model_states.pt", weights_only=True)
                assert list(loaded) == ["module"]
                golden = GOLDENS / f"glm130b/ckpt_tp{ranks}/1000/mp_rank_{rank:02d}_model_states.pt"
                if golden.exists():
                    expected = torch.load(golden, weights_only=True)["module"]
                    expected = {name: leaf for name, leaf in expected.items() if "inv_freq" not in name}
                    assert loaded["module"].keys() == expected.keys()
                    for name, leaf in loaded["module"].items():
                        assert torch.equal(leaf.float(), expected[name].float()), name
                    count += len(expected)
    print(f"torch finds the goldens' own names, shapes and values in what sat.save wrote ({count} tensors)")


def prove_read(directory: Path) -> None:
    base = torch.arange(-60, 60, dtype=torch.float32)
    tensors = {name: (base / 7).to(getattr(torch, name)).reshape(2, 3, 20) for name in DTYPES}
    tensors |= {
        "rows": base.reshape(12, 10)[5:9],
        "columns": base.reshape(12, 10)[:, 2:7],
        "turned": base.reshape(12, 10).T,
        "expanded": base[:4].expand(3, 4),
        "scalar": base[17],
        "empty": base[:0],
        "stepped": base[::7],
    }
    state = torch.nn.Linear(3, 4).state_dict()  # an OrderedDict with attributes
    saved = {"module": tensors, "state": state, "order": collections.OrderedDict(a=1), "dtype": torch.bfloat16}
    torch.save(saved, directory / "saved.pt")
    read = read_archive(directory / "saved.pt")
    assert all(same(read["module"][name].read(), tensor) for name, tensor in tensors.items())
    assert all(same(read["state"][name].read(), tensor) for name, tensor in state.items())
    print(f"what torch.save wrote reads back equal ({len(tensors) + len(state)} tensors)")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--directory", type=Path, required=True, help="a folder on a disk with 5 GB free")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        for prove in (prove_written_dtypes, prove_large, prove_checkpoints, prove_read):
            prove(Path(directory))


if __name__ == "__main__":
    main()
