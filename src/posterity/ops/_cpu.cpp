// The passes of IVON, each once over memory, with the noise made in registers. Plain C++17 over raw
// pointers: to build it takes a compiler and nothing else. reference.py is what this must agree
// with, noise.py the noise; numbers in brackets are the paper's lines (1) to (7).
//
// Everything works on chunks of 256 elements that stay in the first-level cache. Where a tensor (or
// a slice of it) covers a chunk in part, the chunk is padded and computed whole, so that a value
// does not depend on where a slice or a thread begins.

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr int CHUNK = 256, HALF = CHUNK / 2;

// LOW, LOW_GRAD: the parameter, its gradient is bfloat16. HELD, REGENERATE: in an update the
// parameter still holds θ, and m stands in `mean`, or is to be made as θ−σε. APART: for a sample m
// stands in `mean`, and is not to be kept there.
enum Flag { LOW = 1, LOW_GRAD = 2, REGENERATE = 4, HELD = 8, APART = 16 };

// A tensor, as posterity/ops/fused.py packs it. Null where a pass has no use for a pointer.
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
  double sign;   // of the noise: +1, −1
  double ess, delta, floor;
  double lr, rate, rho, clip;  // rate: 1−β1, ρ: 1−β2
  double debias;               // β1, or 0 where the momentum is not debiased
  double grad_scale, product_scale, square_scale;  // square_scale > 0: "gradsq"
};

enum Pass { SAMPLE, UNSAMPLE, ACCUMULATE, UPDATE, NORMALS };

struct Job {
  int pass;
  const Row *rows;
  int64_t n;
  const Settings *settings;
};

INLINE uint32_t word(float x) { uint32_t w; std::memcpy(&w, &x, 4); return w; }
INLINE float real(uint32_t w) { float x; std::memcpy(&x, &w, 4); return x; }
INLINE uint32_t rotate(uint32_t x, int r) { return (x << r) | (x >> (32 - r)); }
INLINE float at_least(float x, float low) { return x < low ? low : x; }  // NaN stays
INLINE float at_most(float x, float high) { return x > high ? high : x; }

// 1/√x by Newton's iteration from a guess in the exponent: the divider, which roots and quotients
// share, has its fill of the others. NaN in, NaN out.
INLINE float rsqrt(float x) {
  x = at_most(x, 3e38f);  // beyond float32 σ is next to nothing, not infinite
  float y = real(0x5f375a86u - (word(x) >> 1)), half = 0.5f * x;
  y *= 1.5f - half * y * y;
  y *= 1.5f - half * y * y;
  return y * (1.5f - half * y * y);
}

// Threefry-2x32-20 (Salmon et al., SC 2011).
INLINE void threefry(uint32_t k0, uint32_t k1, uint32_t &x0, uint32_t &x1) {
  const uint32_t k2 = k0 ^ k1 ^ 0x1BD11BDAu;
  x0 += k0;
  x1 += k1;
#define ROUND(r) x0 += x1; x1 = rotate(x1, r) ^ x0;
#define EVEN ROUND(13) ROUND(15) ROUND(26) ROUND(6)
#define ODD ROUND(17) ROUND(29) ROUND(16) ROUND(24)
  EVEN x0 += k1; x1 += k2 + 1;
  ODD x0 += k2; x1 += k0 + 2;
  EVEN x0 += k0; x1 += k1 + 3;
  ODD x0 += k1; x1 += k2 + 4;
  EVEN x0 += k2; x1 += k0 + 5;
#undef ROUND
#undef EVEN
#undef ODD
}

// log u for u in (0, 1]: exponent apart, then Cephes' polynomial around 1.
INLINE float logarithm(float u) {
  const uint32_t w = word(u) - 0x3f3504f3u;  // mantissa in [√½, √2)
  const float e = float(int32_t(w) >> 23), f = real((w & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float square = f * f;
  const float low = p * f * square - 2.12194440e-4f * e - 0.5f * square;
  return (f + low) + 0.693359375f * e;
}

// The chunk's standard normals: half cosines, half sines (Box–Muller), as in noise.py.
INLINE void normals(uint32_t k0, uint32_t k1, uint64_t chunk, float sign, float *out) {
  const uint64_t first = chunk * HALF;
  const uint32_t low = uint32_t(first), high = uint32_t(first >> 32);
#pragma omp simd
  for (int i = 0; i < HALF; i++) {
    uint32_t x0 = low + uint32_t(i), x1 = high;
    threefry(k0, k1, x0, x1);
    const float u = float(int32_t(x0 >> 1)) * 0x1p-31f + 0x1p-32f;
    const float root = __builtin_sqrtf(-2.0f * logarithm(u));
    const float radius = real(word(root) ^ (x1 & 0x80000000u)) * sign;
    const float a = float(int32_t(x1 << 2)) * float(0.78539816339744830962 * 0x1p-31);
    const float z = a * a;
    const float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * a + a;
    const float c = ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z
                     + 4.166664568298827e-2f) * z * z - 0.5f * z + 1.0f;
    const bool quarter = x1 & 0x40000000u;
    out[i] = radius * (quarter ? -s : c);
    out[HALF + i] = radius * (quarter ? c : s);
  }
}

INLINE void widen(const uint16_t *from, float *to) {
#pragma omp simd
  for (int i = 0; i < CHUNK; i++) to[i] = real(uint32_t(from[i]) << 16);
}
INLINE void narrow(const float *from, uint16_t *to) {  // to nearest even
#pragma omp simd
  for (int i = 0; i < CHUNK; i++) {
    const uint32_t w = word(from[i]), rounded = (w + 0x7fffu + ((w >> 16) & 1)) >> 16;
    to[i] = uint16_t((w & 0x7fffffffu) > 0x7f800000u ? (w >> 16) | 0x40u : rounded);
  }
}

// A chunk of a tensor: the memory itself, or a padded copy of it where the tensor covers only
// [from, to) of the chunk or is bfloat16.
struct Span {
  int64_t first;  // index in the tensor of the chunk's first element; negative before a slice
  int from, to;
};

INLINE float *load(const void *base, const Span &span, bool low, float *copy) {
  const int64_t at = span.first + span.from;
  const int count = span.to - span.from;
  if (low) {
    uint16_t padded[CHUNK] = {};
    std::memcpy(padded + span.from, static_cast<const uint16_t *>(base) + at, 2 * count);
    widen(padded, copy);
    return copy;
  }
  const float *memory = static_cast<const float *>(base) + at;
  if (count == CHUNK) return const_cast<float *>(memory);
  std::memset(copy, 0, sizeof(float) * CHUNK);
  std::memcpy(copy + span.from, memory, sizeof(float) * count);
  return copy;
}

INLINE void store(const float *values, void *base, const Span &span, bool low) {
  const int64_t at = span.first + span.from;
  const int count = span.to - span.from;
  if (low) {
    uint16_t narrowed[CHUNK];
    narrow(values, narrowed);
    std::memcpy(static_cast<uint16_t *>(base) + at, narrowed + span.from, 2 * count);
  } else if (static_cast<float *>(base) + at != values) {  // else it was computed in place
    std::memcpy(static_cast<float *>(base) + at, values + span.from, sizeof(float) * count);
  }
}

INLINE void copy(const float *from, float *to) { std::memcpy(to, from, sizeof(float) * CHUNK); }

struct Scalars {  // of a group, in the precision of the state
  float ess, delta, floor, least, lr, momentum_rate, rho, clip, grad, product, square;
};

// σε (7). Rounded by itself, not inside a fused multiply-add, so that every pass has the same bits.
INLINE void perturbation(const float *h, const float *e, const Scalars &s, float *d) {
#pragma omp simd
  for (int i = 0; i < CHUNK; i++) d[i] = rsqrt(s.ess * at_least(h[i] + s.delta, s.floor)) * e[i];
}

// θ ← m + σε (7); m is kept where `mean` has room for it.
INLINE void sample(const Row &row, const Scalars &s, const Span &span, const float *e) {
  alignas(64) float a[CHUNK], b[CHUNK], theta[CHUNK];
  const bool low = row.flags & LOW, apart = row.flags & APART;
  const float *m = load(apart ? reinterpret_cast<char *>(row.mean) : row.param, span, false, a);
  const float *h = load(row.hess, span, false, b);
  if (row.mean && !apart) store(m, row.mean, span, false);
  perturbation(h, e, s, theta);
#pragma omp simd
  for (int i = 0; i < CHUNK; i++) theta[i] += m[i];
  store(theta, row.param, span, low);
}

// θ → m = θ−σε, up to one rounding.
INLINE void unsample(const Row &row, const Scalars &s, const Span &span, const float *e) {
  alignas(64) float a[CHUNK], b[CHUNK], moved[CHUNK];
  float *theta = load(row.param, span, false, a);
  perturbation(load(row.hess, span, false, b), e, s, moved);
#pragma omp simd
  for (int i = 0; i < CHUNK; i++) theta[i] -= moved[i];
  store(theta, row.param, span, false);
}

// σε → θ−m as the parameter held it. For bfloat16 σε stays: rounding would outweigh it there.
INLINE void round_to(const float *m, float *d) {
#pragma omp simd
  for (int i = 0; i < CHUNK; i++) d[i] = (m[i] + d[i]) - m[i];
}

// Σĝ and Σĝ(θ−m), or Σĝ², over samples.
INLINE void accumulate(const Row &row, const Scalars &s, const Span &span, const float *e) {
  alignas(64) float a[CHUNK], b[CHUNK], c[CHUNK], d[CHUNK], f[CHUNK], moved[CHUNK];
  const float *g = load(row.grad, span, row.flags & LOW_GRAD, a);
  float *sum = load(row.grad_sum, span, false, b), *product = load(row.product_sum, span, false, c);
  if (s.square > 0) {
    copy(g, moved);
  } else {
    perturbation(load(row.hess, span, false, d), e, s, moved);
    if (!(row.flags & LOW)) round_to(load(row.mean, span, false, f), moved);
  }
#pragma omp simd
  for (int i = 0; i < CHUNK; i++) {
    product[i] += g[i] * moved[i];
    sum[i] += g[i];
  }
  store(sum, row.grad_sum, span, false);
  store(product, row.product_sum, span, false);
}

// Lines (2) to (6).
INLINE void update(const Row &row, const Scalars &s, const Span &span, const float *e,
                   float debias) {
  alignas(64) float a[CHUNK], b[CHUNK], c[CHUNK], d[CHUNK], f[CHUNK], m[CHUNK], made[CHUNK];
  const float *g = row.grad_sum ? load(row.grad_sum, span, false, a)
                                : load(row.grad, span, row.flags & LOW_GRAD, a);
  float *momentum = load(row.momentum, span, false, b), *h = load(row.hess, span, false, c);
  copy(row.mean ? load(row.mean, span, false, d) : load(row.param, span, false, d), m);
  const bool held = row.flags & HELD, regenerate = row.flags & REGENERATE;
  if (regenerate || (s.square <= 0 && !row.grad_sum && !held)) perturbation(h, e, s, made);
  if (regenerate) {  // m = θ−σε
#pragma omp simd
    for (int i = 0; i < CHUNK; i++) m[i] -= made[i];
  }
  const float *product = made;
  if (row.grad_sum) {
    product = load(row.product_sum, span, false, f);
  } else {
    if (s.square > 0) {
      copy(g, made);
    } else if (held) {  // the same bits as from the noise, for one more word read
      const float *theta = load(row.param, span, false, f);
#pragma omp simd
      for (int i = 0; i < CHUNK; i++) made[i] = theta[i] - m[i];
    } else if (!(row.flags & LOW)) {
      round_to(m, made);
    }
#pragma omp simd
    for (int i = 0; i < CHUNK; i++) made[i] *= g[i];
  }
  const bool price = s.square <= 0;
#pragma omp simd
  for (int i = 0; i < CHUNK; i++) {
    const float u = at_least(h[i] + s.delta, s.floor);
    const float before = at_least(h[i], s.least);
    momentum[i] += s.momentum_rate * (g[i] * s.grad - momentum[i]);  // (3)
    const float curved = product[i] * s.product * (price ? s.ess * u : s.square);  // ĥ (2)
    const float r = s.rho * (curved - before);
    h[i] = at_least(before + (r + r * r * (0.5f / u)), s.least);  // (4)
    const float slope = momentum[i] * debias + s.delta * m[i];  // (5)
    const float step = slope / at_least(h[i] + s.delta, s.floor);
    m[i] -= s.lr * at_most(at_least(step, -s.clip), s.clip);  // (6)
  }
  store(momentum, row.momentum, span, false);
  store(h, row.hess, span, false);
  if (row.flags & LOW) store(m, row.mean, span, false);
  store(m, row.param, span, row.flags & LOW);
}

INLINE void fetch(const Row &row, const Span &span) {
  const int param_size = row.flags & LOW ? 2 : 4, grad_size = row.flags & LOW_GRAD ? 2 : 4;
  const struct { const void *base; int size; } streams[] = {
      {row.param, param_size}, {row.grad, grad_size}, {row.mean, 4}, {row.grad_sum, 4},
      {row.product_sum, 4}, {row.momentum, 4}, {row.hess, 4}};
  for (const auto &stream : streams) {
    if (!stream.base) continue;
    const char *next = static_cast<const char *>(stream.base) + stream.size * (span.first + CHUNK);
    for (int line = 0; line < stream.size * CHUNK; line += 64) __builtin_prefetch(next + line);
  }
}

INLINE int64_t chunks(const Row &row) {
  return row.numel ? (row.start % CHUNK + row.numel + CHUNK - 1) / CHUNK : 0;
}

// A thread's share of the chunks of all tensors.
INLINE void run(const Job &job, int64_t begin, int64_t end) {
  const Settings &given = *job.settings;
  const Scalars s{float(given.ess), float(given.delta), float(given.floor),
                  float(given.floor - given.delta), float(given.lr), float(given.rate),
                  float(given.rho), float(given.clip), float(given.grad_scale),
                  float(given.product_scale), float(given.square_scale)};
  uint32_t key0 = uint32_t(given.draw), key1 = uint32_t(given.draw >> 32);
  threefry(uint32_t(given.key), uint32_t(given.key >> 32), key0, key1);
  int64_t before = 0;
  for (int64_t r = 0; r < job.n && before < end; r++) {
    const Row &row = job.rows[r];
    const int64_t mine = chunks(row);
    const int64_t first = begin > before ? begin - before : 0;
    const int64_t last = mine < end - before ? mine : end - before;
    before += mine;
    if (first >= last) continue;
    float debias = 1;
    if (job.pass == UPDATE) debias = float(1 / (1 - std::pow(given.debias, double(*row.step) + 1)));
    uint32_t k0 = uint32_t(row.number), k1 = uint32_t(uint64_t(row.number) >> 32);
    threefry(key0, key1, k0, k1);
    const bool price = s.square <= 0, known = row.grad_sum || row.flags & HELD;
    const bool noisy = job.pass == UPDATE ? row.flags & REGENERATE || (price && !known)
                                          : job.pass != ACCUMULATE || price;
    for (int64_t c = first; c < last; c++) {
      const int64_t offset = row.start % CHUNK, base = c * CHUNK - offset;
      const Span span{base, base < 0 ? int(-base) : 0,
                      row.numel - base < CHUNK ? int(row.numel - base) : CHUNK};
      alignas(64) float e[CHUNK];
      if (c + 1 < last) fetch(row, span);  // the next chunk comes while this one's noise is made
      if (noisy) normals(k0, k1, uint64_t(row.start / CHUNK + c), float(given.sign), e);
      switch (job.pass) {
        case SAMPLE: sample(row, s, span, e); break;
        case UNSAMPLE: unsample(row, s, span, e); break;
        case ACCUMULATE: accumulate(row, s, span, e); break;
        case UPDATE: update(row, s, span, e, debias); break;
        default: store(e, row.hess, span, false);
      }
    }
  }
}

// The same code for each instruction set.
void run_baseline(const Job &job, int64_t begin, int64_t end) { run(job, begin, end); }
#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2,fma"))) void run_avx2(const Job &job, int64_t begin, int64_t end) {
  run(job, begin, end);
}
#ifdef __clang__
#define WIDE ""
#else
#define WIDE ",prefer-vector-width=512"
#endif
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma" WIDE)))
void run_avx512(const Job &job, int64_t begin, int64_t end) {
  run(job, begin, end);
}
#endif

constexpr int64_t GRAIN = 64;  // chunks worth a thread

}  // namespace

extern "C" {

// What the Python side and this file must agree on.
int posterity_layout() { return int(sizeof(Row) << 16 | sizeof(Settings) << 4 | 4); }

// How many instruction sets this machine has: 0 the baseline alone, 1 AVX2 too, 2 AVX-512 too.
int posterity_levels() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

void posterity_run(int pass, const void *rows, int64_t n, const void *settings, int level,
                   int threads) {
  const Job job{pass, static_cast<const Row *>(rows), n, static_cast<const Settings *>(settings)};
  auto part = run_baseline;
#if defined(__x86_64__) && defined(__GNUC__)
  if (level == 1) part = run_avx2;
  if (level == 2) part = run_avx512;
#endif
  int64_t total = 0;
  for (int64_t r = 0; r < n; r++) total += chunks(job.rows[r]);
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
    for (int64_t r = 0; r < n; r++) *job.rows[r].step += 1;
}

}  // extern "C"
