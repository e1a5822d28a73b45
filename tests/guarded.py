# SPDX-License-Identifier: Apache-2.0
"""Memory whose end is guarded, so that one byte too many is a crash and not luck."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor


class Guarded:
    """A copy of a tensor whose last byte is followed by a page that may not be touched, its first preceded by NaN."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        pages = -(-size // mmap.PAGESIZE)
        self._memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        end = start + pages * mmap.PAGESIZE
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0, ctypes.get_errno()
        self.like, self.address = tensor, end - size
        ctypes.memset(start, 0xFF, pages * mmap.PAGESIZE)
        ctypes.memmove(self.address, tensor.contiguous().data_ptr(), size)

    def read(self) -> Tensor:
        """A copy in ordinary memory."""
        copy = torch.empty(self.like.shape, dtype=self.like.dtype)
        ctypes.memmove(copy.data_ptr(), self.address, copy.numel() * copy.element_size())
        return copy

    def view(self) -> Tensor:
        """The guarded memory itself, which lives as long as the view; an ordinary tensor where that is empty."""
        if not self.like.numel():
            return self.like.clone()
        offset = self.address - ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        flat = torch.frombuffer(self._memory, dtype=self.like.dtype, count=self.like.numel(), offset=offset)
        return flat.view(self.like.shape)
