// SPDX-License-Identifier: Apache-2.0
// What an instruction set provides: serial kernels over a range of rows. The drivers (linear.cpp,
// pack.cpp, ...) cut the work into ranges and share them out; dispatch.cpp picks the table.
#pragma once

#include "mosaic/kernels.h"

namespace mosaic::cpu {

// Rows of x go through the linear kernels in blocks of this many (the last one may be smaller).
constexpr int64_t kRowBlock = 8;

// Rows of x are transposed in blocks of this many (the last one may be smaller). A block is one or several
// tiles.
constexpr int64_t kTurnRows = 32;

struct LinearTask {
  LinearArgs args;
  // x in the layout that the kernel reads, one of three:
  // - from pack_x: blocks of kRowBlock rows, [word][row of the block][32], zeros past the last column,
  //   elements of packed_x_size bytes. Block b starts where row 8 b would, if rows had 32 * bitmask_words
  //   columns;
  // - from round_x, where x_form is not kPlain: blocks of rows rounded to integers;
  // - from turn_x, where has_turned_rows is true: tiles of transposed rows that pack_x or round_x wrote.
  const void* x;
  int64_t fast_values;    // a 64-byte load from any index below this one stays inside `values`
  int64_t rows_ahead;     // weight rows should be prefetched this many rows before they are read
  const float* x_scales;  // [rows] where x is rounded to integers, else nullptr
};

// The form of x that a kernel multiplies by. kPlain: floating-point numbers. All others: integers, with one
// scale for each row of x.
// - kInt8: integers of 8 bits. Each instruction set chooses how to store them (AVX-512: unsigned bytes with
//   128 added; AVX2: 16 bits).
// - kSignedInt8: integers of 8 bits, stored as signed bytes.
// - kInt8Float: integers of 8 bits, stored in fp32. For instruction sets, or numbers of rows,
//   without kernels for integer products.
// - kInt16: integers of 16 bits. Tried where an instruction set prefers them to kPlain; the driver returns to
//   kPlain if 16 bits hold most elements of a row less well than bf16.
enum class XForm { kPlain, kInt8, kInt16, kInt8Float, kSignedInt8 };

enum WeightKind { kPacked, kPackedInt8, kPackedInt8TimesInt16, kPackedInt8TimesInt8, kDense, kWeightKinds };

MOSAIC_HD WeightKind kind_of(const LinearArgs& a) {
  if (!a.offsets) return kDense;
  if (!a.scales) return kPacked;
  return a.quantize_x ? kPackedInt8TimesInt8 : kPackedInt8;
}

// Some query heads that share a key head, over a piece of its tokens. What is found of a head: the greatest
// score, the sum of the weights e^(score - greatest), and from kAttendHeader on the sums of weighted values.
struct AttendArgs {
  const void *query, *keys, *values;  // [heads, dim], [tokens, dim]
  const void* next_keys;              // of the piece that follows: in L2 when this one is done
  const uint8_t* mask;                // [tokens], or nullptr
  int64_t heads, dim, tokens;         // at most kAttendTokens
  int64_t key_stride, value_stride;   // in elements
  float scaling;
  float* room;   // of attend_room(dim) floats
  float* found;  // [heads, attend_floats(dim)]
};

// Of a piece: some 10 us of work, and keys and values that stay in L2.
constexpr int64_t kAttendTokens = 256;
constexpr int64_t kAttendHeader = 16;
inline int64_t attend_floats(int64_t dim) { return kAttendHeader + (dim + 15) / 16 * 16; }
constexpr int64_t attend_room(int64_t dim) { return dim * 40; }  // 32 keys and 8 queries

// What keeps exactly k scores: all from `from` on, and the first `ties` of those that equal `tie`.
struct Cut {
  float from;
  float tie;
  int64_t ties;
};

// Vectors are stored whole: what `between` must have behind its room, the lanes of any instruction set.
constexpr int64_t kSplitSlack = 16;

// One pass over scores: how many reach `high`, and copies of those in [low, high).
struct Split {
  float low;
  float high;
  float* between;
  int64_t room;       // of `between`, without the slack
  int64_t found = 0;  // in [low, high); up to `room` of them `between` is complete
  int64_t above = 0;
  bool finite = true;
};

struct KernelTable {
  const char* name;

  // Multiplies weight rows [begin, end) by all rows of x; returns false if memory is short. nullptr if the
  // instruction set has no such kernel.
  bool (*linear[kWeightKinds][3])(const LinearTask&, int64_t begin, int64_t end);
  // Bytes of an element of LinearTask::x: 4 (fp32), or 2 where the kernel multiplies x as it is.
  int (*packed_x_size)(DType);
  // Interleaves up to kRowBlock rows of x.
  void (*pack_x[3])(const void* x, int64_t rows, int64_t in_features, void* packed);
  XForm (*x_form)(WeightKind, const LinearArgs&);
  // Rounds up to kRowBlock rows of x to integers, with one scale for each row, and interleaves them in the
  // layout of their kernel. Returns false if kInt16 holds most elements of a row less well than bf16 does:
  // they are too small beside the largest element.
  bool (*round_x[3])(const void* x, XForm form, int64_t rows, int64_t in_features, void* packed,
                     float* scales);
  int64_t (*rounded_row_bytes)(XForm, int64_t in_features);
  // True if the linear kernels read x transposed by turn_x. They then take weight rows in multiples of
  // `turn_multiple`, and are fastest with about `turn_chunk` rows at a time (0: as many as stay in L2).
  bool (*has_turned_rows)(const LinearArgs&);
  int64_t turn_multiple, turn_chunk;
  // Transposes up to kTurnRows rows of x, each packed or rounded as a block of its own, into tiles of
  // [row_bytes / 4][rows of the tile] items of 4 bytes. Lanes are then rows of x; missing rows are zero.
  void (*turn_x)(const void* from, int64_t row_bytes, int64_t rows, void* to);

  // Bits of one row: of what is not zero and, unless `keep` is null, kept; returns their number.
  int64_t (*pack_bits)(int item_size, const void* row, const uint8_t* keep, uint8_t* bits, int64_t columns);
  // The kept weights of one row to `values`, which has room for `count` and not one more.
  void (*pack_values)(int item_size, const void* row, const uint8_t* bits, void* values, int64_t count,
                      int64_t columns);
  void (*unpack)(int item_size, const void* values, const uint8_t* bits, void* row, int64_t columns);
  int64_t (*count_bits)(const uint8_t* bits, int64_t bytes);

  // |weight| * norm of a piece of a row.
  void (*score_row[3])(const void* row, const float* norms, int64_t columns, float* scores);
  double (*score_sum[3])(const void* row, const float* norms, int64_t columns);
  void (*count_outliers[3])(const void* row, const float* norms, int64_t columns, const float* thresholds,
                            int64_t alpha_count, int64_t* counts);
  void (*column_sums[3])(const void* x, int64_t rows, int64_t stride, int64_t columns, double* sums);

  // Least and greatest score; false when one is not finite. count > 0.
  bool (*bounds)(const float* scores, int64_t count, float* least, float* greatest);
  int64_t (*count_from)(const float* scores, int64_t count, float from);
  void (*split)(const float* scores, int64_t count, Split* state);
  // Returns how many ties are left.
  int64_t (*mark_top)(const float* scores, int64_t count, Cut cut, uint8_t* mask);
  // Keeps n of every m; false when a score is not finite.
  bool (*mark_groups)(const float* scores, int64_t groups, int64_t n, int64_t m, uint8_t* mask);

  // Sweeps rows [begin, end); false when an n:m score is not finite. `tile` holds obs_tile_floats(block).
  bool (*obs_rows)(const ObsArgs&, int64_t begin, int64_t end, float* tile);

  void (*admm_row)(float* proposal, const uint8_t* keep, const float* gradient, float penalty,
                   int64_t columns, float* target);
  // Returns the row's new energy.
  float (*cg_row)(const float* image, const uint8_t* keep, float energy, int64_t columns, float* solution,
                  float* residual, float* direction);

  // Of one token, rounded to the dtype wherever transformers' modules round.
  void (*rms_norm[3])(const void* x, const void* weight, float epsilon, int64_t columns, void* out);
  void (*rotate[3])(const void* x, const void* cosine, const void* sine, int64_t heads, int64_t dim,
                    void* out);
  void (*gated[3])(const void* gate, const void* up, int64_t columns, void* out);
  void (*add[3])(const void* a, const void* b, int64_t columns, void* out);
  void (*attend[3])(const AttendArgs&);
  // What pieces, `stride` floats apart, found of each head to out [heads, dim]; overwrites what they found.
  void (*attend_join[3])(float* found, int64_t pieces, int64_t stride, int64_t heads, int64_t dim, void* out);
};

constexpr int64_t kObsLanes = 16;  // rows of a tile, at most
inline int64_t obs_tile_floats(int64_t block) { return 3 * block * kObsLanes; }

const KernelTable& kernels();

}  // namespace mosaic::cpu
