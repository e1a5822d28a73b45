// SPDX-License-Identifier: Apache-2.0
// The wrappers of cuda/ptx_sm90a.cuh with the same meaning on fibers (see simt.h): fragments, descriptors and
// the swizzle as the PTX ISA has them ("Register Fragments", "Matrix Descriptor Format", "Shared Memory
// Matrix Layout" of wgmma), written without a look at the kernels' own arithmetic.
//
// A product reads operand B and writes its sums as late as the rules allow, when it is waited for: shared
// memory that is filled again too early, and sums that are read too early, give a wrong result. Operand A is
// read at once, so registers that are written too early cannot be seen.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "mosaic/status.h"
#include "simt/ptx.h"

namespace mosaic::cuda {

struct TensorMap {
  const unsigned char* matrix;
  int64_t rows, columns;
  int box_rows;
};

// Refuses what cuTensorMapEncodeTiled refuses.
inline Status map_matrix(TensorMap& map, DType, const void* matrix, int64_t rows, int64_t columns,
                         int box_rows) {
  const bool aligned = reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && columns * 2 % 16 == 0;
  if (!aligned || rows < 1 || columns < 1 || box_rows < 1 || box_rows > 256)
    return invalid("the driver refuses a tensor map of x");
  map = {static_cast<const unsigned char*>(matrix), rows, columns, box_rows};
  return {};
}

// 128-byte rows, in row r 16 bytes number c at place c ^ r % 8; each 16 bytes land when they like.
inline void copy_box(uint32_t to, const TensorMap& map, int row, int column, uint32_t barrier) {
  alignas(16) static const unsigned char zeros[16] = {};
  if (to % 1024 != 0) simt::fail("a box of the 128-byte swizzle to %u: not a multiple of 1024", to);
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < 8; ++c) {
      const int64_t y = row + r, x = column + 8 * c;
      const bool inside = y >= 0 && y < map.rows && x >= 0 && x < map.columns;
      simt::copy_later(to + static_cast<uint32_t>(128 * r + 16 * (c ^ r % 8)),
                       inside ? map.matrix + 2 * (y * map.columns + x) : zeros, 16, barrier);
    }
  }
}

inline void settle(float (&)[64]) {}

template <int kCount>
void shrink_registers() {}
template <int kCount>
void grow_registers() {}

// What a warp of a warpgroup has started and not waited for: groups of products, the last one still open.
struct Products {
  std::deque<std::vector<std::function<void()>>> groups;
  std::vector<std::function<void()>> open;
  bool begun = false;
};

inline Products& products_of_warp() {
  static std::map<std::pair<const void*, int>, Products> all;  // of a block, known by its shared memory
  return all[{simt::shared_start(), simt::thread_number() / simt::kLanes}];
}

template <typename Effect>
void products_meet(const char* what, const Effect& effect) {
  char nothing = 0;
  simt::meet_warp(what, ~0u, nothing, [&](char* const*) { effect(products_of_warp()); });
}

inline void products_begin() {
  products_meet("wgmma.fence", [](Products& p) { p.begun = true; });
}

inline void products_commit() {
  products_meet("wgmma.commit_group",
                [](Products& p) { p.groups.push_back(std::move(p.open)), p.open.clear(); });
}

template <int kRunning>
void products_wait() {
  products_meet("wgmma.wait_group", [](Products& p) {
    for (; p.groups.size() > kRunning; p.groups.pop_front()) {
      for (const auto& product : p.groups.front()) product();
    }
    p.begun = false;  // registers may be touched now: another fence has to come before the next product
  });
}

// Where element k of column n of operand B lies.
inline uint32_t address_in_b(uint64_t b, int n, int k) {
  const auto field = [b](int first) { return static_cast<uint32_t>(b >> first & 0x3fff) << 4; };
  if (b >> 62 != 1)
    simt::fail("a descriptor of swizzle %d: 1, over 128 bytes, is what is known here",
               static_cast<int>(b >> 62));
  if ((b >> 49 & 7) != 0) simt::fail("a descriptor of base offset %d", static_cast<int>(b >> 49 & 7));
  const uint32_t start = field(0), stride = field(32);
  const uint32_t plain =
      start + static_cast<uint32_t>(n / 8) * stride + static_cast<uint32_t>(n % 8 * 128 + 2 * k);
  return plain ^ (plain >> 7 & 7) << 4;
}

template <typename T>
void product_64x128x16(float (&sum)[64], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {
  struct Lane {
    float* sum;
    uint32_t a[4];
    uint64_t b;
  } lane{sum, {a0, a1, a2, a3}, b};
  simt::meet_warp("wgmma.mma_async", ~0u, lane, [](Lane* const* lanes) {
    struct Product {
      float left[16][16];
      float* sums[simt::kLanes];
      uint64_t b;
    };
    const auto product = std::make_shared<Product>();
    product->b = lanes[0]->b;
    for (int l = 0; l < simt::kLanes; ++l) {
      if (lanes[l]->b != product->b) simt::fail("wgmma.mma_async with different descriptors in a warp");
      product->sums[l] = lanes[l]->sum;
      for (int i = 0; i < 8; ++i) {  // a0 .. a7 of the ISA, two in a register
        const bool lower = !(i < 2 || (i >= 4 && i < 6));
        product->left[l / 4 + 8 * lower][l % 4 * 2 + (i & 1) + 8 * (i >= 4)] =
            half_of<T>(lanes[l]->a[i / 2], i & 1);
      }
    }
    Products& started = products_of_warp();
    if (!started.begun) simt::fail("wgmma.mma_async without a wgmma.fence");
    started.open.push_back([product] {
      float right[16][128];
      for (int n = 0; n < 128; ++n) {
        for (int k = 0; k < 16; ++k) {
          uint16_t bits;
          std::memcpy(&bits, simt::shared_bytes_at(address_in_b(product->b, n, k), 2, 2), 2);
          right[k][n] = half_of<T>(bits, 0);
        }
      }
      for (int l = 0; l < simt::kLanes; ++l) {
        for (int i = 0; i < 64; ++i) {
          const int row = l / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + l % 4 * 2 + (i & 1);
          for (int k = 0; k < 16; ++k) product->sums[l][i] += product->left[row][k] * right[k][column];
        }
      }
    });
  });
}

inline void store_matrices_transposed(uint32_t address, uint32_t v0, uint32_t v1, uint32_t v2, uint32_t v3) {
  struct Lane {
    unsigned char* column;
    uint32_t v[4];
  } lane{simt::shared_bytes_at(address, 16, 16), {v0, v1, v2, v3}};
  simt::meet_warp("stmatrix", ~0u, lane, [](Lane* const* lanes) {
    for (int l = 0; l < simt::kLanes; ++l) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        for (int half = 0; half < 2; ++half) {
          const auto bits = static_cast<uint16_t>(lanes[l]->v[matrix] >> (16 * half));
          std::memcpy(lanes[8 * matrix + l % 4 * 2 + half]->column + 2 * (l / 4), &bits, 2);
        }
      }
    }
  });
}

}  // namespace mosaic::cuda
