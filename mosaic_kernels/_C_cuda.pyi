# SPDX-License-Identifier: Apache-2.0
def linear_decode(
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
    device: int,
    stream: int,
) -> None: ...
def pack_bits(
    weight: int,
    values: int,
    words: int,
    counts: int,
    offsets: int,
    rows: int,
    columns: int,
    dtype: int,
    device: int,
    stream: int,
) -> None: ...
def pack_values(
    weight: int,
    values: int,
    words: int,
    counts: int,
    offsets: int,
    rows: int,
    columns: int,
    dtype: int,
    device: int,
    stream: int,
) -> None: ...
def unpack(
    weight: int,
    values: int,
    words: int,
    counts: int,
    offsets: int,
    rows: int,
    columns: int,
    dtype: int,
    device: int,
    stream: int,
) -> None: ...
def why_not(device: int) -> str | None: ...
