# SPDX-License-Identifier: Apache-2.0
"""What Python hands to the CUDA kernels, tried on an emulated GPU: the results are those of the reference."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import simt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaic_kernels import arrangement, siblings
from mosaic_kernels.format import RowIndex
from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.ops import cuda, reference, tensor_cores
from mosaic_kernels.semistructured import TwoOfFour
from mosaic_kernels.tiles import TileBitmap


@pytest.fixture(autouse=True)
def emulated(gpu: simt.Gpu, monkeypatch: pytest.MonkeyPatch) -> simt.Gpu:
    """The backend's module is the emulator's, whose device memory is ordinary memory."""
    gpu.limits(multiprocessors=3)
    work = torch.zeros(gpu.module.linear_workspace_bytes(simt.DEVICE), dtype=torch.uint8)
    for module in (cuda, tensor_cores):
        monkeypatch.setattr(module, "_C_cuda", gpu.module, raising=False)
        monkeypatch.setattr(module, "where", lambda tensor: (simt.DEVICE, 0))
    monkeypatch.setattr(tensor_cores, "_workspace", lambda device, stream: work)
    monkeypatch.setattr(tensor_cores, "_finish", lambda tensor: None)
    use_rows(monkeypatch, decode=64, prefill=1024 if gpu.arch == 90 else 0)
    return gpu


def use_rows(monkeypatch: pytest.MonkeyPatch, **rows: int) -> None:
    monkeypatch.setattr(tensor_cores, "rows_of", lambda device: tensor_cores.Rows(**rows))


def sparse(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    torch.manual_seed(rows)
    return (torch.randn(rows, columns) * (torch.rand(rows, columns) < 0.5)).to(dtype)


def two_of_four(rows: int, columns: int) -> Tensor:
    weight = torch.randn(rows, columns).bfloat16()
    weight[:, 1::4] = weight[:, 2::4] = 0
    return weight


def call(op: str, *arguments: Any) -> Any:
    return {**cuda.KERNELS, **tensor_cores.KERNELS}[op](*arguments)


def assert_close(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.shape == exact.shape
    assert torch.allclose(found.double(), exact, rtol=2 * torch.finfo(x.dtype).eps, atol=2e-3)


def assert_same_bits(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """Some of the bits among the tiles' floats are NaN."""
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.cpu().view(torch.int16), theirs.cpu().view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (70, 72), (130, 20), (33, 129)], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 64, 65])
def test_tile_linear(shape: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    weight, bias = sparse(*shape, dtype), torch.randn(shape[0]).to(dtype)
    tiles, offsets = call("pack_tiles", weight)
    assert_same_bits((tiles, offsets), reference.pack_tiles(weight))
    x = torch.randn(rows, shape[1]).to(dtype)
    for given in (bias, None):
        found = call("tile_linear", x, tiles, offsets, given, *shape, int(offsets.diff().max()))
        assert_close(found, x, weight, given)
    assert torch.equal(call("expand_tiles", tiles, offsets, *shape), weight)


def test_what_is_kept_is_stored() -> None:
    weight, keep = sparse(70, 72), torch.rand(70, 72) < 0.4
    assert_same_bits(call("pack_tiles", weight, keep), reference.pack_tiles(weight, keep))


@pytest.mark.parametrize("rows", [1, 9, 65])
def test_two_of_four_linear(rows: int) -> None:
    weight, x = two_of_four(70, 72), torch.randn(rows, 72).bfloat16()
    tiles = call("pack_two_of_four", weight)
    assert_close(call("two_of_four_linear", x, tiles, None, 70, 72), x, weight, None)
    assert torch.equal(call("expand_two_of_four", tiles, 70, 72, torch.bfloat16), weight)


@pytest.mark.parametrize("form", [TileBitmap, TwoOfFour])
def test_several_weights_in_one_launch(form: Any) -> None:
    weights = [two_of_four(out, 136) for out in (70, 200, 8)]
    group = tensor_cores.Group([(form.from_dense(each), each[:, 0].contiguous()) for each in weights])
    x = torch.randn(2, 3, 136).bfloat16()
    for found, weight in zip(group(x), weights, strict=True):
        assert_close(found, x, weight, weight[:, 0])


@pytest.mark.parametrize("make", [sparse, two_of_four])
def test_siblings_share_a_launch(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrangement, "takes_tiles", lambda device: True)
    monkeypatch.setattr(siblings, "_runs_together", lambda x: True)
    launches: list[int] = []
    real = tensor_cores._launch

    def counted(kernel: Any, x: Tensor, parts: Any) -> None:
        launches.append(len(parts))
        real(kernel, x, parts)

    monkeypatch.setattr(tensor_cores, "_launch", counted)
    layers = []
    for out in (70, 64, 8):
        linear = nn.Linear(136, out).bfloat16().requires_grad_(False)
        linear.weight.copy_(make(out, 136))
        layers.append(MosaicLinear.from_linear(linear))
    siblings.join(layers)
    for rows in (1, 3):
        x = torch.randn(rows, 136).bfloat16()
        for layer in layers:
            assert_close(layer(x), x, layer.to_dense().weight, layer.bias)
    assert launches == [3, 3]
    layers[1].half().bfloat16()  # other parameters, the same weights
    for layer in layers:
        assert_close(layer(x), x, layer.to_dense().weight, layer.bias)
    assert launches == [3, 3, 3]


def test_inputs_of_every_layout() -> None:
    weight = sparse(70, 72)
    group = tensor_cores.Group([(TileBitmap.from_dense(weight), None)])
    transposed = torch.randn(72, 5).bfloat16().T
    shifted = torch.randn(3 * 72 + 1).bfloat16()[1:].view(3, 72)
    assert shifted.data_ptr() % 16
    for x in (transposed, shifted, torch.randn(72).bfloat16(), torch.randn(0, 72).bfloat16()):
        assert_close(group(x)[0], x, weight, None)


def test_padding_does_not_keep_channels_last() -> None:
    weight = sparse(70, 20)
    x = torch.randn(2, 3, 5, 20).bfloat16().contiguous(memory_format=torch.channels_last)
    assert_close(tensor_cores.Group([(TileBitmap.from_dense(weight), None)])(x)[0], x, weight, None)


@pytest.mark.parametrize("form", [TileBitmap, TwoOfFour])
@pytest.mark.parametrize("spare", [64, 0], ids=["of the slab", "made in the graph"])
def test_launches_in_graphs_share_nothing(
    monkeypatch: pytest.MonkeyPatch, form: type[TileBitmap | TwoOfFour], spare: int
) -> None:
    """Two graphs whose replays interleave: one runs as a whole while the other is halfway, and the other way round."""
    launches: list[tuple[Tensor, Tensor]] = []
    real = tensor_cores._captured_workspace

    def captured(device: int, parts: Any) -> tuple[Tensor, Tensor]:
        launches.append(real(device, parts))
        launches[-1][0].fill_(255)  # its memory is not zeroed
        return launches[-1]

    monkeypatch.setattr(tensor_cores, "_is_captured", lambda: True)
    monkeypatch.setattr(tensor_cores, "_captured_workspace", captured)
    slab = torch.zeros(spare, dtype=torch.int32)
    monkeypatch.setattr(tensor_cores, "_counters", {simt.DEVICE: tensor_cores.Counters(slab)})
    weights = [two_of_four(200, 640), two_of_four(72, 640)]
    group = tensor_cores.Group([(form.from_dense(weight), None) for weight in weights])
    x = torch.randn(3, 640).bfloat16()
    for _ in range(2):
        for found, weight in zip(group(x), weights, strict=True):
            assert_close(found, x, weight, None)
        work, counters = launches[-1]
        assert counters.tolist() == [0, 0, 0]  # 200 features are two groups, 72 one
        counters.fill_(1)  # as if half of its blocks had come
        work.fill_(255)
    first, second = launches
    assert first[1].tolist() == second[1].tolist() == [1, 1, 1]
    assert len({t.data_ptr() for launch in launches for t in launch}) == 4


def test_counters_are_given_out_once() -> None:
    counters = tensor_cores.Counters(torch.zeros(10, dtype=torch.int32))
    taken = [counters.take(4) for _ in range(4)]
    assert [t.data_ptr() - counters.slab.data_ptr() for t in taken[:2]] == [0, 16]
    assert all(t.untyped_storage().data_ptr() != counters.slab.data_ptr() for t in taken[2:])


def test_a_workspace_is_made_by_another_thread_on_the_same_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of graphs, which takes all memory of the thread that captures, must not take this."""
    made, real = [], torch.zeros
    current = threading.local()

    @contextlib.contextmanager
    def on(stream: str) -> Iterator[None]:
        current.stream = stream
        yield

    def zeros(size: int, *, device: torch.device, **options: Any) -> Tensor:
        made.append((threading.get_ident() == here, current.stream, device))
        return real(size, **options)

    here = threading.get_ident()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"current of {device}")
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch, "zeros", zeros)
    found = tensor_cores._new_workspace(simt.DEVICE)
    assert len(found) == tensor_cores._C_cuda.linear_workspace_bytes(simt.DEVICE)
    assert made == [(False, f"current of {simt.DEVICE}", torch.device("cuda", simt.DEVICE))]


def test_the_module_says_where_many_rows_have_a_kernel(gpu: simt.Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(tensor_cores, "_C_cuda", gpu.module, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "of no table")
    monkeypatch.setattr(tensor_cores, "_rows", {})
    assert tensor_cores.rows_of(simt.DEVICE) == (64, 1024 if gpu.arch == 90 else 0)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_row_bitmap(dtype: torch.dtype, keep: bool) -> None:
    weight = sparse(33, 70, dtype)
    mask = torch.rand(33, 70) < 0.5 if keep else None
    values, bits = call("pack", weight, mask)
    assert all(map(torch.equal, (values, bits), reference.pack(weight, mask)))
    kept = weight if mask is None else weight * mask
    assert torch.equal(call("unpack", values, bits, 70), kept)
    rows = RowIndex.from_bitmask(bits)
    for count in (1, 17):
        x = torch.randn(count, 70).to(dtype)
        assert_close(call("sparse_linear", x, values, rows.words, rows.offsets, None, 70), x, kept, None)
