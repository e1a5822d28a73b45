// SPDX-License-Identifier: Apache-2.0
// Puts rows of x into the order in which the linear kernels read them. One stream for a block of rows
// also keeps rows that are 4 KB apart from evicting each other from L1.
#include "cpu/rows.h"

namespace mosaic::MOSAIC_ISA {
namespace {

// What the linear kernels of this level multiply by.
template <typename T>
struct Packed {
  using Type = float;
};
#if defined(__AVX512BF16__)
template <>
struct Packed<BFloat16> {
  using Type = BFloat16;
};
#endif

MOSAIC_HD void convert(float from, float* to) { *to = from; }
MOSAIC_HD void convert(BFloat16 from, BFloat16* to) { *to = from; }
MOSAIC_HD void convert(BFloat16 from, float* to) { *to = to_float(from); }
MOSAIC_HD void convert(Half from, float* to) { *to = to_float(from); }

}  // namespace

int packed_x_size(DType dtype) {
  return dtype == DType::kBFloat16 ? static_cast<int>(sizeof(Packed<BFloat16>::Type)) : 4;
}

template <typename T>
void pack_x(const void* from, int64_t rows, int64_t in_features, void* packed) {
  using X = typename Packed<T>::Type;
  const int64_t words = bitmask_words(in_features), whole = in_features / kWordBits;
  for (int64_t n = 0; n < rows; ++n) {
    const T* x = static_cast<const T*>(from) + n * in_features;
    X* to = static_cast<X*>(packed) + n * kWordBits;
    for (int64_t w = 0; w < whole; ++w, x += kWordBits, to += rows * kWordBits) {
      for (int i = 0; i < kWordBits; ++i) convert(x[i], to + i);
    }
    if (whole == words) continue;
    const int64_t left = in_features - whole * kWordBits;
    std::memset(to, 0, kWordBits * sizeof(X));
    for (int64_t i = 0; i < left; ++i) convert(x[i], to + i);
  }
}

#if defined(__AVX512VNNI__)
// 64 bytes at a time, [group of 64][row of the block][64], as vpdpbusd wants them: unsigned, 128 added.
constexpr int64_t kBytes = 64;
constexpr int kOffset = 128;
using Quantized = uint8_t;
#else
// Whole numbers in fp32, laid out as pack_x does it.
constexpr int64_t kBytes = kWordBits;
constexpr int kOffset = 0;
using Quantized = float;
#endif

int64_t quantized_row_bytes(int64_t in_features) {
  return (in_features + kBytes - 1) / kBytes * kBytes * static_cast<int64_t>(sizeof(Quantized));
}

template <typename T>
void quantize_x(const void* from, int64_t rows, int64_t in_features, void* packed, float* scales) {
  for (int64_t n = 0; n < rows; ++n) {
    const T* x = static_cast<const T*>(from) + n * in_features;
    float largest = 0, strange = 0;
    for (int64_t i = 0; i < in_features; ++i) {
      const float v = __builtin_fabsf(to_float(x[i]));
      strange += v - v;  // NaN where x holds one, or Inf: then so does the result
      largest = v > largest ? v : largest;
    }
    const bool usable = strange == 0 && largest > 0;
    scales[n] = strange == 0 ? largest / 127 : strange;
    auto* to = static_cast<Quantized*>(packed) + n * kBytes;
    for (int64_t first = 0; first < in_features; first += kBytes, to += rows * kBytes) {
      const int64_t count = in_features - first < kBytes ? in_features - first : kBytes;
      for (int64_t i = 0; i < count; ++i) {
        const float whole = usable ? __builtin_rintf(to_float(x[first + i]) / scales[n]) : 0;
        to[i] = static_cast<Quantized>(whole + kOffset);
      }
      for (int64_t i = count; i < kBytes; ++i) to[i] = 0;
    }
  }
}

template void quantize_x<float>(const void*, int64_t, int64_t, void*, float*);
template void quantize_x<BFloat16>(const void*, int64_t, int64_t, void*, float*);
template void quantize_x<Half>(const void*, int64_t, int64_t, void*, float*);

template void pack_x<float>(const void*, int64_t, int64_t, void*);
template void pack_x<BFloat16>(const void*, int64_t, int64_t, void*);
template void pack_x<Half>(const void*, int64_t, int64_t, void*);

}  // namespace mosaic::MOSAIC_ISA
