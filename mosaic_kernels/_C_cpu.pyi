# SPDX-License-Identifier: Apache-2.0
from typing import Any

def sparse_linear(
    x: int,
    values: int,
    words: int,
    offsets: int,
    bias: int,
    out: int,
    rows: int,
    in_features: int,
    out_features: int,
    nnz: int,
    dtype: int,
    threads: int,
) -> None: ...
def sparse_linear_int8(
    x: int,
    values: int,
    words: int,
    offsets: int,
    bias: int,
    out: int,
    rows: int,
    in_features: int,
    out_features: int,
    nnz: int,
    dtype: int,
    threads: int,
    scales: int,
    scale_groups: int,
    quantize_x: bool,
) -> None: ...

class PreparedLinear:
    def __init__(
        self,
        values: int,
        words: int,
        offsets: int,
        bias: int,
        in_features: int,
        out_features: int,
        nnz: int,
        dtype: int,
        scales: int,
        scale_groups: int,
        quantize_x: bool,
    ) -> None: ...
    def run(self, x: int, out: int, rows: int, threads: int) -> None: ...
    def run_if(
        self,
        holder: dict[str, object],
        names: tuple[str, ...],
        objects: tuple[object, ...],
        addresses: bytes,
        x: int,
        out: int,
        rows: int,
        threads: int,
    ) -> bool: ...

class PreparedGroup:
    def __init__(self, parts: list[tuple[int, ...]], in_features: int, quantize_x: bool) -> None: ...
    def run(self, x: int, outs: list[int], rows: int, dtype: int, threads: int) -> None: ...

class PreparedBlock:
    def __init__(
        self,
        dtype: int,
        layers: list[tuple[int, ...]],
        norms: list[int],
        epsilons: list[float],
        head_dim: int,
        scaling: float,
    ) -> None: ...
    def input(self, x: int, cosine: int, sine: int, query: int, key: int, value: int, threads: int) -> None: ...
    def output(
        self,
        x: int,
        query: int,
        keys: int,
        values: int,
        mask: int,
        tokens: int,
        strides: tuple[int, int, int, int],
        out: int,
        threads: int,
    ) -> None: ...

def attend(
    query: int,
    keys: int,
    values: int,
    mask: int,
    out: int,
    query_heads: int,
    key_heads: int,
    dim: int,
    tokens: int,
    strides: tuple[int, int, int, int],
    scaling: float,
    dtype: int,
    threads: int,
) -> None: ...
def pack_bits(
    weight: int, keep: int, bitmask: int, offsets: int, rows: int, columns: int, dtype: int, threads: int
) -> None: ...
def pack_values(
    weight: int,
    values: int,
    bitmask: int,
    bitmask_stride: int,
    offsets: int,
    rows: int,
    columns: int,
    nnz: int,
    dtype: int,
    threads: int,
) -> None: ...
def unpack(
    weight: int,
    values: int,
    bitmask: int,
    bitmask_stride: int,
    offsets: int,
    rows: int,
    columns: int,
    nnz: int,
    dtype: int,
    threads: int,
) -> None: ...
def outlier_stats(
    weight: int,
    norms: int,
    alphas: int,
    total: int,
    counts: int,
    rows: int,
    columns: int,
    alpha_count: int,
    dtype: int,
    threads: int,
) -> None: ...
def column_square_sums(x: int, sums: int, rows: int, columns: int, dtype: int, threads: int) -> None: ...
def select(scores: int, keep: int, mask: int, rows: int, columns: int, scope: int, threads: int) -> None: ...
def score_select(
    weight: int, norms: int, keep: int, mask: int, rows: int, columns: int, dtype: int, scope: int, threads: int
) -> None: ...
def score_bits(
    weight: int,
    norms: int,
    keep: int,
    bitmask: int,
    offsets: int,
    rows: int,
    columns: int,
    dtype: int,
    scope: int,
    threads: int,
) -> None: ...
def obs_block(
    weight: int, factor: int, keep: int, errors: int, rows: int, block: int, n: int, m: int, threads: int
) -> None: ...
def admm_step(
    proposal: int, keep: int, gradient: int, target: int, penalty: float, rows: int, columns: int, threads: int
) -> None: ...
def cg_step(
    solution: int,
    residual: int,
    direction: int,
    energy: int,
    image: int,
    keep: int,
    rows: int,
    columns: int,
    threads: int,
) -> None: ...
def bytes_at(x: int, count: int) -> bytes: ...
def holds(x: int, bytes: bytes) -> bool: ...
def unchanged(
    holders: tuple[dict[str, Any], ...] | dict[str, Any],
    names: tuple[str, ...],
    objects: tuple[object, ...],
    addresses: bytes,
) -> bool: ...
def isa() -> str: ...
def features() -> str: ...
def set_isa(level: str) -> None: ...
