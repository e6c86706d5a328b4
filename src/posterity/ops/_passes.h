// The passes for one instruction set, and the noise. _cpu.cpp includes this once for each set, in a
// namespace of its own, with WIDTH floats to a vector. Numbers in brackets are the paper's lines.

typedef float F __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t U __attribute__((vector_size(4 * WIDTH)));
typedef int32_t I __attribute__((vector_size(4 * WIDTH)));

INLINE F get(const float *from) { F x; std::memcpy(&x, from, sizeof x); return x; }
INLINE void put(F x, float *to) { std::memcpy(to, &x, sizeof x); }
// Past the caches, where it will not be read before it has left them: that spares reading it first.
INLINE void put_past(F x, float *to) {
#if WIDTH == 16
  _mm512_stream_ps(to, (__m512)x);
#elif WIDTH == 8
  _mm256_stream_ps(to, (__m256)x);
#elif defined(X86)
  _mm_stream_ps(to, (__m128)x);
#else
  put(x, to);
#endif
}
INLINE F to_real(U x) { return __builtin_convertvector((I)x, F); }  // of signed words
// One instruction where the hardware has it: of two operands it gives the second where either is NaN.
INLINE F at_least(F x, float low) {
#if WIDTH == 16
  return (F)_mm512_max_ps(_mm512_set1_ps(low), (__m512)x);
#elif WIDTH == 8
  return (F)_mm256_max_ps(_mm256_set1_ps(low), (__m256)x);
#else
  return x < low ? F{} + low : x;
#endif
}
INLINE F at_most(F x, float high) {
#if WIDTH == 16
  return (F)_mm512_min_ps(_mm512_set1_ps(high), (__m512)x);
#elif WIDTH == 8
  return (F)_mm256_min_ps(_mm256_set1_ps(high), (__m256)x);
#else
  return x > high ? F{} + high : x;
#endif
}

INLINE F root(F x) {
#if WIDTH == 16
  return (F)_mm512_sqrt_ps((__m512)x);
#elif WIDTH == 8
  return (F)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < WIDTH; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// 2/√x and 1/x by Newton's iteration where a guess is cheap: the divider has its fill of the other
// roots and quotients. NaN in, NaN out.
INLINE F twice_rsqrt(F x) {
  x = at_most(x, 3e38f);  // beyond float32 σ is next to nothing, not infinite
#if WIDTH == 16
  const F y = (F)_mm512_rsqrt14_ps((__m512)x);
#else
  const F half = 0.5f * x;
  F y = (F)(0x5f375a86u - ((U)x >> 1));
  y *= 1.5f - half * y * y;
  y *= 1.5f - half * y * y;
#endif
  return y * (3.0f - x * y * y);
}
INLINE F reciprocal(F x) {
#if WIDTH == 16
  const F y = (F)_mm512_rcp14_ps((__m512)x);
  return y * (2.0f - x * y);
#else
  return 1.0f / x;
#endif
}

// −2 log u for u = (k+½)/2^31, k in [0, 2^31): of the mantissa, in [¾, 1½), by a minimax polynomial
// (relative error 3e-8), and of the exponent.
INLINE F minus_two_log(U k) {
  const F v = to_real(k) + 0.5f;
  const U w = (U)v - 0x3f400000u;
  const F e = to_real((U)((I)w >> 23) - 31u);
#if WIDTH == 16
  const F f = (F)_mm512_getmant_ps((__m512)v, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src) - 1.0f;
#else
  const F f = (F)((w & 0x007fffffu) + 0x3f400000u) - 1.0f;
#endif
  F p = -1.0826500685e-1f * f + 2.4134741332e-1f;
  p = p * f - 2.9967833218e-1f;
  p = p * f + 3.3645622689e-1f;
  p = p * f - 3.9954154455e-1f;
  p = p * f + 4.9986884547e-1f;
  p = p * f - 6.6667097108e-1f;
  p = p * f + 1.0000012130f;
  p = p * f - 2.0f;
  return p * f + e * -1.38629436112f;
}

// The standard normals of a chunk: half cosines, half sines (Box–Muller), as in noise.py. The bits
// are all made before the first normal: in one loop the chains would be too long to overlap.
struct Normals {
  uint32_t k0, k1;
  uint64_t first;  // counter
  uint32_t turn;   // 2^31 for the other sign

  static constexpr int VECTORS = WIDTH == 16 ? 8 : 2;  // of counters at once: what registers hold

  INLINE void bits(int i, float *to) const {
    U x0[VECTORS], x1[VECTORS];
    for (int j = 0; j < VECTORS; j++) {
      std::memcpy(&x0[j], LANES, sizeof x0[j]);
      x0[j] += uint32_t(first + i + j * WIDTH);
      x1[j] = U{} + uint32_t(first >> 32);
    }
    threefry<VECTORS>(k0, k1, x0, x1);
    for (int j = 0; j < VECTORS; j++) {
      put((F)x0[j], to + i + j * WIDTH);
      put((F)(x1[j] ^ turn), to + HALF + i + j * WIDTH);
    }
  }

  static INLINE void pair(int i, float *of) {
    const U x0 = (U)get(of + i), x1 = (U)get(of + HALF + i);
    const F radius = root(minus_two_log(x0 >> 1));
    const F signed_radius = (F)((U)radius ^ (x1 & SIGN));
    const F a = to_real(x1 << 2) * float(0.78539816339744830962 * 0x1p-31);
    const F z = a * a;
    const F s = ((-1.9515283082e-4f * z + 8.3321607611e-3f) * z - 1.6666654610e-1f) * z * a + a;
    const F c = ((-1.3591853453e-3f * z + 4.1655777034e-2f) * z - 4.9999884746e-1f) * z + 1.0f;
    const auto quarter = (x1 & 0x40000000u) != 0;
    put(signed_radius * (quarter ? (F)((U)s ^ SIGN) : c), of + i);
    put(signed_radius * (quarter ? c : s), of + HALF + i);
  }
};

// Calls elements into the cache that are needed soon.
INLINE void fetch(const float *from, int count) {
  for (int line = 0; line < count; line += 16) __builtin_prefetch(from + line);
}

// What a pass does to the vectors of a chunk, with their noise, all of it before, where it needs any.
// The streams come meanwhile.
template <class Work, class... Stream>
INLINE void each(const Normals *noise, Work work, Stream... streams) {
  alignas(64) float e[CHUNK];
  for (int i = 0; noise && i < HALF; i += Normals::VECTORS * WIDTH) noise->bits(i, e);
  for (int i = 0; noise && i < HALF; i += WIDTH) {
    (fetch(streams + 2 * i + AHEAD.noisy, 2 * WIDTH), ...);
    noise->pair(i, e);
  }
  for (int i = 0; i < CHUNK; i += WIDTH) {
    if (!noise) (fetch(streams + i + AHEAD.still, WIDTH), ...);
    work(i, noise ? get(e + i) : F{});
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

// A chunk of a tensor to read or to write: the memory itself, or a padded copy of it where the
// tensor covers the chunk in part or is bfloat16.
INLINE float *load(const void *base, const Span &span, bool low, float *copy) {
  const int64_t at = span.first + span.from;
  const int count = span.to - span.from;
  if (low) {
    const uint16_t *memory = static_cast<const uint16_t *>(base) + at;
    for (int line = 0; line < CHUNK; line += 32) __builtin_prefetch(memory + CHUNK + line);
    uint16_t padded[CHUNK] = {};
    std::memcpy(padded + span.from, memory, 2 * count);
    widen(padded, copy);
    return copy;
  }
  const float *memory = static_cast<const float *>(base) + at;
  if (count == CHUNK) return const_cast<float *>(memory);
  std::memset(copy, 0, sizeof(float) * CHUNK);
  std::memcpy(copy + span.from, memory, sizeof(float) * count);
  return copy;
}
INLINE float *place(void *base, const Span &span, bool low, float *copy) {
  const bool whole = !low && span.to - span.from == CHUNK;
  return whole ? static_cast<float *>(base) + span.first : copy;
}
INLINE void store(const float *values, void *base, const Span &span, bool low) {
  const int64_t at = span.first + span.from;
  const int count = span.to - span.from;
  if (low) {
    uint16_t narrowed[CHUNK];
    narrow(values, narrowed);
    std::memcpy(static_cast<uint16_t *>(base) + at, narrowed + span.from, 2 * count);
  } else if (static_cast<float *>(base) + at != values) {  // else it was written in place
    std::memcpy(static_cast<float *>(base) + at, values + span.from, sizeof(float) * count);
  }
}

// σε (7), σ² = 1/(λu). Rounded by itself, not inside a fused multiply-add, so that every pass has
// the same bits.
INLINE F perturbation(F u, F e, const Scalars &s) {
  F d = twice_rsqrt(s.ess4 * u) * e;
  ROUNDED(d);
  return d;
}
INLINE F bounded(F h, const Scalars &s) { return at_least(h + s.delta, s.floor); }  // h+δ

// Of a bfloat16 parameter: m, whose rounding it holds; where it holds other weights these are m.
INLINE const float *at_rest(const Row &row, const Span &span, float *copy) {
  alignas(64) float held[CHUNK], rounded[CHUNK];
  uint16_t narrowed[CHUNK];
  float *means = load(row.mean, span, false, copy);
  load(row.param, span, true, held);
  narrow(means, narrowed);
  widen(narrowed, rounded);
  int others = 0;
#pragma omp simd reduction(+ : others)
  for (int i = 0; i < CHUNK; i++) others += !(rounded[i] == held[i]);
  if (others) {
    for (int i = 0; i < CHUNK; i++) means[i] = rounded[i] == held[i] ? means[i] : held[i];
    store(means, row.mean, span, false);
  }
  return means;
}

// θ ← m + σε (7); m is kept where `mean` has room for it.
INLINE void sample(const Row &row, const Scalars &s, const Span &span, const Normals *noise) {
  alignas(64) float a[CHUNK], b[CHUNK], c[CHUNK], d[CHUNK];
  const bool low = row.flags & LOW, apart = row.flags & APART, keep = row.mean && !apart && !low;
  const void *at = apart ? static_cast<const void *>(row.mean) : row.param;
  const float *means = low && !apart ? at_rest(row, span, a) : load(at, span, false, a);
  const float *hess = load(row.hess, span, false, b);
  float *thetas = place(row.param, span, low, c);
  float *kept = keep ? place(row.mean, span, false, d) : d;
  const bool past = span.past && kept != d && !(uintptr_t(kept) % 64);
  each(noise, [&](int i, F e) INLINED {
    const F m = get(means + i);
    if (past) put_past(m, kept + i);
    else if (keep) put(m, kept + i);
    put(m + perturbation(bounded(get(hess + i), s), e, s), thetas + i);
  }, means, hess);
  if (keep) store(kept, row.mean, span, false);
  store(thetas, row.param, span, low);
}

// θ → m, which was kept.
INLINE void restore(const Row &row, const Span &span) {
  alignas(64) float a[CHUNK], b[CHUNK];
  const bool low = row.flags & LOW;
  const float *means = load(row.mean, span, false, a);
  float *to = place(row.param, span, low, b);
  const bool past = span.past && to != b && !(uintptr_t(to) % 64);
  for (int i = 0; i < CHUNK; i += WIDTH) {
    fetch(means + i + AHEAD.still, WIDTH);
    const F m = get(means + i);
    past ? put_past(m, to + i) : put(m, to + i);
  }
  store(to, row.param, span, low);
}

// θ → m = θ−σε, up to one rounding.
INLINE void unsample(const Row &row, const Scalars &s, const Span &span, const Normals *noise) {
  alignas(64) float a[CHUNK], b[CHUNK];
  float *theta = load(row.param, span, false, a);
  const float *hess = load(row.hess, span, false, b);
  each(noise, [&](int i, F e) INLINED {
    put(get(theta + i) - perturbation(bounded(get(hess + i), s), e, s), theta + i);
  }, theta, hess);
  store(theta, row.param, span, false);
}

// Σĝ and Σĝ(θ−m), or Σĝ², over samples. θ−m as the parameter held it, where it is not bfloat16,
// where rounding would outweigh it.
INLINE void accumulate(const Row &row, const Scalars &s, const Span &span, const Normals *noise) {
  alignas(64) float a[CHUNK], b[CHUNK], c[CHUNK], d[CHUNK], f[CHUNK];
  const bool low = row.flags & LOW;
  const float *grads = load(row.grad, span, row.flags & LOW_GRAD, a);
  const float *hess = load(row.hess, span, false, d), *means = load(row.mean, span, false, f);
  float *sums = load(row.grad_sum, span, false, b);
  float *products = load(row.product_sum, span, false, c);
  each(noise, [&](int i, F e) INLINED {
    const F g = get(grads + i);
    F moved = g;
    if (noise) {
      moved = perturbation(bounded(get(hess + i), s), e, s);
      if (!low) {
        const F m = get(means + i);
        moved = (m + moved) - m;
      }
    }
    put(get(products + i) + g * moved, products + i);
    put(get(sums + i) + g, sums + i);
  }, grads, noise ? hess : grads, noise && !low ? means : grads, sums, products);
  store(sums, row.grad_sum, span, false);
  store(products, row.product_sum, span, false);
}

// Lines (2) to (6).
INLINE void update(const Row &row, const Scalars &s, const Span &span, const Normals *noise,
                   float debias) {
  alignas(64) float a[CHUNK], b[CHUNK], c[CHUNK], d[CHUNK], f[CHUNK], made[CHUNK];
  const bool low = row.flags & LOW, held = row.flags & HELD, regenerate = row.flags & REGENERATE;
  const bool price = s.price, rests = s.rho == 0;
  const float *grads = row.grad_sum ? load(row.grad_sum, span, false, a)
                                    : load(row.grad, span, row.flags & LOW_GRAD, a);
  float *momentum = load(row.momentum, span, false, b), *hess = load(row.hess, span, false, c);
  const void *at = row.mean ? static_cast<const void *>(row.mean) : row.param;
  const float *means = load(at, span, false, d);
  const float *other = means;  // of the samples: their summed products, or where θ is
  if (row.grad_sum) other = load(row.product_sum, span, false, f);
  else if (held) other = load(row.param, span, false, f);
  float *to = place(row.param, span, low, made);
  each(noise, [&](int i, F e) INLINED {
    const F g = get(grads + i), h = get(hess + i), u = bounded(h, s);
    F m = get(means + i), product = g;
    if (noise) {
      const F moved = perturbation(u, e, s);
      if (regenerate) m -= moved;
      product = low ? moved : (m + moved) - m;
    }
    if (held) product = get(other + i) - m;  // the same bits as from the noise
    product = row.grad_sum ? get(other + i) : g * (price ? product : g);
    const F before = at_least(h, s.least), was = get(momentum + i);
    const F mean_grad = was + s.momentum_rate * (g * s.grad - was);             // (3)
    const F curved = rests ? before : (price ? product * u : product) * s.product;  // ĥ (2)
    const F r = s.rho * (curved - before);
    const F after = at_least(before + (r + r * r * reciprocal(u + u)), s.least);  // (4)
    put(mean_grad, momentum + i);
    put(after, hess + i);
    if (regenerate) put(m, to + i);
  }, grads, hess, means, momentum, other);
  if (regenerate) means = to;
  for (int i = 0; i < CHUNK; i += WIDTH) {  // again in two loops, for shorter chains
    const F m = get(means + i);
    const F step = (get(momentum + i) * debias + s.delta * m) / bounded(get(hess + i), s);  // (5), (6)
    put(m - s.lr * at_most(at_least(step, -s.clip), s.clip), to + i);  // (6)
  }
  store(momentum, row.momentum, span, false);
  store(hess, row.hess, span, false);
  if (low) store(to, row.mean, span, false);
  store(to, row.param, span, low);
}

// A thread's share of the chunks of all tensors.
void run(const Job &job, int64_t begin, int64_t end) {
  const Settings &given = *job.settings;
  const bool price = given.square_scale <= 0;
  const double scale = given.product_scale * (price ? given.ess : given.square_scale);
  const Scalars s{float(4 * given.ess), float(given.delta), float(given.floor),
                  float(given.floor - given.delta), float(given.lr), float(given.rate),
                  float(given.rho), float(given.clip), float(given.grad_scale), float(scale), price};
  uint32_t key0 = uint32_t(given.draw), key1 = uint32_t(given.draw >> 32);
  threefry<1>(uint32_t(given.key), uint32_t(given.key >> 32), &key0, &key1);
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
    Normals noise{uint32_t(row.number), uint32_t(uint64_t(row.number) >> 32), 0,
                  given.sign < 0 ? SIGN : 0};
    threefry<1>(key0, key1, &noise.k0, &noise.k1);
    const bool known = row.grad_sum || row.flags & HELD;
    const bool noisy = job.pass == UPDATE ? row.flags & REGENERATE || (price && !known && s.rho != 0)
                                          : job.pass != ACCUMULATE || price;
    for (int64_t c = first; c < last; c++) {
      const int64_t base = c * CHUNK - row.start % CHUNK;
      const Span span{base, base < 0 ? int(-base) : 0,
                      row.numel - base < CHUNK ? int(row.numel - base) : CHUNK, job.past};
      noise.first = uint64_t(row.start / CHUNK + c) * HALF;
      const Normals *needed = noisy ? &noise : nullptr;
      switch (job.pass) {
        case SAMPLE: sample(row, s, span, needed); break;
        case RESTORE: restore(row, span); break;
        case UNSAMPLE: unsample(row, s, span, needed); break;
        case ACCUMULATE: accumulate(row, s, span, needed); break;
        case UPDATE: update(row, s, span, needed, debias); break;
        default: {
          alignas(64) float copy[CHUNK], *to = place(row.hess, span, false, copy);
          each(needed, [&](int i, F e) INLINED { put(e, to + i); });
          store(to, row.hess, span, false);
        }
      }
    }
  }
#ifdef X86
  _mm_sfence();  // other threads must see what went past the caches
#endif
}
