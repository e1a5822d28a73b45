# SPDX-License-Identifier: Apache-2.0
def why_not() -> str | None: ...
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
    stream: int,
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
    stream: int,
) -> None: ...
