# SPDX-License-Identifier: Apache-2.0
"""The packed forms of a sparse weight, in plain torch: the specification of every layout.

*Canonical bitmask* (what checkpoints store): ``values`` are the kept weights in row-major order and
``bitmask`` holds one bit per weight, ``uint8 [out_features, ceil(in_features / 8)]``, least
significant bit first. Row offsets are derived, unused bits of a row's last byte are zero.

*Row bitmap* (what the CPU kernels read): the same values; the bits of a row padded to whole 32-bit
words, ``int32 [out_features, ceil(in_features / 32)]``; and ``offsets``, ``int64 [out_features + 1]``,
where each row's values begin. Where ``in_features`` is a multiple of 32 the words are a view of the
canonical bytes, so a loaded layer holds its bits once.

*int8 values* come with ``scales``, ``float32 [out_features, groups]``: one for each row (4 bytes), or one
for every 64 columns of it (half a bit for each weight, kept or not; scales in bf16 would save a quarter
bit and add their own error to every weight). A weight is ``value * scale`` with values of -127 to 127.

``csrc/include/mosaic/format.h`` states the same index arithmetic for C++.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mosaic_kernels.config import Weights
from mosaic_kernels.errors import FormatError

FORMAT_VERSION = 1
VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Dtypes that a layer may hold. float64 comes from ``model.double()``; plain torch multiplies it, no kernel does.
HELD_DTYPES = (*VALUE_DTYPES, torch.float64, torch.int8)
GROUP_COLUMNS = 64  # columns that share a scale where a row has several

_BIT_WEIGHTS = (1, 2, 4, 8, 16, 32, 64, 128)


def bitmask_bytes(in_features: int) -> int:
    """Bytes that one row of the canonical bitmask takes."""
    return -(-in_features // 8)


def bitmask_words(in_features: int) -> int:
    """32-bit words that one row of the row bitmap takes."""
    return -(-in_features // 32)


def scale_groups(in_features: int, group: int | None) -> int:
    """Scales that one row of int8 values has: one, or one for every ``group`` columns."""
    return 1 if group is None else max(1, -(-in_features // group))


def weights_group(weights: Weights) -> int | None:
    """Columns that share a scale in int8 ``weights``; ``None``: the whole row."""
    return GROUP_COLUMNS if weights == "int8-group" else None


def kind_of_values(scales: Tensor | None) -> Weights:
    """What packed values with these ``scales`` are; ``None`` for float values."""
    if scales is None:
        return "float"
    return "int8" if scales.shape[1] == 1 else "int8-group"


def packed_bytes(out_features: int, in_features: int, nnz: int, itemsize: int, weights: Weights = "float") -> int:
    """Bytes of a projection in canonical form, without its bias; ``itemsize`` is that of float values."""
    if weights == "float":
        return nnz * itemsize + out_features * bitmask_bytes(in_features)
    scales = 4 * out_features * scale_groups(in_features, weights_group(weights))
    return nnz + out_features * bitmask_bytes(in_features) + scales


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


def nibble_counts(bits: Tensor) -> Tensor:
    """Set bits of every four neighbouring ones: of a byte's lower four in its lower half, and of its upper four."""
    pairs = bits - ((bits >> 1) & 0x55)  # population count inside each byte: of 2, then 4 bits
    return (pairs & 0x33) + ((pairs >> 2) & 0x33)


def _byte_counts(bits: Tensor) -> Tensor:
    """Set bits of every byte."""
    fours = nibble_counts(bits)
    return (fours + (fours >> 4)) & 0x0F


def _row_counts(bits: Tensor) -> Tensor:
    """``int64 [rows]``: set bits of every row.

    If rows are whole groups of eight bytes, each group is counted at once, in place, and a product adds the counts.
    This is three times as fast as :func:`_byte_counts` and a sum (one thread, Xeon, Sapphire Rapids class, Dec 2026). A
    model counts all its bits when it is loaded.
    """
    if not bits.shape[1] or bits.shape[1] % 8 or not bits.is_contiguous() or bits.storage_offset() % 8:
        return _byte_counts(bits).sum(1, dtype=torch.int64)
    counts, part = bits.view(torch.int64).clone(), torch.empty_like(bits.view(torch.int64))
    counts -= torch.bitwise_right_shift(counts, 1, out=part).bitwise_and_(0x5555555555555555)
    torch.bitwise_right_shift(counts, 2, out=part).bitwise_and_(0x3333333333333333)
    counts.bitwise_and_(0x3333333333333333).add_(part)
    counts.add_(torch.bitwise_right_shift(counts, 4, out=part)).bitwise_and_(0x0F0F0F0F0F0F0F0F)
    return counts.mul_(0x0101010101010101).bitwise_right_shift_(56).sum(1)  # the top byte: 64 at most


def row_offsets(bits: Tensor) -> Tensor:
    """``int64 [rows + 1]``: where each row's values begin, and after the last one the nnz."""
    counts = _row_counts(bits)
    offsets = torch.zeros(bits.shape[0] + 1, dtype=torch.int64, device=bits.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets


def scale_counts(bits: Tensor, groups: int) -> Tensor:
    """``int64 [rows, groups]``: values that share each scale, in the order of the values."""
    counts = _byte_counts(bits)
    if groups == 1:
        return counts.sum(1, keepdim=True, dtype=torch.int64)
    group_bytes = GROUP_COLUMNS // 8
    padded = counts.new_zeros(len(counts), groups * group_bytes)
    padded[:, : counts.shape[1]] = counts
    return padded.view(len(counts), groups, group_bytes).sum(-1, dtype=torch.int64)


def dequantize(values: Tensor, scales: Tensor, bits: Tensor) -> Tensor:
    """The fp32 values that int8 ``values`` stand for; rows of ``bits`` may be padded to whole words."""
    counts = scale_counts(bits, scales.shape[1])
    return values * scales.flatten().repeat_interleave(counts.flatten(), output_size=values.numel())


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
        values: kept weights, row-major, ``[nnz]``, fp32, bf16, fp16 or int8.
        bitmask: ``uint8 [out_features, ceil(in_features / 8)]``, least significant bit first.
        shape: ``(out_features, in_features)``.
        scales: of int8 values, ``float32 [out_features, groups]``, where ``groups`` is 1 or
            ``ceil(in_features / 64)``; of float values ``None``.

    Raises:
        FormatError: a dtype or shape is another.
    """

    values: Tensor
    bitmask: Tensor
    shape: tuple[int, int]
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.shape
        if self.values.dim() != 1 or self.values.dtype not in HELD_DTYPES:
            raise FormatError(
                f"packed values must be 1-D fp32, bf16, fp16 or fp64, or int8, "
                f"got {self.values.dtype} of shape {list(self.values.shape)}"
            )
        expected = [rows, bitmask_bytes(columns)]
        if self.bitmask.dtype != torch.uint8 or list(self.bitmask.shape) != expected:
            raise FormatError(
                f"the bitmask of a {rows}x{columns} weight is uint8 {expected}, "
                f"got {self.bitmask.dtype} {list(self.bitmask.shape)}"
            )
        self._check_scales(rows, columns)

    def _check_scales(self, rows: int, columns: int) -> None:
        if self.values.dtype != torch.int8:
            if self.scales is not None:
                raise FormatError(f"only int8 values have scales, and these are {self.values.dtype}")
            return
        if self.scales is None:
            raise FormatError("int8 values need scales: make both with quantize()")
        shapes = [[rows, scale_groups(columns, group)] for group in (None, GROUP_COLUMNS)]
        if self.scales.dtype != torch.float32 or list(self.scales.shape) not in shapes:
            raise FormatError(
                f"the scales of a {rows}x{columns} weight are float32 {shapes[0]} or {shapes[1]}, "
                f"got {self.scales.dtype} {list(self.scales.shape)}"
            )

    @property
    def weights(self) -> Weights:
        """What the values are; with 64 columns or fewer, a scale for each row is also one for each group."""
        return kind_of_values(self.scales)

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
        """Bytes of the values, the bits and the scales."""
        return packed_bytes(*self.shape, self.nnz, self.values.element_size(), self.weights)

    def index(self) -> RowIndex:
        """The row bitmap's index, built at the first call and kept."""
        cached = self.__dict__.get("_index")
        if cached is None:
            with torch.inference_mode(False):  # an index made inside could not be used where gradients are recorded
                cached = RowIndex.from_bitmask(self.bitmask)
            object.__setattr__(self, "_index", cached)
        return cached

    def validate(self, name: str = "packed weight") -> None:
        """Raise :class:`FormatError` where bits, values, scales and shape contradict each other."""
        if self.__dict__.get("_valid"):
            return
        bits = int(self.index().offsets[-1])
        if bits != self.nnz:
            raise FormatError(f"{name}: the bitmask counts {bits} weights but {self.nnz} values are stored")
        spare = self.bitmask.shape[1] * 8 - self.shape[1]
        if spare and bool((self.bitmask[:, -1] >> (8 - spare)).any()):
            raise FormatError(f"{name}: bits beyond column {self.shape[1]} are set")
        if self.scales is not None:
            if not bool((torch.isfinite(self.scales) & (self.scales >= 0)).all()):
                raise FormatError(f"{name}: scales must be finite and not negative")
            if self.nnz and int(self.values.min()) < -127:
                raise FormatError(f"{name}: int8 values lie in -127 to 127, and -128 is among them")
        object.__setattr__(self, "_valid", True)  # as the index, kept: the tensors are not to change
