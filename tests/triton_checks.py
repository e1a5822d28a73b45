# SPDX-License-Identifier: Apache-2.0
"""Every Triton operator against the reference: on a GPU, or on the CPU under Triton's interpreter.

``TRITON_INTERPRET=1 python tests/triton_checks.py [CHECK ...]`` prints ``{check: its failure, or null}``.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import mosaic_kernels as mk
from mosaic_kernels import ops
from mosaic_kernels.errors import KernelError, NonFiniteError
from mosaic_kernels.format import bits_to_mask
from mosaic_kernels.ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = torch.finfo(torch.float32).eps

# Nothing; one weight; off a byte, a word and a tile of 2048 by one; rows that share a tile; rows of several tiles.
SHAPES = [(0, 5), (5, 0), (1, 1), (5, 33), (70, 64), (300, 9), (3, 2049)]
Check = Callable[[str], None]


def in_turn(dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[torch.dtype, tuple[int, int], float]]:
    """Every shape in every dtype, at densities that take turns: the interpreter is slow."""
    for (shape, dtype), density in zip(
        itertools.product(SHAPES, dtypes), itertools.cycle((0.5, 0.0, 0.5, 1.0)), strict=False
    ):
        yield dtype, shape, density


def sparse(rows: int, columns: int, density: float, dtype: torch.dtype) -> Tensor:
    return (torch.randn(rows, columns) * (torch.rand(rows, columns) < density)).to(dtype)


def both(op: str, device: str, *arguments: object) -> tuple[object, object]:
    """What Triton makes of ``arguments`` on the device, brought back, and what the reference makes of them."""
    with ops.use_backend("triton"):
        # counts, where an operator takes any, stay where the border makes them
        there = [a.to(device) if isinstance(a, Tensor) and a.dtype != torch.int64 else a for a in arguments]
        found = getattr(torch.ops.mosaic, op)(*there)
    back = found.cpu() if isinstance(found, Tensor) else tuple(t.cpu() for t in found)
    return back, getattr(reference, op)(*arguments)


def same(found: Tensor, wanted: Tensor) -> bool:
    return found.dtype == wanted.dtype and found.shape == wanted.shape and torch.equal(found, wanted)


def packs(device: str) -> None:
    for dtype, shape, density in in_turn(DTYPES):
        weight = sparse(*shape, density, dtype)
        for keep in (None, torch.rand(shape) < 0.6):
            (values, bits), wanted = both("pack", device, weight, keep)
            assert same(values, wanted[0]), (dtype, shape, density)
            assert same(bits, wanted[1]), (dtype, shape, density)


def packs_what_is_odd(device: str) -> None:
    (values, bits), _ = both("pack", device, torch.tensor([[-0.0, 1.0, float("nan"), 1e-45]]))
    assert bits.tolist() == [[0b1110]]
    assert torch.isnan(values[1])
    weight, keep = sparse(40, 30, 0.5, torch.bfloat16), torch.rand(30, 40) < 0.5
    (values, bits), wanted = both("pack", device, weight.T, keep)  # not contiguous
    assert same(values, wanted[0])
    assert same(bits, wanted[1])


def unpacks(device: str) -> None:
    for dtype, shape, density in in_turn((*DTYPES, torch.int8, torch.float64)):
        values, bits = reference.pack((10 * sparse(*shape, density, torch.float32)).to(dtype))
        found, wanted = both("unpack", device, values, bits, shape[1])
        assert same(found, wanted), (dtype, shape, density)
    weight = sparse(5, 33, 0.5, torch.float32)
    values, bits = reference.pack(weight)
    wide = torch.full((5, 8), 255, dtype=torch.uint8)  # rows padded to whole words, with bits that mean nothing
    wide[:, :5] = bits | torch.tensor([0, 0, 0, 0, 0xFE], dtype=torch.uint8)
    assert torch.equal(bits_to_mask(wide, 33), weight != 0)
    assert same(both("unpack", device, values, wide, 33)[0], weight)


def counts_outliers(device: str) -> None:
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        weight, norms = torch.randn(shape).pow(3).to(dtype), torch.rand(shape[1]) + 0.1
        for alphas in ([], [3.0], [0.0, 1.0, 3.0, 5.0, 10.0]):
            (total, counts), (exact, _) = both("outlier_stats", device, weight, norms, alphas)
            assert total.dtype == torch.float64
            assert counts.dtype == torch.int64
            assert abs(float(total - exact)) <= 1e-12 * float(exact)
            scores = weight.float().abs() * norms
            for alpha, count in zip(alphas, counts.tolist(), strict=True):  # exact but for rounding of the threshold
                threshold = alpha * float(exact) / max(1, scores.numel())
                least, most = (int((scores > threshold * (1 + s)).sum()) for s in (4 * EPS, -4 * EPS))
                assert least <= count <= most, (dtype, shape, alpha)


def sums_squares(device: str) -> None:
    for dtype, shape in itertools.product(DTYPES, ((0, 5), (3, 0), (1, 1), (17, 3), (1030, 129), (2, 3, 33))):
        x = torch.randn(shape).to(dtype)
        found, exact = both("column_square_sums", device, x)
        assert found.dtype == torch.float64
        assert bool((found - exact).abs().le(1e-12 * exact).all()), (dtype, shape)
    assert float(both("column_square_sums", device, torch.tensor([[1e30], [1e-30]]))[0]) > 1e59  # fp32 would overflow


def selects(device: str) -> None:
    few = torch.tensor([0.0, -0.0, 1.0, 1.0, 2.5, -3.0, 1e-40, 3e38, -3e38])  # many ties, both zeros, a subnormal
    for rows, columns in ((0, 5), (5, 0), (1, 1), (300, 9), (3, 2049)):
        for scores in (torch.randn(rows, columns), few[torch.randint(9, (rows, columns))]):
            size = scores.numel()
            for keep in {0, size // 3, max(0, size - 1), size}:
                found, wanted = both("select", device, scores, torch.tensor([keep]), "matrix")
                assert same(found, wanted), (rows, columns, keep)
            counts = torch.randint(0, columns + 1, (rows,))[:5]
            counts[:1], counts[1:2] = 0, columns
            found, wanted = both("select", device, scores[:5], counts, "row")
            assert same(found, wanted), (rows, columns)
    zeros = torch.zeros(50, 100)
    assert int(both("select", device, zeros, torch.tensor([1234]), "matrix")[0].flatten()[:1234].sum()) == 1234


def selects_in_groups(device: str) -> None:
    for n, m in ((2, 4), (4, 8), (1, 4), (0, 3), (3, 3), (1, 1), (5, 32), (5, 40), (2, 2049)):
        rows = 2 if m > 32 else 50
        for scores in (torch.randn(rows, 3 * m), torch.randint(0, 3, (rows, 3 * m)).float(), torch.randn(0, m)):
            found, wanted = both("select", device, scores, torch.tensor([n, m]), "group")
            assert same(found, wanted), (n, m)
        weight, norms = torch.randn(rows, 3 * m).bfloat16(), torch.rand(3 * m)
        found, wanted = both("score_select", device, weight, norms, torch.tensor([n, m]), "group")
        assert same(found, wanted), (n, m)


def scores_and_selects(device: str) -> None:
    for dtype, (rows, columns), share in in_turn(DTYPES):
        weight, norms = torch.randn(rows, columns).to(dtype), torch.rand(columns) + 0.1
        keep = torch.tensor([int(share * weight.numel())])
        assert same(*both("score_select", device, weight, norms, keep, "matrix")), (dtype, rows, columns, share)
        weight, counts = weight[:3], torch.randint(0, columns + 1, (rows,))[:3]
        assert same(*both("score_select", device, weight, norms, counts, "row")), (dtype, rows, columns)
    tied = torch.randint(-2, 3, (50, 100)).half()
    found, wanted = both("score_pack", device, tied, torch.ones(100), torch.tensor([700]), "matrix")
    assert all(same(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
    for keep in (1, 1234, 4999):
        assert same(*both("score_select", device, tied, torch.ones(100), torch.tensor([keep]), "matrix"))


def refuses_what_is_not_finite(device: str) -> None:
    calls = [("matrix", [3]), ("matrix", [0]), ("row", [2, 2]), ("row", [0, 0]), ("group", [1, 2]), ("group", [1, 66])]
    for (scope, keep), bad in itertools.product(calls, (float("nan"), -float("inf"), 3e38)):
        weight = torch.ones(2, 66)
        weight[1, 65] = bad
        for op, arguments in (("select", (weight,)), ("score_select", (weight, torch.full((66,), 2.0)))):
            if op == "select" and bad == 3e38:
                continue  # it overflows when it is multiplied
            try:
                both(op, device, *arguments, torch.tensor(keep), scope)
            except NonFiniteError as error:
                assert "NaN or Inf" in str(error)  # noqa: PT017
            else:
                raise AssertionError((op, scope, keep, bad))


def factor_of(block: int) -> Tensor:
    spread = torch.randn(block, 2 * block, dtype=torch.float64)
    gram = spread @ spread.T / block + torch.eye(block, dtype=torch.float64)
    return torch.linalg.cholesky(torch.linalg.inv(gram), upper=True).float()


def close(found: Tensor, exact: Tensor, terms: int) -> bool:
    return float((found - exact).norm()) <= 2 * (1 + math.sqrt(terms)) * EPS * float(exact.norm())


def sweeps(device: str) -> None:
    for rows, block, share in ((0, 4, 0.5), (1, 1, 0.0), (5, 33, 0.0), (5, 33, 1.0), (9, 128, 0.4), (3, 150, 0.4)):
        weight, keep, factor = torch.randn(rows, block), torch.rand(rows, block) < share, factor_of(block)
        (got, errors, mask), _ = both("obs_block", device, weight, factor, keep, 0, 0)
        exact, exact_errors, _ = reference.obs_block(weight.double(), factor.double(), keep, 0, 0)
        assert same(mask, keep)
        assert not bool(got[~keep].any())
        assert close(got, exact, block), (rows, block, share)
        assert close(errors, exact_errors, block), (rows, block, share)


def sweeps_and_chooses(device: str) -> None:
    for block, n, m in ((16, 2, 4), (16, 4, 8), (15, 1, 3), (12, 0, 4), (132, 2, 4), (20, 5, 20)):
        weight, factor = torch.randn(7, block), factor_of(block)
        found, wanted = both("obs_block", device, weight, factor, torch.ones(7, block).bool(), n, m)
        assert same(found[2], wanted[2]), (block, n, m)
        assert close(found[0], wanted[0], block), (block, n, m)
        assert close(found[1], wanted[1], block), (block, n, m)
    tied = torch.ones(3, 8)
    mask = both("obs_block", device, tied, torch.eye(8), tied.bool(), 2, 4)[0][2]
    assert mask.tolist() == [[True, True, False, False] * 2] * 3
    tied[1, 5] = float("inf")
    try:
        both("obs_block", device, tied, torch.eye(8), tied.bool(), 2, 4)
    except NonFiniteError:
        return
    raise AssertionError("an infinite weight was ranked")


# (rows, in, out): nothing, one feature, off a word by one, several steps, both sides of each limit of the paths
PRODUCTS = [(0, 33, 5), (2, 0, 3), (1, 1, 1), (1, 31, 7), (1, 700, 9), (2, 1025, 9), (3, 257, 4), (5, 64, 33)]
PRODUCTS += [(9, 100, 6), (16, 70, 5), (17, 96, 40), (40, 130, 35), (70, 65, 19), (130, 33, 5)]


def limit(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> float:
    """What sums of such products in fp32 that are rounded to ``dtype`` may be off, in Frobenius norm."""
    scale = float((x.double().abs() @ weight.double().abs().T).norm())
    scale += 0.0 if bias is None else float(bias.double().norm()) * math.sqrt(len(x))
    return 2 * (torch.finfo(dtype).eps + math.sqrt(x.shape[1]) * EPS) * scale


def multiplies(device: str) -> None:
    for dtype, (rows, columns, out) in itertools.product(DTYPES, PRODUCTS):
        for density, bias in ((0.5, torch.randn(out).to(dtype)), (1.0 if rows % 2 else 0.0, None)):
            weight, x = sparse(out, columns, density, dtype), torch.randn(rows, columns).to(dtype)
            packed = mk.pack(weight)
            index = packed.index()
            with ops.use_backend("triton"):
                found = torch.ops.mosaic.sparse_linear(
                    x.to(device), packed.values.to(device), index.words.to(device), index.offsets.to(device),
                    None if bias is None else bias.to(device), columns,
                )  # fmt: skip
            exact = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
            assert found.dtype == dtype
            assert float((found.cpu().double() - exact).norm()) <= limit(x, weight, bias, dtype), (
                dtype,
                rows,
                columns,
                out,
            )


def multiplies_any_layout(device: str) -> None:
    packed = mk.pack(sparse(24, 70, 0.4, torch.bfloat16))
    operands = (packed.values.to(device), packed.index().words.to(device), packed.index().offsets.to(device), None, 70)
    base = torch.randn(3, 140, 5).bfloat16().to(device)
    with ops.use_backend("triton"):
        for x in (base[:, ::2, :].transpose(1, 2), base[0, :70, 0], torch.ones(2, 1, 4, 70).bfloat16().to(device)):
            found = torch.ops.mosaic.sparse_linear(x, *operands)
            assert found.shape == (*x.shape[:-1], 24)
            assert torch.equal(found, torch.ops.mosaic.sparse_linear(x.contiguous(), *operands))


def refuses_what_does_not_fit(device: str) -> None:
    """The layers call kernels without the operator's own checks."""
    packed = mk.pack(torch.ones(4, 40))
    operands = (packed.values.to(device), packed.index().words.to(device), packed.index().offsets.to(device), None, 40)
    wrong = {"39 features": torch.ones(2, 39), "x is torch.float16": torch.ones(2, 40).half()}
    with ops.use_backend("triton"):
        for message, x in wrong.items():
            try:
                torch.ops.mosaic.sparse_linear(x.to(device), *operands)
            except KernelError as error:
                assert message in str(error)  # noqa: PT017
            else:
                raise AssertionError(message)


def multiplies_int8(device: str) -> None:
    kinds = itertools.cycle(itertools.product(DTYPES, (None, 64), (False, True)))
    for (rows, columns, out), (dtype, group, rounded) in zip(2 * PRODUCTS, kinds, strict=False):
        packed = mk.quantize(mk.pack(sparse(out, columns, 0.5, torch.float32)), group)
        weight, index = mk.unpack(packed), packed.index()
        x, bias = torch.randn(rows, columns).to(dtype), torch.randn(out).to(dtype)
        rounded = rounded and columns > 0
        with ops.use_backend("triton"):
            found = torch.ops.mosaic.sparse_linear_int8(
                x.to(device), packed.values.to(device), packed.scales.to(device), index.words.to(device),
                index.offsets.to(device), bias.to(device), columns, rounded,
            ).cpu()  # fmt: skip
        taken = math.prod(t.double() for t in reference.quantize_rows(x)) if rounded else x.double()
        exact = taken @ weight.double().T + bias.double()
        where = (dtype, rows, columns, out, group, rounded)
        assert found.dtype == dtype
        assert float((found.double() - exact).norm()) <= limit(taken, weight, bias, dtype), where


def rounds_rows_as_the_reference(device: str) -> None:
    from mosaic_kernels.ops.triton.linear import _round_rows

    for x in (
        torch.randn(3, 1030),
        torch.arange(-127, 128).float()[None] / 2 + 0.25,
        torch.zeros(2, 5),
        torch.ones(1, 1),
    ):
        for dtype in DTYPES:
            rounded, steps = _round_rows(x.to(dtype).to(device))
            wanted, wanted_steps = reference.quantize_rows(x.to(dtype))
            assert torch.equal(rounded.cpu().float(), wanted), dtype
            assert torch.equal(steps.cpu(), wanted_steps.flatten()), dtype
    for bad in (float("nan"), float("inf"), -float("inf")):
        x, packed = torch.ones(2, 70), mk.quantize(mk.pack(torch.ones(3, 70)))
        x[1, 69] = bad
        index = packed.index()
        operands = (packed.values, packed.scales, index.words, index.offsets)
        with ops.use_backend("triton"):
            found = torch.ops.mosaic.sparse_linear_int8(x.to(device), *(t.to(device) for t in operands), None, 70, True)
        assert bool(torch.isfinite(found[0]).all())
        assert bool(torch.isnan(found[1]).all())


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        packs, packs_what_is_odd, unpacks, counts_outliers, sums_squares, selects, selects_in_groups,
        scores_and_selects, refuses_what_is_not_finite, sweeps, sweeps_and_chooses, multiplies, multiplies_any_layout,
        multiplies_int8, refuses_what_does_not_fit, rounds_rows_as_the_reference,
    )
}  # fmt: skip


def mend_the_interpreter() -> None:
    """Triton 3.6's takes an array of one for a number, which numpy 2.4 refuses; later releases squeeze it, too."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = mended


def main(names: Sequence[str]) -> None:
    mend_the_interpreter()
    torch.set_num_threads(1)
    failures: dict[str, str | None] = {}
    for name in names or CHECKS:
        torch.manual_seed(0)
        try:
            CHECKS[name]("cpu")
        except Exception:  # of any kind: another check may still pass
            failures[name] = traceback.format_exc()
        else:
            failures[name] = None
    json.dump(failures, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
