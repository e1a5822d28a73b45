# SPDX-License-Identifier: Apache-2.0
"""A CUDA device without one: tensors that have shapes and a device but no numbers, and a count of what the host reads.

Arithmetic between devices raises, as on a real one. What the host may read (a flag, a count, a few sums) is answered
with a made-up number and noted; what it may not (more than a few numbers brought over) raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

FEW = 64  # numbers the host may read at once

aten = torch.ops.aten


class FakeCuda(TorchFunctionMode):
    """Answers reads, and does what torch without CUDA refuses for a tensor of a GPU: indexing, first of all.

    A mask is half true.

    Attributes:
        reads: the method of each read of a GPU tensor, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        subject = args[0] if args and isinstance(args[0], Tensor) else None
        if subject is None:
            return func(*args, **kwargs)
        if (answer := _ANSWERS.get(func)) is not None:
            self._note(func.__name__, subject)
            return answer(subject)
        if func is Tensor.__getitem__:
            return self._view(subject, args[1])
        if func is Tensor.__setitem__:
            return self._assign(subject, *args[1:])
        if func is Tensor.__deepcopy__:  # torch's own would copy the mode with it
            return torch.nn.Parameter(subject.clone(), False)
        if func is Tensor.copy_:
            return self._copy(subject, args[1])
        if func in (Tensor.nonzero, torch.nonzero):
            self._note("nonzero", subject)
            return subject.new_zeros((_half(subject), subject.dim()), dtype=torch.int64)
        return _WITHOUT_GUARD.get(func, func)(*args, **kwargs)

    def _note(self, name: str, subject: Tensor) -> None:
        if subject.is_cuda:
            assert name == "nonzero" or subject.numel() <= FEW, f"{name} reads {subject.numel()} numbers of the GPU"
            self.reads.append(name)

    def _view(self, x: Tensor, index: Any) -> Tensor:
        x, places = self._split(x, index)
        return aten.index.Tensor(x, places) if places else x

    def _assign(self, x: Tensor, index: Any, value: Any) -> None:
        x, places = self._split(x, index)
        if places:
            aten.index_put_.default(x, places, torch.as_tensor(value, dtype=x.dtype, device=x.device))
        elif isinstance(value, Tensor):
            self._copy(x, value)
        else:
            x.fill_(value)

    def _copy(self, x: Tensor, value: Tensor) -> Tensor:
        return x.mul_(value.to(x.device, x.dtype))  # numbers do not matter, shapes and devices do

    def _split(self, x: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
        """The view that integers, slices and ``None`` make, and the tensors that index it."""
        parts = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in [part for part in parts if not isinstance(part, Tensor)]:
            at = next(i for i, part in enumerate(parts) if part is Ellipsis)
            taken = sum(part is not None for part in parts) - 1
            parts[at : at + 1] = [slice(None)] * (x.dim() - taken)
        dim, places = 0, {}
        for part in parts:
            if part is None:
                x, dim = x.unsqueeze(dim), dim + 1
            elif isinstance(part, slice):
                x, dim = aten.slice.Tensor(x, dim, part.start, part.stop, part.step or 1), dim + 1
            elif isinstance(part, Tensor) and part.dim():
                assert part.is_cuda == x.is_cuda, f"a tensor on {x.device} is indexed by one on {part.device}"
                if part.dtype == torch.bool:
                    self._note("nonzero", part)
                    part = torch.zeros(_half(part), dtype=torch.int64, device=part.device)
                places[dim], dim = part, dim + 1
            else:
                x = aten.select.int(x, dim, int(part))
        return x, [places.get(d) for d in range(max(places, default=-1) + 1)]


def _listed(x: Tensor) -> Any:
    made: Any = 0.5 if x.dtype.is_floating_point else 1
    for size in reversed(x.shape):
        made = [made] * size
    return made


def _half(mask: Tensor) -> int:
    """How many places of a mask are said to be true."""
    return max(1, mask.numel() // 2)


_ANSWERS: dict[Any, Callable[[Tensor], Any]] = {
    Tensor.__bool__: lambda x: True,
    Tensor.__int__: lambda x: 1,
    Tensor.__index__: lambda x: 1,
    Tensor.__float__: lambda x: 0.5,
    Tensor.item: _listed,
}


# What Python's own form of an operator refuses, and the operator does not.
_WITHOUT_GUARD: dict[Any, Callable[..., Tensor]] = {
    Tensor.__invert__: torch.bitwise_not,
    Tensor.contiguous: lambda x: x.clone(memory_format=torch.contiguous_format),
    Tensor.to: lambda x, *args, **kwargs: _to(x, *args, **kwargs),
}


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    kwargs.pop("copy", None)
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    same = (device is None or device.type == x.device.type) and dtype in (None, x.dtype)
    return x if same else aten._to_copy.default(x, device=device, dtype=dtype)


class _Border(TorchDispatchMode):
    """Refuses to bring much over to the host."""

    def __init__(self, fake: FakeCuda) -> None:
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is aten._to_copy.default and args[0].is_cuda and not out.is_cuda:
            self.fake._note("copy", args[0])
        return out


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Tensors made inside with ``device="cuda"`` are of a GPU that is not there."""
    fake = FakeCuda()

    def tolist(x: Tensor) -> Any:  # reads number by number, so a function mode sees each alone
        fake._note("tolist", x)
        return _listed(x)

    with patch.object(FakeTensor, "tolist", tolist), torch.no_grad(), FakeTensorMode(), _Border(fake), fake:
        yield fake


def on_fake_cuda(model: Any) -> Any:
    """``model`` with its weights and buffers replaced by some of that GPU; call it inside :func:`fake_cuda`."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    made = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    table[name] = torch.nn.Parameter(made, False) if table is module._parameters else made
    return model
