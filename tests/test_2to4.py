# SPDX-License-Identifier: Apache-2.0
"""2:4 tiles: the packers against the PTX ISA and against PyTorch's, the kernels against the dense product."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from guarded import Guarded
from simt import CODES, DEVICE, Gpu
from torch import Tensor

from mosaic_kernels import semistructured
from mosaic_kernels.errors import FormatError
from mosaic_kernels.format import PackedWeight, bits_to_mask, mask_to_bits
from mosaic_kernels.semistructured import TwoOfFour, is_two_of_four

DTYPES = (torch.bfloat16, torch.float16)
# none, one weight, a part of a quad, one tile, a tile and a bit, several tiles
SHAPES = [(0, 8), (8, 0), (1, 1), (3, 6), (64, 64), (65, 130), (100, 67), (128, 192)]


def kept(rows: int, columns: int, density: float = 1.0) -> Tensor:
    """A random mask of two columns of every quad, of which a share of ``density`` is left."""
    quads = -(-columns // 4)
    ranks = torch.rand(rows, quads, 4).argsort(-1).argsort(-1)
    return (ranks < 2).reshape(rows, quads * 4)[:, :columns] & (torch.rand(rows, columns) < density)


def packed(rows: int, columns: int, density: float, dtype: torch.dtype) -> PackedWeight:
    mask = kept(rows, columns, density)
    return PackedWeight(torch.randn(int(mask.sum())).to(dtype), mask_to_bits(mask), (rows, columns))


def dense(weight: PackedWeight) -> Tensor:
    full = weight.values.new_zeros(weight.shape)
    full[bits_to_mask(weight.bitmask, weight.shape[1])] = weight.values
    return full


def equal_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("columns", [1, 3, 4, 7, 8, 63])
def test_is_two_of_four(columns: int) -> None:
    for _ in range(20):
        mask = torch.rand(2, columns) < 0.4
        quads = torch.zeros(2, -(-columns // 4) * 4, dtype=torch.bool)
        quads[:, :columns] = mask
        assert is_two_of_four(mask_to_bits(mask)) == bool((quads.view(2, -1, 4).sum(-1) <= 2).all())
    assert is_two_of_four(mask_to_bits(torch.zeros(0, columns, dtype=torch.bool)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.6, 1.0])
def test_tiles_hold_the_canonical_weight_bit_for_bit(
    shape: tuple[int, int], density: float, dtype: torch.dtype
) -> None:
    weight = packed(*shape, density, dtype)
    tiles = TwoOfFour.from_packed(weight)
    assert tiles.nbytes == 4608 * -(-shape[0] // 64) * -(-shape[1] // 64)
    assert equal_bits(tiles.to_dense(), dense(weight))
    back = tiles.to_packed()
    assert torch.equal(back.bitmask, weight.bitmask)
    assert equal_bits(back.values, weight.values)
    assert back.shape == weight.shape
    assert torch.equal(tiles.keep(), bits_to_mask(weight.bitmask, shape[1]))
    assert torch.equal(TwoOfFour.from_dense(dense(weight)).tiles, tiles.tiles)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stored_zeros_stay_stored(dtype: torch.dtype) -> None:
    keep = torch.tensor([[True, True, False, False, False, False, True, False]])
    weight = PackedWeight(torch.tensor([0.0, -0.0, 3.0], dtype=dtype), mask_to_bits(keep), (1, 8))
    back = TwoOfFour.from_packed(weight).to_packed()
    assert torch.equal(back.bitmask, weight.bitmask)
    assert equal_bits(back.values, torch.tensor([0.0, 0.0, 3.0], dtype=dtype))  # the sign alone is gone
    assert TwoOfFour.from_dense(dense(weight)).to_packed().nnz == 1


def test_special_values_are_carried() -> None:
    values = torch.tensor([float("nan"), float("-inf"), 2.0**-133, -(2.0**-133)]).bfloat16()
    keep = torch.tensor([[True, False, False, True, False, True, True, False]])
    back = TwoOfFour.from_packed(PackedWeight(values, mask_to_bits(keep), (1, 8))).to_packed()
    assert equal_bits(back.values, values)


def test_bands_are_packed_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed(300, 100, 0.7, torch.float16)
    whole = TwoOfFour.from_packed(weight)
    monkeypatch.setattr(semistructured, "_BYTES_AT_ONCE", 1)
    assert torch.equal(TwoOfFour.from_packed(weight).tiles, whole.tiles)
    crowded = dense(weight)
    crowded[200, 40:43] = 1.0
    crowded[200, 43] = 0.0
    with pytest.raises(FormatError, match="of columns 40 to 43 of row 200 it keeps 3"):
        TwoOfFour.from_dense(crowded)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(4, 4),
        torch.zeros(4, dtype=torch.float16),
        torch.zeros(4, 4, dtype=torch.int8),
    ],
)
def test_other_weights_are_refused(weight: Tensor) -> None:
    with pytest.raises(FormatError, match="hold 2-D bf16 or fp16 weights"):
        TwoOfFour.from_dense(weight)


def test_other_tiles_are_refused() -> None:
    tiles = TwoOfFour.from_dense(torch.zeros(64, 64).half())
    with pytest.raises(FormatError, match="2:4 tiles of a 64x65 weight are int32"):
        TwoOfFour(tiles.tiles, (64, 65), torch.float16)
    with pytest.raises(FormatError, match="values, not torch"):
        TwoOfFour(tiles.tiles, (64, 64), torch.float32)


def test_strips_hold_the_operands_that_the_ptx_isa_lists() -> None:
    """Its section on the fragments of sparse mma.m16n8k32, lane by lane, from its formulas alone."""
    weight = dense(packed(64, 64, 1.0, torch.bfloat16))
    strips = TwoOfFour.from_dense(weight).tiles.view(4, 288)
    for strip, words in enumerate(strips):
        values, metadata = words[:256].view(torch.bfloat16).view(2, 32, 8), words[256:].tolist()
        found = torch.zeros(16, 64, dtype=torch.bfloat16)
        for step in range(2):  # the sparsity selector of the step is its number
            for lane in range(32):
                group, thread = lane // 4, lane % 4
                for i in range(8):  # a0 .. a7
                    row = group if i < 2 or 4 <= i < 6 else group + 8
                    first_column = thread * 4 + (0 if i < 4 else 16)
                    # threads 2 selector and 2 selector + 1 of the group hold columns 0..15 and 16..31; bits
                    # 0..15 are row `group`'s, 16..31 row `group + 8`'s, 4 of each chunk of 4 columns
                    word = metadata[4 * group + 2 * step + first_column // 16]
                    chunk = word >> (16 * (row // 8) + first_column % 16) & 0xF
                    assert chunk & 3 < chunk >> 2  # ordered
                    column = first_column + (chunk >> 2 if i % 2 else chunk & 3)
                    found[row, 32 * step + column] = values[step, lane, i]
        assert torch.equal(found, weight[16 * strip : 16 * strip + 16])


def test_indices_are_those_pytorch_makes_for_the_same_instruction() -> None:
    """CUTLASS's order: as ours, but lanes 2 and 3 of every four hold 16 rows further down, not 32 columns right."""
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")
    weight = dense(packed(128, 192, 1.0, torch.float16))
    _, metadata = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    theirs = metadata.flatten().view(torch.int32).view(6, 4, 8, 2, 2)  # 32 columns, 32 rows, row % 8, 16 rows, side
    ours = TwoOfFour.from_dense(weight).tiles.view(2, 3, 4, 288)[..., 256:].reshape(2, 3, 2, 2, 8, 2, 2)
    # ours: row tile, column tile, 32 rows, 16 rows, row % 8, step, side
    assert torch.equal(ours.permute(1, 5, 0, 2, 4, 3, 6).reshape(theirs.shape), theirs)


def product(
    gpu: Gpu, x: Tensor, weights: Sequence[TwoOfFour], biases: Sequence[Tensor | None]
) -> tuple[list[Tensor], Tensor]:
    """The results, from memory that ends where a tensor does, and the workspace after the launch."""
    tiles = [Guarded(weight.tiles) for weight in weights]
    held = [None if bias is None else Guarded(bias) for bias in biases]
    outs = [Guarded(x.new_full((len(x), weight.shape[0]), float("nan"))) for weight in weights]
    rows, work = Guarded(x), torch.zeros(gpu.module.linear_workspace_bytes(DEVICE), dtype=torch.uint8)
    parts = [
        (t.address, 0, 0 if b is None else b.address, out.address, weight.shape[0], 0)
        for t, b, out, weight in zip(tiles, held, outs, weights, strict=True)
    ]
    gpu.module.linear_2to4(
        parts, rows.address, len(x), x.shape[1], CODES[x.dtype], work.data_ptr(), work.numel(), DEVICE, 0
    )
    return [out.read() for out in outs], work


# (rows of x, in_features, out_features of each weight, density): every number of blocks of 8 rows, a second launch;
# a row of steps that one block or several share; a last step of one tile; part of a tile and of a quad of zeros
PRODUCTS = [
    (1, 8, [1], 1.0),
    (1, 640, [64], 1.0),
    (3, 72, [130], 0.6),
    (8, 328, [64, 200, 1], 1.0),
    (9, 136, [72], 1.0),
    (16, 64, [256], 0.5),
    (17, 192, [65, 128], 1.0),
    (40, 264, [70], 1.0),
    (64, 200, [64], 0.8),
    (67, 72, [33], 1.0),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns", "outs", "density"), PRODUCTS)
def test_the_kernel_multiplies_as_the_dense_weight_does(
    gpu: Gpu, rows: int, columns: int, outs: list[int], density: float, dtype: torch.dtype
) -> None:
    weights = [packed(out, columns, density, dtype) for out in outs]
    biases = [None if i == 1 else torch.randn(out).to(dtype) for i, out in enumerate(outs)]
    x = torch.randn(rows, columns).to(dtype)
    gpu.limits(multiprocessors=1 + rows % 5, shared_bytes=1024 * (100 if rows % 2 else 228))
    gpu.seed(rows)
    found, work = product(gpu, x, [TwoOfFour.from_packed(weight) for weight in weights], biases)
    assert not work[: 4 * len(outs)].any()  # its counters are zero again
    for weight, bias, result in zip(weights, biases, found, strict=True):
        full, added = dense(weight).double(), 0.0 if bias is None else bias.double()
        exact = x.double() @ full.T + added
        scale = float((x.double().abs() @ full.abs().T).norm() + torch.as_tensor(added).norm() * rows**0.5)
        limit = (torch.finfo(dtype).eps + columns**0.5 * torch.finfo(torch.float32).eps) * scale
        assert float((result.double() - exact).norm()) <= limit


def test_the_order_of_threads_changes_nothing(gpu: Gpu) -> None:
    weight = TwoOfFour.from_packed(packed(130, 520, 0.9, torch.bfloat16))
    x = torch.randn(5, 520).bfloat16()
    gpu.limits()
    results = []
    for seed in range(4):
        gpu.seed(seed)
        results.append(product(gpu, x, [weight], [None])[0][0])
    assert all(equal_bits(result, results[0]) for result in results)


def test_what_is_not_kept_is_not_multiplied(gpu: Gpu) -> None:
    """Where every quad keeps two weights, infinities at the other columns do not reach the sums."""
    weight = torch.zeros(64, 64).half()
    weight.view(64, 16, 4)[..., 1::2] = 1.0
    x = torch.ones(1, 64).half()
    x.view(1, 16, 4)[..., 0::2] = float("inf")
    found, _ = product(gpu, x, [TwoOfFour.from_dense(weight)], [None])
    assert torch.equal(found[0], torch.full((1, 64), 32.0).half())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_expansion(gpu: Gpu, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = packed(*shape, 0.8, dtype)
    tiles = Guarded(TwoOfFour.from_packed(weight).tiles)
    out = Guarded(torch.full(shape, float("nan"), dtype=dtype))
    gpu.module.expand_2to4(tiles.address, out.address, *shape, DEVICE, 0)
    assert torch.equal(out.read(), dense(weight))  # padding is -0.0 here, which equals zero
