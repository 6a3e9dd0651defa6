// AMX tiles of bytes as loops, over the AVX-512 emulation. Written from TILELOADD, TILESTORED,
// LDTILECFG and TDPBSSD in Intel's Software Developer's Manual; what faults there ends the test.
#pragma once
#include <cstdlib>

#include "avx512_emulation.h"

namespace emulated {
struct Tiles {
  bool configured = false;
  uint16_t row_bytes[8];
  uint8_t rows[8];
  uint8_t data[8][16][64];
};
inline thread_local Tiles tiles;

inline void need(bool holds) {
  if (!holds) std::abort();
}
inline void need_tile(int tile) {
  need(tiles.configured && tiles.rows[tile] > 0 && tiles.row_bytes[tile] > 0);
}
}  // namespace emulated

static inline void _tile_loadconfig(const void* config) {
  const uint8_t* bytes = static_cast<const uint8_t*>(config);
  emulated::Tiles& t = emulated::tiles;
  emulated::need(bytes[0] == 1 && bytes[1] == 0);
  for (int i = 2; i < 16; ++i) emulated::need(bytes[i] == 0);
  std::memcpy(t.row_bytes, bytes + 16, sizeof t.row_bytes);
  std::memcpy(t.rows, bytes + 48, sizeof t.rows);
  for (int i = 0; i < 8; ++i) emulated::need(t.row_bytes[i] <= 64 && t.rows[i] <= 16);
  std::memset(t.data, 0, sizeof t.data);
  t.configured = true;
}

static inline void _tile_release() { emulated::tiles.configured = false; }

static inline void _tile_zero(int tile) {
  emulated::need_tile(tile);
  std::memset(emulated::tiles.data[tile], 0, sizeof emulated::tiles.data[tile]);
}

static inline void _tile_loadd(int tile, const void* from, int64_t stride) {
  _tile_zero(tile);
  emulated::Tiles& t = emulated::tiles;
  for (int i = 0; i < t.rows[tile]; ++i)
    std::memcpy(t.data[tile][i], static_cast<const char*>(from) + i * stride, t.row_bytes[tile]);
}

static inline void _tile_stored(int tile, void* to, int64_t stride) {
  emulated::need_tile(tile);
  emulated::Tiles& t = emulated::tiles;
  for (int i = 0; i < t.rows[tile]; ++i)
    std::memcpy(static_cast<char*>(to) + i * stride, t.data[tile][i], t.row_bytes[tile]);
}

static inline void _tile_dpbssd(int sum, int a, int b) {
  emulated::Tiles& t = emulated::tiles;
  emulated::need_tile(sum), emulated::need_tile(a), emulated::need_tile(b);
  emulated::need(t.rows[sum] == t.rows[a] && t.row_bytes[sum] == t.row_bytes[b] &&
                 t.row_bytes[a] == 4 * t.rows[b]);
  for (int m = 0; m < t.rows[sum]; ++m)
    for (int n = 0; n < t.row_bytes[sum] / 4; ++n) {
      int32_t total;
      std::memcpy(&total, &t.data[sum][m][4 * n], 4);
      for (int k = 0; k < t.row_bytes[a]; ++k)
        total += static_cast<int8_t>(t.data[a][m][k]) *
                 static_cast<int8_t>(t.data[b][k / 4][4 * n + k % 4]);
      std::memcpy(&t.data[sum][m][4 * n], &total, 4);
    }
}
