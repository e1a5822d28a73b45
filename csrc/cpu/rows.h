// SPDX-License-Identifier: Apache-2.0
// The serial kernels of one instruction set (namespace MOSAIC_ISA, a compile definition), see table.h
// for what each does. Definitions instantiate the templates they export explicitly.
#pragma once

#include "cpu/numeric.h"
#include "cpu/table.h"

namespace mosaic::MOSAIC_ISA {

using namespace mosaic::cpu;

// has_turned_rows: true if x has enough rows to be transposed into tiles (see KernelTable::turn_x).
// turned_rows: the size of the next tile if `rows` rows are left.
#if defined(__AVX512VNNI__)
// Up to 17 rows tiles took 1.1 to 1.7 times as long as blocks of rows. With a scale for every 64 columns they
// took 0.7 to 1.0 times as long from 12 rows on, and 0.65 to 0.85 times at 16. (4096x4096 and 2048x2048, Zen
// 4, Nov 2026)
inline bool has_turned_rows(const LinearArgs& a) { return a.rows >= (a.scale_groups > 1 ? 12 : 24); }
MOSAIC_HD int64_t turned_rows(int64_t rows) { return rows > 24 ? 32 : rows > 8 ? 16 : 8; }
constexpr int64_t kTurnMultiple = 4, kTurnChunk = 0;
#elif defined(__AVX2__)
// The lanes of a tile are rows of x, so some stay empty if the number of rows is not a multiple of 8. The
// lanes of the panels in linear_avx2.cpp are columns and are always full. Compared with panels, tiles took
// 1.5 times as long at 17 rows, 1.2 times at 33 and 41, 1.0 times at 48 and 56, and 0.9 times at 64.
// (4096x4096, Xeon, Sapphire Rapids class, limited to AVX2, Dec 2026)
inline bool has_turned_rows(const LinearArgs& a) { return a.rows >= 64; }
MOSAIC_HD int64_t turned_rows(int64_t rows) { return rows > 8 ? 16 : 8; }
// A chunk has about 96 weight rows, as many as a panel, and always a multiple of 6 (half a group). A chunk of
// 256 KB, as other kernels have, is only 23 rows of 5632 columns in bf16; since every chunk reads all of x,
// that took 1.1 times as long. (256 rows of x, Xeon, Sapphire Rapids class, limited to AVX2, Dec 2026)
constexpr int64_t kTurnMultiple = 6, kTurnChunk = 96;
#else
inline bool has_turned_rows(const LinearArgs&) { return false; }
constexpr int64_t kTurnMultiple = 1, kTurnChunk = 0;
#endif

template <typename T>
bool linear(const LinearTask& task, int64_t begin, int64_t end);
template <typename T>
bool linear_int8(const LinearTask& task, int64_t begin, int64_t end);
template <typename T>
bool linear_int8_times_int16(const LinearTask& task, int64_t begin, int64_t end);
template <typename T>
bool linear_int8_times_int8(const LinearTask& task, int64_t begin, int64_t end);
template <typename T>
bool linear_dense(const LinearTask& task, int64_t begin, int64_t end);
// AVX2 only: the parts of `linear`, `linear_int8` and `linear_dense` for many rows of x, which are
// transposed.
template <typename T>
bool linear_tiles(const LinearTask& task, int64_t begin, int64_t end);
template <typename T>
bool linear_int8_tiles(const LinearTask& task, int64_t begin, int64_t end);
template <typename T>
bool linear_dense_tiles(const LinearTask& task, int64_t begin, int64_t end);
int packed_x_size(DType dtype);
template <typename T>
void pack_x(const void* x, int64_t rows, int64_t in_features, void* packed);
void turn_x(const void* from, int64_t row_bytes, int64_t rows, void* to);
XForm x_form(WeightKind kind, const LinearArgs& a);
constexpr int64_t kWholeRows = 6;  // AVX2: x is rounded to integers if it has at most this many rows
template <typename T>
bool round_x(const void* x, XForm form, int64_t rows, int64_t in_features, void* packed, float* scales);
int64_t rounded_row_bytes(XForm form, int64_t in_features);

int64_t pack_bits(int item_size, const void* row, const uint8_t* keep, uint8_t* bits, int64_t columns);
void pack_values(int item_size, const void* row, const uint8_t* bits, void* values, int64_t count,
                 int64_t columns);
void unpack(int item_size, const void* values, const uint8_t* bits, void* row, int64_t columns);
int64_t count_bits(const uint8_t* bits, int64_t bytes);

template <typename T>
void score_row(const void* row, const float* norms, int64_t columns, float* scores);
template <typename T>
double score_sum(const void* row, const float* norms, int64_t columns);
template <typename T>
void count_outliers(const void* row, const float* norms, int64_t columns, const float* thresholds,
                    int64_t alpha_count, int64_t* counts);
template <typename T>
void column_sums(const void* x, int64_t rows, int64_t stride, int64_t columns, double* sums);

bool bounds(const float* scores, int64_t count, float* least, float* greatest);
int64_t count_from(const float* scores, int64_t count, float from);
void split(const float* scores, int64_t count, Split* state);
int64_t mark_top(const float* scores, int64_t count, Cut cut, uint8_t* mask);
bool mark_groups(const float* scores, int64_t groups, int64_t n, int64_t m, uint8_t* mask);

bool obs_rows(const ObsArgs& args, int64_t begin, int64_t end, float* tile);

void admm_row(float* proposal, const uint8_t* keep, const float* gradient, float penalty, int64_t columns,
              float* target);
float cg_row(const float* image, const uint8_t* keep, float energy, int64_t columns, float* solution,
             float* residual, float* direction);

template <typename T>
void rms_norm(const void* x, const void* weight, float epsilon, int64_t columns, void* out);
template <typename T>
void rotate(const void* x, const void* cosine, const void* sine, int64_t heads, int64_t dim, void* out);
template <typename T>
void gated(const void* gate, const void* up, int64_t columns, void* out);
template <typename T>
void add(const void* a, const void* b, int64_t columns, void* out);
template <typename T>
void attend(const AttendArgs& args);
template <typename T>
void attend_join(float* found, int64_t pieces, int64_t stride, int64_t heads, int64_t dim, void* out);

}  // namespace mosaic::MOSAIC_ISA
