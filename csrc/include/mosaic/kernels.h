// SPDX-License-Identifier: Apache-2.0
// Every entry point of csrc. Pointers are to contiguous memory that the caller owns; nothing here
// allocates a result, and each function means what its namesake in ops/reference.py computes.
#pragma once

#include <cstdint>

#include "mosaic/format.h"
#include "mosaic/status.h"

namespace mosaic {

// out [rows, out_features] = x [rows, in_features] . W^T + bias. W is in row bitmap form; where `offsets` is
// nullptr it is dense and `values` its rows. Where there are scales the values are int8 and a weight is its
// value times its row's scale, or that of its row and 64 columns.
struct LinearArgs {
  const void* x;
  const void* values;  // [nnz], no padding behind the last one
  const uint32_t* words;
  const int64_t* offsets;
  const void* bias;  // nullptr: none
  void* out;
  int64_t rows;
  int64_t in_features;
  int64_t out_features;
  int64_t nnz;
  DType dtype;  // of x, bias and out, and of the values that are not int8; sums are fp32
  int threads;
  const float* scales = nullptr;  // [out_features, scale_groups]
  int64_t scale_groups = 0;       // 1, or scale_groups_of(in_features)
  bool quantize_x = false;        // with scales: each row of x is rounded to int8, products are exact
};

// First half of packing: the bits of a weight, and offsets [rows + 1] from which the caller learns nnz.
struct PackBitsArgs {
  const void* weight;
  const uint8_t* keep;  // [rows, columns], 0 or 1; nullptr: every weight that is not zero
  uint8_t* bitmask;
  int64_t* offsets;
  int64_t rows;
  int64_t columns;
  DType dtype;
  int threads;
};

// Second half of packing (weight -> values) and its inverse (values -> weight).
struct PackValuesArgs {
  void* weight;
  void* values;
  const uint8_t* bitmask;
  int64_t bitmask_stride;  // bytes from one row of bits to the next: the row bitmap's rows are longer
  int64_t* offsets;        // [rows + 1]; unpack writes it, pack_values reads it
  int64_t rows;
  int64_t columns;
  int64_t nnz;
  DType dtype;
  int threads;
};

struct OutlierArgs {
  const void* weight;
  const float* column_norms;
  const double* alphas;
  double* total;    // [1]
  int64_t* counts;  // [alpha_count]
  int64_t rows;
  int64_t columns;
  int64_t alpha_count;
  DType dtype;
  int threads;
};

struct ColumnSumsArgs {
  const void* x;
  double* sums;  // [columns]
  int64_t rows;
  int64_t columns;
  DType dtype;
  int threads;
};

enum class Scope : int { kMatrix = 0, kRow = 1, kGroup = 2 };

struct SelectArgs {
  const float* scores;  // nullptr: |weight| * column_norms, worked out where it is read and never stored
  const void* weight;
  const float* column_norms;
  DType dtype;          // of weight
  const int64_t* keep;  // matrix: one count; row: one per row; group: n, m
  uint8_t* mask;        // [rows, columns], 0 or 1
  int64_t rows;
  int64_t columns;
  Scope scope;
  int threads;
  uint8_t* bitmask = nullptr;  // where they are given, and the weight is: instead of the mask, what pack_bits
  int64_t* offsets = nullptr;  // makes of it
};

struct ObsArgs {
  float* weight;  // [rows, block], updated in place
  const float* factor;
  uint8_t* keep;  // [rows, block]; written when m > 0
  float* errors;
  int64_t rows;
  int64_t block;
  int64_t n;
  int64_t m;
  int threads;
};

struct AdmmArgs {
  float* proposal;  // [rows, columns], becomes the dual
  const uint8_t* keep;
  const float* gradient;
  float* target;
  float penalty;
  int64_t rows;
  int64_t columns;
  int threads;
};

struct CgArgs {
  float* solution;  // [rows, columns], as what follows; updated in place
  float* residual;
  float* direction;
  float* energy;  // [rows], updated in place
  const float* image;
  const uint8_t* keep;
  int64_t rows;
  int64_t columns;
  int threads;
};

// A decoder block of Llama's kind for one token, in two halves: between them its caller adds the token's key
// and value to the others'. What each linear layer reads, writes and multiplies with how many threads is
// filled in.
struct BlockArgs {
  LinearArgs query, key, value, output, gate, up, down;
  const void* attention_norm;  // [hidden]
  const void* ffn_norm;        // [hidden]
  const void* query_norm;      // [head_dim], for each head; nullptr: none
  const void* key_norm;
  float attention_epsilon, ffn_epsilon, query_epsilon, key_epsilon;
  int64_t head_dim;
  float scaling;
  DType dtype;  // of everything but values and scales
  int threads;
};

// x [hidden], cosine and sine [head_dim] -> query [query heads, head_dim], key and value [key heads,
// head_dim]
struct BlockInput {
  const void *x, *cosine, *sine;
  void *query, *key, *value;
};

// x [hidden], query, keys and values [key heads, tokens, head_dim] -> out [hidden]
struct BlockOutput {
  const void *x, *query, *keys, *values;
  const uint8_t* mask;  // [tokens], 0 where one is not attended to; nullptr: to all
  int64_t tokens;
  int64_t key_head_stride, key_stride;  // in elements, from one head and one token to the next
  int64_t value_head_stride, value_stride;
  void* out;
};

// One token: softmax(query . keys * scaling) . values -> out [query_heads, dim], zero where nothing is
// attended to. query [query_heads, dim]; keys and values [key_heads, tokens, dim]
struct AttentionArgs {
  const void *query, *keys, *values;
  const uint8_t* mask;  // [tokens], 0 where one is not attended to; nullptr: to all
  void* out;
  int64_t query_heads, key_heads, dim, tokens;  // dim is even, and query_heads a multiple of key_heads
  int64_t key_head_stride, key_stride;          // in elements, from one head and one token to the next
  int64_t value_head_stride, value_stride;
  float scaling;
  DType dtype;
  int threads;
};

namespace cpu {

Status sparse_linear(const LinearArgs&);
// Several weights on one x in one dispatch (query, key and value; gate and up): x, rows, in_features, dtype,
// threads and quantize_x are the same in all.
Status sparse_linear_group(const LinearArgs* parts, int64_t count);
Status pack_bits(const PackBitsArgs&);
Status pack_values(const PackValuesArgs&);
Status unpack(const PackValuesArgs&);
Status outlier_stats(const OutlierArgs&);
Status column_square_sums(const ColumnSumsArgs&);
Status select(const SelectArgs&);
Status obs_block(const ObsArgs&);
Status admm_step(const AdmmArgs&);
Status cg_step(const CgArgs&);
Status attend(const AttentionArgs&);
Status block_input(const BlockArgs&, const BlockInput&);
Status block_output(const BlockArgs&, const BlockOutput&);

const char* isa();                  // the level in use: "scalar", "avx2" or "avx512"
const char* features();             // what the processor offers, for `python -m mosaic_kernels.info`
Status set_isa(const char* level);  // a level this processor has; for tests and measurements

}  // namespace cpu

// Pointers are to device memory; `stream` is a cudaStream_t of device `device`. Nothing is allocated,
// nothing waits for the device, and `threads` is not read.
namespace cuda {

struct Launch {
  void* stream;
  int device;
};

// A weight in row bitmap form, any dtype and any number of rows: every 8 rows of x read it once.
Status linear_rows(const LinearArgs&, Launch);

// A weight in one of format.h's tile forms, and what it makes of x.
struct TilePart {
  const void* tiles;
  const uint32_t* offsets;  // tile bitmap alone, as is largest_step
  const void* bias;         // nullptr: none
  void* out;                // [rows, out_features]
  int64_t out_features;
  int64_t largest_step;  // units of 16 bytes of the step with most values
};

constexpr int kMaxParts = 4;

// Several weights on one x in one launch (query, key and value; gate and up), bf16 or fp16, sums in fp32.
struct TileLinearArgs {
  TilePart parts[kMaxParts];
  int part_count;
  const void* x;  // [rows, in_features]: in_features a multiple of 8, 16-byte aligned
  int64_t rows;
  int64_t in_features;
  DType dtype;
  void* workspace;  // linear_workspace_bytes(device) of the stream's own, zero at the first launch
  int64_t workspace_bytes;
  // One for each 128 output features of each part, zero before and after; nullptr: those at the workspace's
  // start.
  unsigned* counters;
};

// Tile bitmap; meant for up to 64 rows, for each 64 of which the weight is read once.
Status linear_decode(const TileLinearArgs&, Launch);
int64_t linear_workspace_bytes(int device);

// The same product for many rows, on compute capability 9.0 alone; kUnavailable elsewhere, and where the
// module was not built for it.
Status linear_prefill(const TileLinearArgs&, Launch);
bool has_linear_prefill(int device);

// Tile bitmap -> its row tiles [first_row_tile, last_row_tile) in dense form, for a dense product with many
// rows of x. bf16 and fp16 alike.
struct ExpandTilesArgs {
  const void* tiles;
  const uint32_t* offsets;
  void* weight;  // [rows of these row tiles, columns]: the last of them may have fewer than 64 rows
  int64_t rows;  // of the whole weight, as are columns
  int64_t columns;
  int64_t first_row_tile;
  int64_t last_row_tile;
};

Status expand_tiles(const ExpandTilesArgs&, Launch);

// The same for 2:4 tiles.
Status linear_2to4(const TileLinearArgs&, Launch);

// 2:4 tiles -> weight [rows, columns], bf16 or fp16 alike: for many rows of x a dense product is the faster
// way. Padding becomes -0.0.
struct ExpandArgs {
  const void* tiles;
  void* weight;  // 8-byte aligned
  int64_t rows;
  int64_t columns;
};

Status expand_2to4(const ExpandArgs&, Launch);

// weight [rows, columns] <-> words [rows, bitmask_words(columns)] and values.
struct PackArgs {
  void* weight;
  void* values;
  uint32_t* words;
  int64_t* counts;         // [rows]: kept weights of each row; pack_bits alone writes it
  const int64_t* offsets;  // [rows + 1]; nullptr for pack_bits
  const uint8_t* keep;     // [rows, columns], 0 or 1: the others count as zero, for pack_bits; or nullptr
  int64_t rows;
  int64_t columns;
  DType dtype;
};

Status pack_bits(const PackArgs&, Launch);    // weight -> words, counts
Status pack_values(const PackArgs&, Launch);  // weight, words, offsets -> values
Status unpack(const PackArgs&, Launch);       // values, words, offsets -> weight

// weight [rows, columns], bf16 or fp16 -> tile bitmap
struct PackTilesArgs {
  const void* weight;
  const uint8_t* keep;  // [rows, columns], 0 or 1: what is stored, zeros too; nullptr: all but zeros
  uint32_t* bits;       // [steps, kGroup, kTileWords], written by pack_tile_bits, read by pack_tile_values
  const uint32_t* offsets;  // [steps + 1], pack_tile_values alone, as are tiles
  void* tiles;
  int64_t rows;
  int64_t columns;
  DType dtype;
};

Status pack_tile_bits(const PackTilesArgs&, Launch);    // weight, keep -> bits
Status pack_tile_values(const PackTilesArgs&, Launch);  // weight, bits, offsets -> tiles

// nullptr where kernels can run on `device`, else the reason.
const char* why_not(int device);

}  // namespace cuda
}  // namespace mosaic
