// The passes of IVON, each once over memory. Plain C++17 over raw pointers: to build it takes a
// compiler and nothing else. reference.py is what this must agree with, noise.py the noise.
//
// Everything works on chunks of 256 elements that stay in the first-level cache. Where a tensor (or
// a slice of it) covers a chunk in part, the chunk is padded and computed whole, so that a value
// does not depend on where a slice or a thread begins.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define X86
#include <immintrin.h>
#endif

#ifdef __linux__
#include <unistd.h>
#endif

#ifdef _OPENMP
#include <omp.h>
#endif

#define INLINED __attribute__((always_inline))
#define INLINE inline INLINED

// Keeps a compiler from fusing the product x with a sum.
#if defined(X86)
#define ROUNDED(x) asm("" : "+v"(x))
#elif defined(__aarch64__)
#define ROUNDED(x) asm("" : "+w"(x))
#else
#define ROUNDED(x) asm("" : "+m"(x))
#endif

namespace {

constexpr int CHUNK = 256, HALF = CHUNK / 2;
constexpr uint32_t SIGN = 1u << 31;

// LOW, LOW_GRAD: the parameter, its gradient is bfloat16. HELD, REGENERATE: in an update the
// parameter still holds θ, and m stands in `mean`, or is to be made as θ−σε. APART: for a sample m
// stands in `mean`, and is not to be kept there.
enum Flag { LOW = 1, LOW_GRAD = 2, REGENERATE = 4, HELD = 8, APART = 16 };

// A tensor: a word of each column of the table in posterity/ops/fused.py. Null where a pass has no use
// for a pointer.
struct Row {
  char *param;         // θ or m
  float *mean;         // m, or where sample() is to keep it
  const char *grad;
  float *grad_sum;     // sums over samples
  float *product_sum;
  float *momentum;
  float *hess;         // normals: where they go
  int64_t numel;
  int64_t number;      // third word of the noise
  int64_t start;       // index of the first element in the whole tensor
  int64_t flags;
  float *step;         // t, for an update: counted here
};

struct Settings {
  uint64_t key;   // of the seed: first word low, second high
  uint64_t draw;  // number of the draw
  double sign;    // of the noise: +1, −1
  double ess, delta, floor;
  double lr, rate, rho, clip;  // rate: 1−β1, ρ: 1−β2
  double debias;               // β1, or 0 where the momentum is not debiased
  double grad_scale, product_scale, square_scale;  // square_scale > 0: "gradsq"
};

enum Pass { SAMPLE, UNSAMPLE, ACCUMULATE, UPDATE, NORMALS, RESTORE };

struct Job {
  int pass;
  const Row *rows;
  int64_t n;
  const Settings *settings;
  bool past;  // whether what is only written had better not fill the caches
};

struct Scalars {  // of a group, in the precision of the state; ess4 is 4λ
  float ess4, delta, floor, least, lr, momentum_rate, rho, clip, grad, product;
  bool price;  // else "gradsq"
};

// Where a tensor lies in a chunk.
struct Span {
  int64_t first;  // index in the tensor of the chunk's first element; negative before a slice
  int from, to;   // elements of the chunk that are the tensor's
  bool past;      // as in Job
};

INLINE uint32_t word(float x) { uint32_t w; std::memcpy(&w, &x, 4); return w; }
INLINE float real(uint32_t w) { float x; std::memcpy(&x, &w, 4); return x; }

// How many elements ahead a pass calls its streams into the cache, beside the making of noise and
// without. Zen 5 is faster with the next chunk. Streams often lie alike, and a cache of eight ways does
// not hold that of all of them, too: for those it stays as it was tuned on Zen 4.
const struct Ahead { int64_t noisy, still; } AHEAD = [] {
#ifdef _SC_LEVEL1_DCACHE_ASSOC
  if (sysconf(_SC_LEVEL1_DCACHE_ASSOC) >= 12) return Ahead{CHUNK, CHUNK};
#endif
  return Ahead{0, 64};
}();

alignas(64) const uint32_t LANES[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

INLINE int64_t chunks(const Row &row) {
  return row.numel ? (row.start % CHUNK + row.numel + CHUNK - 1) / CHUNK : 0;
}

// Threefry-2x32-13 (Salmon et al., SC 2011) of N words or vectors of words, a round of them all after
// the other: each chain alone waits for itself.
template <int N, class Word>
INLINE void threefry(uint32_t k0, uint32_t k1, Word *x0, Word *x1) {
  const uint32_t k2 = k0 ^ k1 ^ 0x1BD11BDAu;
#define EACH for (int j = 0; j < N; j++)
#define ADD(a, b) EACH { x0[j] += a; x1[j] += b; }
#define ROUND(r) \
  EACH x0[j] += x1[j]; \
  EACH x1[j] = ((x1[j] << r) | (x1[j] >> (32 - r))) ^ x0[j];
#define EVEN ROUND(13) ROUND(15) ROUND(26) ROUND(6)
#define ODD ROUND(17) ROUND(29) ROUND(16) ROUND(24)
  ADD(k0, k1)
  EVEN ADD(k1, k2 + 1)
  ODD ADD(k2, k0 + 2)
  EVEN ADD(k0, k1 + 3)
  ROUND(17)
#undef EACH
#undef ADD
#undef ROUND
#undef EVEN
#undef ODD
}

#define WIDTH 4
namespace baseline {
#include "_passes.h"
}
#undef WIDTH

#ifdef X86

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define WIDTH 8
namespace avx2 {
#include "_passes.h"
}
#undef WIDTH
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif
#define WIDTH 16
namespace avx512 {
#include "_passes.h"
}
#undef WIDTH
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // X86

constexpr int64_t GRAIN = 64;     // chunks worth a thread
constexpr int64_t LARGE = 16384;  // chunks that no cache is expected to hold until they are read

}  // namespace

extern "C" {

// What the Python side and this file must agree on.
int posterity_layout() { return int(sizeof(Row) << 16 | sizeof(Settings) << 4 | 6); }

// How many instruction sets this machine has: 0 the baseline alone, 1 AVX2 too, 2 AVX-512 too.
int posterity_levels() {
#ifdef X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

void posterity_run(int pass, const int64_t *table, int64_t n, const void *settings, int level,
                   int threads) {
  auto part = baseline::run;
#ifdef X86
  if (level == 1) part = avx2::run;
  if (level == 2) part = avx512::run;
#endif
  std::vector<Row> rows(n);
  int64_t total = 0;
  for (int64_t r = 0; r < n; r++) {
    int64_t words[sizeof(Row) / 8];
    for (size_t column = 0; column < sizeof(Row) / 8; column++) words[column] = table[column * n + r];
    std::memcpy(&rows[r], words, sizeof words);
    total += chunks(rows[r]);
  }
  const Job job{pass, rows.data(), n, static_cast<const Settings *>(settings), total > LARGE};
  const int64_t useful = (total + GRAIN - 1) / GRAIN;
  if (threads > useful) threads = int(useful);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#ifdef _OPENMP
    const int64_t i = omp_get_thread_num(), of = omp_get_num_threads();
#else
    const int64_t i = 0, of = 1;
#endif
    part(job, total * i / of, total * (i + 1) / of);
  }
  if (pass == UPDATE)
    for (int64_t r = 0; r < n; r++) *rows[r].step += 1;
}

}  // extern "C"
