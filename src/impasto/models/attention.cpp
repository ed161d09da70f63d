// Attention in bfloat16 with AVX-512's products of bfloat16 pairs: scores never leave the processor's second cache.
//
// For each block of queries the keys are gone through in blocks: products into a small table of scores, exponentials
// under the greatest score so far, and their products with the values, which are scaled again when a greater one comes
// (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135). Keys and values are first laid as
// the instruction reads them: 16 lanes of pairs, padded with zeros whose scores are minus infinity. A row and head is
// one thread's work, so that no row's bits depend on its neighbours. Not a number stays so.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace {

constexpr int LANES = 16;               // of 32 bits: a float, or a pair of bfloat16
constexpr int QUERIES = 32, KEYS = 128;  // of a block: larger ones were slower
constexpr int64_t WORTH = 1 << 20;       // scores that are worth beginning a thread,
constexpr int64_t WAITING = 1 << 17;     // or calling those that wait

// One head of one row; strides between tokens in numbers.
struct Head {
  const uint16_t *query, *key, *value;
  uint16_t *output;
  int64_t q_token, k_token, v_token, o_token, length, keys;
};

__m512bh pairs(const uint32_t *from) { return (__m512bh)_mm512_loadu_si512(from); }
__m512bh spread(uint32_t pair) { return (__m512bh)_mm512_set1_epi32((int)pair); }

// 2^t for t <= 0, to 3e-6 of it: a bfloat16 number is rounded by 4e-3.
__m512 power(__m512 t) {
  t = _mm512_max_ps(_mm512_set1_ps(-126.0f), t);  // in this order it keeps what is not a number
  const __m512 whole = _mm512_roundscale_ps(t, 8), rest = _mm512_sub_ps(t, whole);
  __m512 p = _mm512_set1_ps(1.3333558e-3f);
  for (float c : {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, whole);
}

template <int D> struct Scratch {
  std::vector<uint32_t> key, value;
  alignas(64) uint32_t query[QUERIES][D / 2];
  alignas(64) float score[QUERIES][KEYS];
  alignas(64) uint32_t share[QUERIES][KEYS / 2];
  alignas(64) float sum[QUERIES][D];
  float top[QUERIES], total[QUERIES];
};

// Lay keys as [keys / 16][D / 2][16] pairs and values as [keys / 2][D] pairs of neighbouring keys.
template <int D> void pack(const Head &h, Scratch<D> &s, int64_t padded) {
  s.key.assign(padded * D / 2, 0);
  s.value.assign(padded * D / 2, 0);
  uint16_t *value = (uint16_t *)s.value.data();
  for (int64_t k = 0; k < h.keys; k++) {
    uint32_t row[D / 2];
    memcpy(row, h.key + k * h.k_token, 2 * D);
    uint32_t *to = s.key.data() + (k / LANES) * LANES * (D / 2) + k % LANES;
    for (int i = 0; i < D / 2; i++) to[i * LANES] = row[i];
    const uint16_t *from = h.value + k * h.v_token;
    uint16_t *pair = value + (k / 2) * 2 * D + k % 2;
    for (int d = 0; d < D; d++) pair[2 * d] = from[d];
  }
}

// Scores of Q queries with K times 16 keys, in registers until they are whole.
template <int D, int Q, int K> void multiply(Scratch<D> &s, int query, int block, const uint32_t *key) {
  __m512 sum[Q][K] = {};
  for (int i = 0; i < D / 2; i++) {
    __m512bh keys[K];
    for (int k = 0; k < K; k++) keys[k] = pairs(key + (k * (D / 2) + i) * LANES);
    for (int q = 0; q < Q; q++) {
      const __m512bh one = spread(s.query[query + q][i]);
      for (int k = 0; k < K; k++) sum[q][k] = _mm512_dpbf16_ps(sum[q][k], one, keys[k]);
    }
  }
  for (int q = 0; q < Q; q++)
    for (int k = 0; k < K; k++) _mm512_store_ps(&s.score[query + q][(block + k) * LANES], sum[q][k]);
}

// From scores to shares of one query, not yet divided by their sum.
template <int D> void soften(Scratch<D> &s, int q, int count, float scale) {
  __m512 most = _mm512_set1_ps(s.top[q]);
  for (int k = 0; k < count; k += LANES) most = _mm512_max_ps(most, _mm512_load_ps(&s.score[q][k]));
  const float top = _mm512_reduce_max_ps(most);
  const __m512 by = _mm512_set1_ps(scale), off = _mm512_set1_ps(top * scale);
  __m512 total = _mm512_setzero_ps();
  for (int k = 0; k < count; k += LANES) {
    const __m512 e = power(_mm512_fmsub_ps(_mm512_load_ps(&s.score[q][k]), by, off));
    total = _mm512_add_ps(total, e);
    _mm256_store_si256((__m256i *)&s.share[q][k / 2], (__m256i)_mm512_cvtneps_pbh(e));
  }
  const __m512 kept = power(_mm512_set1_ps((s.top[q] - top) * scale));
  for (int d = 0; d < D; d += LANES) _mm512_store_ps(&s.sum[q][d], _mm512_mul_ps(_mm512_load_ps(&s.sum[q][d]), kept));
  s.total[q] = s.total[q] * _mm512_cvtss_f32(kept) + _mm512_reduce_add_ps(total);
  s.top[q] = top;
}

// Add the values of a block by their shares, for Q queries.
template <int D, int Q> void gather(Scratch<D> &s, int query, int count, const uint32_t *value) {
  constexpr int V = D / LANES;
  __m512 sum[Q][V];
  for (int q = 0; q < Q; q++)
    for (int v = 0; v < V; v++) sum[q][v] = _mm512_load_ps(&s.sum[query + q][v * LANES]);
  for (int k = 0; k < count / 2; k++) {
    __m512bh values[V];
    for (int v = 0; v < V; v++) values[v] = pairs(value + k * D + v * LANES);
    for (int q = 0; q < Q; q++) {
      const __m512bh one = spread(s.share[query + q][k]);
      for (int v = 0; v < V; v++) sum[q][v] = _mm512_dpbf16_ps(sum[q][v], one, values[v]);
    }
  }
  for (int q = 0; q < Q; q++)
    for (int v = 0; v < V; v++) _mm512_store_ps(&s.sum[query + q][v * LANES], sum[q][v]);
}

template <int D> void attend(const Head &h, float scale) {
  thread_local Scratch<D> s;
  const int64_t padded = (h.keys + LANES - 1) / LANES * LANES;
  pack<D>(h, s, padded);
  for (int64_t first = 0; first < h.length; first += QUERIES) {
    const int64_t here = h.length - first < QUERIES ? h.length - first : QUERIES;
    for (int q = 0; q < QUERIES; q++) {
      memcpy(s.query[q], h.query + (first + (q < here ? q : 0)) * h.q_token, 2 * D);
      memset(s.sum[q], 0, sizeof s.sum[q]);
      s.top[q] = -__builtin_inff();
      s.total[q] = 0;
    }
    for (int64_t at = 0; at < padded; at += KEYS) {
      const int count = padded - at < KEYS ? padded - at : KEYS, blocks = count / LANES;
      const uint32_t *key = s.key.data() + at * D / 2, *value = s.value.data() + at * D / 2;
      int block = 0;
      for (; block + 4 <= blocks; block += 4)
        for (int q = 0; q < QUERIES; q += 4) multiply<D, 4, 4>(s, q, block, key + block * LANES * D / 2);
      for (; block < blocks; block++)
        for (int q = 0; q < QUERIES; q += 4) multiply<D, 4, 1>(s, q, block, key + block * LANES * D / 2);
      for (int q = 0; q < QUERIES; q++) {
        for (int64_t k = h.keys; k < at + count; k++) s.score[q][k - at] = -__builtin_inff();
        soften<D>(s, q, count, scale);
      }
      constexpr int TILE = 16 / (D / LANES);
      for (int q = 0; q < QUERIES; q += TILE) gather<D, TILE>(s, q, count, value);
    }
    for (int q = 0; q < here; q++) {
      const __m512 share = _mm512_set1_ps(1.0f / s.total[q]);
      uint16_t *to = h.output + (first + q) * h.o_token;
      for (int d = 0; d < D; d += LANES)
        _mm256_storeu_si256((__m256i *)(to + d), (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_load_ps(&s.sum[q][d]), share)));
    }
  }
}

void attend(const Head &h, int64_t width, float scale) { width == 32 ? attend<32>(h, scale) : attend<64>(h, scale); }

// Threads that take unit after unit until none is left, however many of them come.
struct Team {
  const std::function<void(int64_t)> work;
  const int64_t units;
  std::atomic<int64_t> taken{0};

  static void join(void *team) {
    auto *all = static_cast<Team *>(team);
    for (int64_t unit = all->taken++; unit < all->units; unit = all->taken++) all->work(unit);
  }
};

}  // namespace
#endif

// What OpenMP libraries begin a team by: `work(data)` in each of so many threads.
using Parallel = void (*)(void (*work)(void *), void *data, unsigned threads, unsigned flags);

// Attend: tensors [rows, heads, tokens, width], width innermost. `strides` are those of query, key, value and output
// between rows, heads and tokens; `sizes` are rows, heads, queries, keys and width (32 or 64). `scale` is that of scores,
// times log2(e). `parallel` begins a team among threads that are there already; without it they are begun here. Returns
// 0, or 1 where it cannot be done.
extern "C" int attention_bf16(const uint16_t *query, const uint16_t *key, const uint16_t *value, uint16_t *output,
                              const int64_t *strides, const int64_t *sizes, float scale, int64_t threads,
                              Parallel parallel) {
#ifdef __AVX512BF16__
  const int64_t units = sizes[0] * sizes[1], width = sizes[4];
  if (width != 32 && width != 64) return 1;
  const auto work = [=](int64_t unit) {
    const int64_t n = unit / sizes[1], h = unit % sizes[1];
    const Head one = {query + n * strides[0] + h * strides[1], key + n * strides[3] + h * strides[4],
                      value + n * strides[6] + h * strides[7], output + n * strides[9] + h * strides[10],
                      strides[2], strides[5], strides[8], strides[11], sizes[2], sizes[3]};
    attend(one, width, scale);
  };
  const int64_t worth = parallel != nullptr ? WAITING : WORTH, scores = units * sizes[2] * sizes[3];
  const int64_t wanted = std::min({threads, units, scores / worth});
  Team all{work, units};
  if (wanted > 1 && parallel != nullptr) {
    parallel(Team::join, &all, static_cast<unsigned>(threads), 0);  // GNU's library ends threads that a team leaves out
  } else {
    std::vector<std::thread> others;
    try {
      for (int64_t other = 1; other < wanted; other++) others.emplace_back(Team::join, &all);
    } catch (const std::system_error &) {  // no more threads are to be had: those that there are do it all
    }
    Team::join(&all);
    for (auto &other : others) other.join();
  }
  return 0;
#else
  return 1;
#endif
}
