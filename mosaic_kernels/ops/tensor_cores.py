# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels that multiply tiles: tile bitmap (:mod:`mosaic_kernels.tiles`) and 2:4."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic_kernels.errors import KernelError
from mosaic_kernels.ops.cuda import DTYPES, where
from mosaic_kernels.semistructured import TwoOfFour
from mosaic_kernels.tiles import GROUP, HEAD_UNITS, TILE_WORDS, UNIT, TileBitmap, offsets_of, step_counts, tile_counts

with contextlib.suppress(ImportError):  # ops.cuda.why_not says so
    import mosaic_kernels._C_cuda as _C_cuda

__all__ = ["KERNELS", "Group", "Rows", "rows_of", "tile_linear"]


class Rows(NamedTuple):
    """Up to how many rows of x each kernel is meant for; from there on the weight is expanded for cuBLAS."""

    decode: int  # linear_decode, linear_2to4: read the weight once for every 64 rows
    prefill: int  # linear_prefill, where there is one: on compute capability 9.0, if built for it


# By torch's name of the device, where both were measured (benchmarks/gpu). None was yet: the default follows the
# bytes, of which an expansion moves 4.5 times as many as a product of the packed weight.
MEASURED: dict[str, Rows] = {}
DEFAULT = Rows(decode=64, prefill=1024)

_rows: dict[int, Rows] = {}
_workspaces: dict[tuple[int, int], Tensor] = {}  # by device and stream
COUNTERS = 1 << 20  # of a device, for launches in graphs: about 100 graphs of a model with 7B parameters
_counters: dict[int, Counters] = {}


def rows_of(device: int) -> Rows:
    """The row counts of CUDA device number ``device``."""
    found = _rows.get(device)
    if found is None:
        found = MEASURED.get(torch.cuda.get_device_name(device), DEFAULT)
        if not _C_cuda.has_linear_prefill(device):
            found = found._replace(prefill=0)
        _rows[device] = found
    return found


class Counters:
    """Zeros of one device, of which each launch that a graph captures has its own for as long as the process runs.

    Nothing tells when a graph is gone, or which graphs run at the same time.
    """

    def __init__(self, slab: Tensor) -> None:
        self.slab, self.taken = slab, 0
        self._lock = threading.Lock()

    def take(self, count: int) -> Tensor:
        """``count`` zeros. Once all are taken, they are made in the graph, which sets them to zero in each replay."""
        with self._lock:
            first, self.taken = self.taken, min(self.taken + count, self.slab.numel() + 1)
        if first + count > self.slab.numel():
            return torch.zeros(count, dtype=torch.int32, device=self.slab.device)
        return self.slab[first : first + count]


def _workspace(device: int, stream: int) -> Tensor:
    """What blocks of one launch hand each other; one for each stream, as torch keeps for cuBLAS.

    Made at a stream's first launch and kept: its counters are zero before and after every launch.
    """
    found = _workspaces.get((device, stream))
    if found is None:
        found = _workspaces[device, stream] = _new_workspace(device)
    return found


def _is_captured() -> bool:
    """Whether a graph captures what is launched now."""
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()


def _captured_workspace(device: int, parts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Memory and counters of a launch that a graph captures.

    Graphs may be replayed at the same time, on whatever streams. So the memory is of the graph's own pool, where
    nothing else of that graph uses it while the launch runs; and no other launch has the counters.
    """
    size = _C_cuda.linear_workspace_bytes(device)
    work = torch.empty(size, dtype=torch.uint8, device=_counters[device].slab.device)
    groups = sum(step_counts(part[4], 0)[0] for part in parts)
    return work, _counters[device].take(groups)


def _new_workspace(device: int) -> Tensor:
    """A stream's workspace: zeros."""
    return _zeros(device, _C_cuda.linear_workspace_bytes(device), torch.uint8)


def _zeros(device: int, size: int, dtype: torch.dtype) -> Tensor:
    """Zeros, ready on the current stream, in memory of no graph's pool.

    What runs before a capture (``torch.compile(mode="reduce-overhead")``) allocates from the pool of its graphs, which
    hand out all of it anew in the next run, whoever holds a tensor there. Pools are those of a thread.
    """
    stream = torch.cuda.current_stream(device)

    def make() -> Tensor:
        with torch.cuda.stream(stream):
            return torch.zeros(size, dtype=dtype, device=torch.device("cuda", device))

    with ThreadPoolExecutor(1) as elsewhere:
        return elsewhere.submit(make).result()


def make_counters(device: int) -> None:
    """The counters of launches in graphs, which no capture can make."""
    if device not in _counters:
        _counters[device] = Counters(_zeros(device, COUNTERS, torch.int32))


def _launch(kernel: Callable[..., None], x: Tensor, parts: Sequence[tuple[int, ...]]) -> None:
    device, stream = where(x)
    if _is_captured():
        work, counters = _captured_workspace(device, parts)
        own = counters.data_ptr()
    else:
        work, own = _workspace(device, stream), 0
    kernel(
        parts, x.data_ptr(), x.shape[:-1].numel(), x.shape[-1], DTYPES[x.dtype],
        work.data_ptr(), work.numel(), device, stream, own,
    )  # fmt: skip


class Group:
    """Products of one ``x`` with several weights of one form, ready for one launch.

    Args:
        parts: at most four weights, all tile bitmaps or all 2:4, with the same ``in_features`` and dtype; and the
            bias of each.
    """

    def __init__(self, parts: Sequence[tuple[TileBitmap | TwoOfFour, Tensor | None]]) -> None:
        first = parts[0][0]
        self.in_features, self.device = first.shape[1], first.tiles.device
        self.dtype = first.tiles.dtype if isinstance(first, TileBitmap) else first.dtype
        self.is_bitmap = isinstance(first, TileBitmap)
        self._held: list[Any] = []  # what the addresses below belong to
        self._parts = []
        for part, bias in parts:
            bias = None if bias is None else bias.detach().contiguous()
            self._held.append((part, bias))
            head = (part.tiles.data_ptr(), 0)
            largest = 0
            if isinstance(part, TileBitmap):
                head = (part.tiles.data_ptr(), part.offsets.data_ptr())
                largest = part.largest_step
            if bias is not None and (bias.dtype is not self.dtype or bias.device != self.device):
                raise KernelError(f"bias is {bias.dtype} on {bias.device} but the values {self.dtype} on {self.device}")
            self._parts.append((head, 0 if bias is None else bias.data_ptr(), part.shape[0], largest))

    def __call__(self, x: Tensor) -> list[Tensor]:
        """``x [..., in_features]``; the results in the order of the parts."""
        if x.shape[-1] != self.in_features:
            raise KernelError(f"x has {x.shape[-1]} features but this projection takes {self.in_features}")
        if x.dtype is not self.dtype:
            raise KernelError(f"x is {x.dtype} but the packed values are {self.dtype}")
        if x.device != self.device:
            raise KernelError(f"x is on {x.device} but the packed values are on {self.device}")
        x = _aligned(x)
        results = [x.new_empty((*x.shape[:-1], out_features)) for _, _, out_features, _ in self._parts]
        parts = [
            (*head, bias, out.data_ptr(), out_features, largest)
            for (head, bias, out_features, largest), out in zip(self._parts, results, strict=True)
        ]
        kernel = _C_cuda.linear_2to4
        if self.is_bitmap:
            few = x.shape[:-1].numel() <= rows_of(x.get_device()).decode
            kernel = _C_cuda.linear_decode if few else _C_cuda.linear_prefill
        _launch(kernel, x, parts)
        return results


def _aligned(x: Tensor) -> Tensor:
    """``x`` with rows that begin at multiples of 16 bytes, which the copies need; zeros behind the last feature."""
    spare = -x.shape[-1] % UNIT
    if spare:
        return F.pad(x, (0, spare)).contiguous()  # it keeps an input channels_last that looks like one
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def tile_linear(
    x: Tensor,
    tiles: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    largest_step: int,
) -> Tensor:
    """The operator of the same name; see :mod:`mosaic_kernels.ops.reference`."""
    if x.shape[:-1].numel() > max(rows_of(tiles.get_device())):
        return F.linear(x, _expand_tiles(tiles, offsets, out_features, in_features), bias)
    part = TileBitmap(tiles, offsets, (out_features, in_features), 0, largest_step)
    return Group([(part, bias)])(x)[0]


def two_of_four_linear(x: Tensor, tiles: Tensor, bias: Tensor | None, out_features: int, in_features: int) -> Tensor:
    """The operator of the same name."""
    if x.shape[:-1].numel() > rows_of(tiles.get_device()).decode:
        return F.linear(x, _expand_two_of_four(tiles, out_features, in_features, x.dtype), bias)
    return Group([(TwoOfFour(tiles, (out_features, in_features), x.dtype), bias)])(x)[0]


def _pack_tiles(weight: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    weight, keep = weight.contiguous(), None if keep is None else keep.contiguous()
    rows, columns = weight.shape
    bits = weight.new_empty((*step_counts(rows, columns), GROUP, TILE_WORDS), dtype=torch.int32)
    source = weight.data_ptr(), 0 if keep is None else keep.data_ptr(), bits.data_ptr()
    shape_and_where = (rows, columns, DTYPES[weight.dtype], *where(weight))
    _C_cuda.pack_tile_bits(*source, 0, 0, *shape_and_where)
    offsets = offsets_of(bits[..., 2].sum(-1).view(-1) + HEAD_UNITS)
    tiles = weight.new_empty(UNIT * (int(offsets[-1]) & 0xFFFFFFFF))
    _C_cuda.pack_tile_values(*source, offsets.data_ptr(), tiles.data_ptr(), *shape_and_where)
    _finish(weight)
    return tiles, offsets


def _pack_two_of_four(weight: Tensor, keep: Tensor | None = None) -> Tensor:
    tiles = TwoOfFour.from_dense(weight, keep).tiles
    _finish(weight)
    return tiles


def _finish(tensor: Tensor) -> None:
    """Wait for what writes weights: a product may begin to read them before the kernel ahead of it has ended.

    See csrc/cuda/stream.cuh; no product waits for itself. What packs runs before any graph can hold a product.
    """
    make_counters(tensor.get_device())
    torch.cuda.current_stream(tensor.device).synchronize()


def _expand_tiles(tiles: Tensor, offsets: Tensor, rows: int, columns: int) -> Tensor:
    weight = tiles.new_empty(rows, columns)
    _C_cuda.expand_tiles(
        tiles.data_ptr(), offsets.data_ptr(), weight.data_ptr(),
        rows, columns, 0, tile_counts(rows, columns)[0], *where(tiles),
    )  # fmt: skip
    return weight


def _expand_two_of_four(tiles: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    weight = tiles.new_empty((rows, columns), dtype=dtype)
    _C_cuda.expand_2to4(tiles.data_ptr(), weight.data_ptr(), rows, columns, *where(tiles))
    return weight


KERNELS: dict[str, Callable[..., Any]] = {
    "tile_linear": tile_linear,
    "pack_tiles": _pack_tiles,
    "expand_tiles": _expand_tiles,
    "two_of_four_linear": two_of_four_linear,
    "pack_two_of_four": _pack_two_of_four,
    "expand_two_of_four": _expand_two_of_four,
}
