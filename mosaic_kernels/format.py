# SPDX-License-Identifier: Apache-2.0
"""The packed forms of a sparse weight, in plain torch: the specification of every layout.

*Canonical bitmask* (what checkpoints store): ``values`` are the kept weights in row-major order and
``bitmask`` holds one bit per weight, ``uint8 [out_features, ceil(in_features / 8)]``, least
significant bit first. Row offsets are derived, unused bits of a row's last byte are zero.

*Row bitmap* (what the CPU kernels read): the same values; the bits of a row padded to whole 32-bit
words, ``int32 [out_features, ceil(in_features / 32)]``; and ``offsets``, ``int64 [out_features + 1]``,
where each row's values begin. Where ``in_features`` is a multiple of 32 the words are a view of the
canonical bytes, so a loaded layer holds its bits once.

``csrc/include/mosaic/format.h`` states the same index arithmetic for C++.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mosaic_kernels.errors import FormatError

FORMAT_VERSION = 1
VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_BIT_WEIGHTS = (1, 2, 4, 8, 16, 32, 64, 128)


def bitmask_bytes(in_features: int) -> int:
    """Bytes that one row of the canonical bitmask takes."""
    return -(-in_features // 8)


def bitmask_words(in_features: int) -> int:
    """32-bit words that one row of the row bitmap takes."""
    return -(-in_features // 32)


def packed_bytes(out_features: int, in_features: int, nnz: int, itemsize: int) -> int:
    """Bytes of a projection in canonical form, without its bias."""
    return nnz * itemsize + out_features * bitmask_bytes(in_features)


def mask_to_bits(mask: Tensor) -> Tensor:
    """Pack a boolean mask ``[rows, columns]`` into ``uint8 [rows, ceil(columns / 8)]``."""
    rows, columns = mask.shape
    padded = torch.zeros(rows, bitmask_bytes(columns) * 8, dtype=torch.uint8, device=mask.device)
    padded[:, :columns] = mask
    weights = torch.tensor(_BIT_WEIGHTS, dtype=torch.uint8, device=mask.device)
    return (padded.view(rows, bitmask_bytes(columns), 8) * weights).sum(-1, dtype=torch.uint8)


def bits_to_mask(bits: Tensor, columns: int) -> Tensor:
    """Inverse of :func:`mask_to_bits`; rows of ``bits`` may be longer than ``columns`` needs."""
    weights = torch.tensor(_BIT_WEIGHTS, dtype=torch.uint8, device=bits.device)
    flags = (bits.unsqueeze(-1) & weights) != 0
    return flags.flatten(1)[:, :columns]


def words_from_bits(bits: Tensor) -> Tensor:
    """The row bitmap's ``int32`` words of canonical ``bits``: a view where a row fills whole words."""
    rows, row_bytes = bits.shape
    if row_bytes > 0 and row_bytes % 4 == 0 and bits.is_contiguous() and bits.storage_offset() % 4 == 0:
        return bits.view(torch.int32)
    words = bits.new_zeros(rows, -(-row_bytes // 4), dtype=torch.int32)
    words.view(torch.uint8)[:, :row_bytes] = bits
    return words


def row_offsets(bits: Tensor) -> Tensor:
    """``int64 [rows + 1]``: where each row's values begin, and after the last one the nnz."""
    pairs = bits - ((bits >> 1) & 0x55)  # population count inside each byte: of 2, 4, then 8 bits
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    counts = ((fours + (fours >> 4)) & 0x0F).sum(1, dtype=torch.int64)
    offsets = torch.zeros(bits.shape[0] + 1, dtype=torch.int64, device=bits.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets


@dataclass(frozen=True)
class RowIndex:
    """The part of the row bitmap that is derived from the bits alone.

    Attributes:
        words: ``int32 [out_features, ceil(in_features / 32)]``.
        offsets: ``int64 [out_features + 1]``.
    """

    words: Tensor
    offsets: Tensor

    @classmethod
    def from_bitmask(cls, bitmask: Tensor) -> RowIndex:
        return cls(words_from_bits(bitmask), row_offsets(bitmask))

    @property
    def nnz(self) -> int:
        return int(self.offsets[-1])


@dataclass(frozen=True)
class PackedWeight:
    """A sparse ``[out_features, in_features]`` weight in canonical bitmask form.

    Attributes:
        values: kept weights, row-major, ``[nnz]``, fp32, bf16 or fp16.
        bitmask: ``uint8 [out_features, ceil(in_features / 8)]``, least significant bit first.
        shape: ``(out_features, in_features)``.
    """

    values: Tensor
    bitmask: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        rows, columns = self.shape
        if self.values.dim() != 1 or self.values.dtype not in VALUE_DTYPES:
            raise FormatError(
                f"packed values must be 1-D fp32, bf16 or fp16, "
                f"got {self.values.dtype} of shape {list(self.values.shape)}"
            )
        expected = [rows, bitmask_bytes(columns)]
        if self.bitmask.dtype != torch.uint8 or list(self.bitmask.shape) != expected:
            raise FormatError(
                f"the bitmask of a {rows}x{columns} weight is uint8 {expected}, "
                f"got {self.bitmask.dtype} {list(self.bitmask.shape)}"
            )

    @property
    def nnz(self) -> int:
        """Number of kept weights."""
        return self.values.numel()

    @property
    def density(self) -> float:
        """Share of kept weights, 0 to 1."""
        return self.nnz / max(1, self.shape[0] * self.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the values and the bits."""
        return packed_bytes(*self.shape, self.nnz, self.values.element_size())

    def index(self) -> RowIndex:
        """The row bitmap's index, built at the first call and kept."""
        cached = self.__dict__.get("_index")
        if cached is None:
            cached = RowIndex.from_bitmask(self.bitmask)
            object.__setattr__(self, "_index", cached)
        return cached

    def validate(self, name: str = "packed weight") -> None:
        """Raise :class:`FormatError` where bits, values and shape contradict each other."""
        bits = int(self.index().offsets[-1])
        if bits != self.nnz:
            raise FormatError(f"{name}: the bitmask counts {bits} weights but {self.nnz} values are stored")
        spare = self.bitmask.shape[1] * 8 - self.shape[1]
        if spare and bool((self.bitmask[:, -1] >> (8 - spare)).any()):
            raise FormatError(f"{name}: bits beyond column {self.shape[1]} are set")
