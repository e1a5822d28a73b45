# SPDX-License-Identifier: Apache-2.0
"""Makes a run independent of torch's settings: default dtype and device, inference mode, autocast."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

_lock = threading.Lock()
_users = 0  # number of runs that rely on float32; torch has one default dtype for all threads
_before = torch.float32


@contextmanager
def as_by_default() -> Iterator[None]:
    """Give torch the settings it has when a process starts; restore the old ones afterwards.

    The default dtype is shared by all threads, so other threads see float32 during a run. All other settings belong to
    this thread.
    """
    with ExitStack() as stack:
        stack.enter_context(_float32_by_default())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def _float32_by_default() -> Iterator[None]:
    global _users, _before
    with _lock:
        if not _users:
            _before = torch.get_default_dtype()
        _users += 1
        torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                torch.set_default_dtype(_before)


def leave_inference_mode(model: nn.Module) -> None:
    """Replace tensors made in ``torch.inference_mode`` by copies, because autograd always refuses the originals.

    One tensor is copied at a time. Tensors that are tied stay tied.
    """
    copies: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or not tensor.is_inference():
                    continue
                if tensor not in copies:
                    copy = tensor.detach().clone()
                    trains = isinstance(tensor, nn.Parameter) and tensor.requires_grad
                    copies[tensor] = nn.Parameter(copy, trains) if held is module._parameters else copy
                held[name] = copies[tensor]  # type: ignore[assignment]
