# SPDX-License-Identifier: Apache-2.0
def linear_rows(
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
    keep: int,
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
    keep: int,
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
    keep: int,
    rows: int,
    columns: int,
    dtype: int,
    device: int,
    stream: int,
) -> None: ...
def why_not(device: int) -> str | None: ...

# tiles, offsets, bias, out: addresses; out_features; units of the largest step
_Part = tuple[int, int, int, int, int, int]

def linear_decode(
    parts: list[_Part],
    x: int,
    rows: int,
    in_features: int,
    dtype: int,
    workspace: int,
    workspace_bytes: int,
    device: int,
    stream: int,
    counters: int = 0,
) -> None: ...
def linear_prefill(
    parts: list[_Part],
    x: int,
    rows: int,
    in_features: int,
    dtype: int,
    workspace: int,
    workspace_bytes: int,
    device: int,
    stream: int,
    counters: int = 0,
) -> None: ...
def has_linear_prefill(device: int) -> bool: ...
def linear_2to4(
    parts: list[_Part],
    x: int,
    rows: int,
    in_features: int,
    dtype: int,
    workspace: int,
    workspace_bytes: int,
    device: int,
    stream: int,
    counters: int = 0,
) -> None: ...
def expand_tiles(
    tiles: int,
    offsets: int,
    weight: int,
    rows: int,
    columns: int,
    first_row_tile: int,
    last_row_tile: int,
    device: int,
    stream: int,
) -> None: ...
def expand_2to4(tiles: int, weight: int, rows: int, columns: int, device: int, stream: int) -> None: ...
def linear_workspace_bytes(device: int) -> int: ...
def pack_tile_bits(
    weight: int,
    keep: int,
    bits: int,
    offsets: int,
    tiles: int,
    rows: int,
    columns: int,
    dtype: int,
    device: int,
    stream: int,
) -> None: ...
def pack_tile_values(
    weight: int,
    keep: int,
    bits: int,
    offsets: int,
    tiles: int,
    rows: int,
    columns: int,
    dtype: int,
    device: int,
    stream: int,
) -> None: ...
