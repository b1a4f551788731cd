// One more token of every slot through a decoder of Llama's shape, on a CPU in float32: what decoder.py computes, in
// one call. compiler.py compiles it, compiled.py calls it and says what fits.
//
//   rows       x = embedding[token]
//   per layer  rows: norm | panels: q, k, v | rows: rotate, keep k and v, attend | panels: + out
//              rows: norm | panels: silu(gate) up | panels: + down
//   rows       norm -> states;   panels: head -> logits
//
// All threads do each of these before any does the next. A product takes its weights in panels of 2 W outputs, input
// after input, so that they are read in the order of memory, each for a block of rows that stays in registers, and the
// next panel is fetched meanwhile. Each number of a row is added up in an order that depends on nothing else: neither
// on the other rows nor on the number of threads.
//
// Legend: B rows (slots in use), H hidden size, D head width, L tokens of a row so far, W lanes of a vector.

#include <stdlib.h>
#include <sys/mman.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#include <omp.h>

#include "vectors.h"

namespace {

constexpr int ROWS = W == 16 ? 12 : 6;  // of a block: 24 sums, two weights and an input are 27 of 32 registers
constexpr int PANEL = 2 * W;
constexpr int LINE = 16, STRIDE = 8, PART = 256;  // floats of a cache line, inputs between fetches, and of one sum

// ------------------------------------------------------------------------------------------------------- what is asked

struct Layer {
  const float *norm, *qkv, *qkv_bias, *q_norm, *k_norm, *out, *out_bias;
  const float *mlp_norm, *gate_up, *gate_up_bias, *down, *down_bias;
  float *keys, *values;  // [slots, kv_heads, room, D]
};

struct Model {
  int64_t layers, hidden, heads, kv_heads, width, inner, vocabulary, room;
  float epsilon, scale;
  const float *embedding, *cos, *sin, *norm, *head, *head_bias;  // cos and sin [room, D]
  const Layer* layer;
};

// ------------------------------------------------------------------------------------------------------------- threads

// All threads of a step meet here. OpenMP's own: it waits as OMP_WAIT_POLICY says. One that spins on a machine whose
// cores are shared waits for a thread that has none, 17 times as long as the step takes.
inline void all_here() {
#pragma omp barrier
}

// ------------------------------------------------------------------------------------------------------------ products

// R rows of x times a panel of K inputs. `lines` lines of what comes next, from `ahead` on, are fetched every STRIDE
// inputs.
template <int R, class F>
inline void block(const float* __restrict x, int64_t ld, const float* __restrict w, int64_t K, const float* ahead,
                  int lines, F finish) {
  V sums[R][2] = {};
  auto add = [&](int64_t k) __attribute__((always_inline)) {
    const V first = load(w + k * PANEL), second = load(w + k * PANEL + W);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const V input = all(x[r * ld + k]);
      sums[r][0] += input * first;
      sums[r][1] += input * second;
    }
  };
  auto part = [&](int64_t k, int64_t end) __attribute__((always_inline)) {
    for (; k + STRIDE <= end; k += STRIDE) {
      for (int i = 0; i < lines; i++, ahead += LINE) __builtin_prefetch(ahead, 0, 2);
      for (int i = 0; i < STRIDE; i++) add(k + i);
    }
    for (; k < end; k++) add(k);
  };
  part(0, K < PART ? K : PART);
  if (K > PART) {  // sums of parts, added up: less is lost to rounding
    V total[R][2];
    memcpy(total, sums, sizeof(sums));
    for (int64_t k = PART; k < K; k += PART) {
      memset(sums, 0, sizeof(sums));
      part(k, k + PART < K ? k + PART : K);
      for (int r = 0; r < R; r++) total[r][0] += sums[r][0], total[r][1] += sums[r][1];
    }
    memcpy(sums, total, sizeof(sums));
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) finish(r, sums[r][0], sums[r][1]);
}

template <int R, class F>
void block_of(int rows, const float* x, int64_t ld, const float* w, int64_t K, const float* ahead, int lines,
              F finish) {
  if constexpr (R > 0) {
    if (rows == R) block<R>(x, ld, w, K, ahead, lines, finish);
    else block_of<R - 1>(rows, x, ld, w, K, ahead, lines, finish);
  }
}

// The share of thread `me` of x [B, K] times N outputs: finish(row, panel, first W outputs, second W outputs).
template <class F>
void product(int64_t B, const float* x, int64_t ld, int64_t K, const float* w, int64_t N, int me, int n, F finish) {
  const int64_t panels = up(N, PANEL) / PANEL, blocks = up(B, ROWS) / ROWS, size = K * PANEL;
  const int lines = (STRIDE * PANEL / LINE + blocks - 1) / blocks;  // all blocks together fetch one panel
  for (int64_t i = panels * blocks * me / n; i < panels * blocks * (me + 1) / n; i++) {
    const int64_t panel = i / blocks, part = i % blocks, first = B * part / blocks, last = B * (part + 1) / blocks;
    const float* ahead = w + (panel + 1) * size + part * lines * (K / STRIDE) * LINE;
    block_of<ROWS>(last - first, x + first * ld, ld, w + panel * size, K, ahead, panel + 1 < panels ? lines : 0,
                   [&](int r, V a, V b) { finish(first + r, panel, a, b); });
  }
}

// Into y [B, N], or on top of what is there.
template <bool ADD>
inline void put(float* y, int64_t N, int64_t row, int64_t panel, V a, V b, const float* bias) {
  float* to = y + row * N + panel * PANEL;
  const int64_t left = N - panel * PANEL;
  if (bias) a += load(bias + panel * PANEL), b += load(bias + panel * PANEL + W);
  if (left >= PANEL) {
    if (ADD) a += load(to), b += load(to + W);
    store(to, a), store(to + W, b);
    return;
  }
  float part[PANEL];
  store(part, a), store(part + W, b);
  for (int64_t i = 0; i < left; i++) to[i] = ADD ? to[i] + part[i] : part[i];
}

// ---------------------------------------------------------------------------------------------------------------- rows

void normed(const float* x, const float* weight, float* y, int64_t n, float epsilon) {
  V squares = {};
  float rest = 0;
  int64_t i = 0;
  for (; i + W <= n; i += W) squares += load(x + i) * load(x + i);
  for (; i < n; i++) rest += x[i] * x[i];
  const float by = 1.f / sqrtf((sum(squares) + rest) / n + epsilon);
  for (i = 0; i + W <= n; i += W) store(y + i, load(x + i) * by * load(weight + i));
  for (; i < n; i++) y[i] = x[i] * by * weight[i];
}

void rotate(float* x, const float* cos, const float* sin, int64_t D) {
  const int64_t half = D / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

// Lanes of x and y by turns in parts of N, each the sum of two parts of its own.
template <int N>
inline V folded(V x, V y) {
  I low, high;
  for (int i = 0; i < W; i++) {
    const int part = i / N;
    low[i] = part / 2 * 2 * N + i % N + (part % 2 ? W : 0);
    high[i] = low[i] + N;
  }
  return __builtin_shuffle(x, y, low) + __builtin_shuffle(x, y, high);
}

// Lane t of s[0] becomes the sum of s[t].
template <int N>
inline void add_up(V* s) {
  for (int t = 0; t < N; t++) s[t] = folded<N>(s[t], s[t + N]);
  if constexpr (N > 1) add_up<N / 2>(s);
}

inline void fetch(const float* p, int64_t n) {
  for (int64_t i = 0; i < n; i += LINE) __builtin_prefetch(p + i, 0, 2);
}

// q K^T, W tokens at a time; scores [up(L, W)], -inf behind the end. Returns the largest.
float score(const float* q, const float* keys, const float* values, int64_t L, int64_t D, float scale, float* scores) {
  V most = all(-INFINITY);
  for (int64_t at = 0; at < L; at += W) {
    const float* key = keys + at * D;
    const int64_t n = L - at < W ? L - at : W;
    fetch(values + at * D, n * D);
    V s[W] = {};
    if (n == W && D % W == 0) {
      for (int64_t i = 0; i < D; i += W) {
        const V x = load(q + i);
#pragma GCC unroll 16
        for (int t = 0; t < W; t++) s[t] += x * load(key + t * D + i);
      }
    } else {
      for (int t = 0; t < n; t++) {
        int64_t i = 0;
        for (; i + W <= D; i += W) s[t] += load(q + i) * load(key + t * D + i);
        for (; i < D; i++) s[t][0] += q[i] * key[t * D + i];
      }
    }
    add_up<W / 2>(s);
    V found = s[0] * scale;
    for (int64_t t = n; t < W; t++) found[t] = -INFINITY;
    store(scores + at, found);
    most = found > most ? found : most;
  }
  float largest = most[0];
  for (int i = 1; i < W; i++) largest = most[i] > largest ? most[i] : largest;
  return largest;
}

// The mean of values [L, D] by weights, into out [D]. `next` is fetched meanwhile.
void weigh(const float* weights, float by, const float* values, int64_t L, int64_t D, float* out, const float* next) {
  int64_t i = 0;
  auto columns = [&](auto width) __attribute__((always_inline)) {
    constexpr int C = decltype(width)::value;
    for (; i + C * W <= D; i += C * W) {
      V even[C] = {}, odd[C] = {};  // two sums: one would wait for itself
      int64_t t = 0;
      for (; t + 2 <= L; t += 2) {
        if (i == 0) fetch(next + t * D, 2 * D);
        const float* value = values + t * D + i;
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
          even[c] += weights[t] * load(value + c * W);
          odd[c] += weights[t + 1] * load(value + D + c * W);
        }
      }
      if (t < L)
        for (int c = 0; c < C; c++) even[c] += weights[t] * load(values + t * D + i + c * W);
      for (int c = 0; c < C; c++) store(out + i + c * W, (even[c] + odd[c]) * by);
    }
  };
  columns(std::integral_constant<int, 4>{});
  columns(std::integral_constant<int, 2>{});
  columns(std::integral_constant<int, 1>{});
  for (; i < D; i++) {
    float s = 0;
    for (int64_t t = 0; t < L; t++) s += weights[t] * values[t * D + i];
    out[i] = s * by;
  }
}

// Query heads of one key-value head of one row; qkv and out are those of the row.
void attend(const Model& m, const Layer& layer, int64_t row, int64_t group, int64_t place, float* qkv, float* out,
            float* scores) {
  const int64_t D = m.width, each = m.heads / m.kv_heads, L = place + 1;
  const float *cos = m.cos + place * D, *sin = m.sin + place * D;
  float *query = qkv + group * each * D, *key = qkv + (m.heads + group) * D, *value = key + m.kv_heads * D;
  float *keys = layer.keys + (row * m.kv_heads + group) * m.room * D;
  float *values = layer.values + (row * m.kv_heads + group) * m.room * D;
  if (layer.k_norm) normed(key, layer.k_norm, key, D, m.epsilon);
  rotate(key, cos, sin, D);
  memcpy(keys + place * D, key, 4 * D);
  memcpy(values + place * D, value, 4 * D);
  for (int64_t e = 0; e < each; e++) {
    float* q = query + e * D;
    if (layer.q_norm) normed(q, layer.q_norm, q, D, m.epsilon);
    rotate(q, cos, sin, D);
    const V largest = all(score(q, keys, values, L, D, m.scale, scores));
    V total = {};
    for (int64_t t = 0; t < L; t += W) {
      const V p = exponential(load(scores + t) - largest);
      store(scores + t, p);
      total += p;
    }
    const bool again = group + 1 == m.kv_heads || e + 1 < each;  // these keys, or the next ones
    weigh(scores, 1.f / sum(total), values, L, D, out + (group * each + e) * D, again ? keys : keys + m.room * D);
  }
}

struct Work {  // [B, ...] each; scores [threads, up(room, W)]
  float *x, *y, *qkv, *attended, *inner, *scores;
  int64_t q, a, n;  // widths of qkv, attended and inner

  Work(const Model& m, int64_t B, float* at) {
    q = (m.heads + 2 * m.kv_heads) * m.width, a = m.heads * m.width, n = up(m.inner, W);
    x = at, y = x + B * m.hidden, qkv = y + B * m.hidden, attended = qkv + B * q, inner = attended + B * a;
    scores = inner + B * n;
  }
  static int64_t floats(const Model& m, int64_t B, int64_t threads) {
    const Work w(m, B, nullptr);
    return B * (2 * m.hidden + w.q + w.a + w.n) + threads * up(m.room, W);
  }
};

void step_of_thread(const Model& m, int64_t B, const int64_t* token, const int64_t* place, const Work& w, float* states,
                    float* logits, std::atomic<int64_t>* next, int me, int n) {
  const int64_t H = m.hidden, first = B * me / n, last = B * (me + 1) / n;
  for (int64_t r = first; r < last; r++) memcpy(w.x + r * H, m.embedding + token[r] * H, 4 * H);
  for (int64_t number = 0; number < m.layers; number++) {
    const Layer& layer = m.layer[number];
    for (int64_t r = first; r < last; r++) normed(w.x + r * H, layer.norm, w.y + r * H, H, m.epsilon);
    all_here();
    product(B, w.y, H, H, layer.qkv, w.q, me, n,
            [&](int64_t r, int64_t j, V a, V b) { put<false>(w.qkv, w.q, r, j, a, b, layer.qkv_bias); });
    all_here();
    for (int64_t i; (i = next[number].fetch_add(1, std::memory_order_relaxed)) < B * m.kv_heads;) {
      const int64_t r = i / m.kv_heads;  // rows are of different lengths: whoever is free takes the next
      float* scores = w.scores + me * up(m.room, W);
      attend(m, layer, r, i % m.kv_heads, place[r], w.qkv + r * w.q, w.attended + r * w.a, scores);
    }
    all_here();
    product(B, w.attended, w.a, w.a, layer.out, H, me, n,
            [&](int64_t r, int64_t j, V a, V b) { put<true>(w.x, H, r, j, a, b, layer.out_bias); });
    all_here();
    for (int64_t r = first; r < last; r++) normed(w.x + r * H, layer.mlp_norm, w.y + r * H, H, m.epsilon);
    all_here();
    product(B, w.y, H, H, layer.gate_up, 2 * w.n, me, n, [&](int64_t r, int64_t j, V gate, V up) {
      const float* bias = layer.gate_up_bias;
      if (bias) gate += load(bias + j * PANEL), up += load(bias + j * PANEL + W);
      store(w.inner + r * w.n + j * W, gate / (1.f + exponential(-gate)) * up);
    });
    all_here();
    product(B, w.inner, w.n, m.inner, layer.down, H, me, n,
            [&](int64_t r, int64_t j, V a, V b) { put<true>(w.x, H, r, j, a, b, layer.down_bias); });
    all_here();
  }
  for (int64_t r = first; r < last; r++) normed(w.x + r * H, m.norm, states + r * H, H, m.epsilon);
  all_here();
  product(B, states, H, H, m.head, m.vocabulary, me, n,
          [&](int64_t r, int64_t j, V a, V b) { put<false>(logits, m.vocabulary, r, j, a, b, m.head_bias); });
}

}  // namespace

extern "C" {

int64_t lanes() { return W; }

// Room for `n` floats in large pages, which weights of megabytes are read faster from; null: there is no memory.
float* room_for(int64_t n) {
  const int64_t page = 2 << 20, bytes = up(4 * n, page);
  void* p = aligned_alloc(page, bytes);
#if defined(MADV_HUGEPAGE)
  if (p) madvise(p, bytes, MADV_HUGEPAGE);  // a wish: without it all works, slower
#endif
  return (float*)p;
}

void give_back(float* p) { free(p); }

// Columns [first, first + W) of each panel of 2 W from rows of w [N, K], W at a time; zeros behind the last row. With
// `first` = -1 a panel has 2 W rows.
void pack(const float* w, int64_t N, int64_t K, int64_t first, float* panels, int64_t threads) {
  const int64_t rows = first < 0 ? PANEL : W, at = first < 0 ? 0 : first;
#pragma omp parallel for num_threads(threads)
  for (int64_t j = 0; j < up(N, rows) / rows; j++)
    for (int64_t k0 = 0; k0 < K; k0 += LINE)
      for (int64_t c = 0; c < rows; c++)
        for (int64_t k = k0; k < K && k < k0 + LINE; k++)
          panels[(j * K + k) * PANEL + at + c] = j * rows + c < N ? w[(j * rows + c) * K + k] : 0.f;
}

int64_t work_floats(const Model* m, int64_t B, int64_t threads) { return Work::floats(*m, B, threads); }

// token, place [B] -> states [B, H] (what the head reads), logits [B, V]. Not 0: a token or a place that is none.
int64_t step(const Model* m, int64_t B, const int64_t* token, const int64_t* place, float* work, float* states,
             float* logits, int64_t threads) {
  for (int64_t r = 0; r < B; r++)
    if (token[r] < 0 || token[r] >= m->vocabulary || place[r] < 0 || place[r] >= m->room) return 1;
  if (B == 0) return 0;
  const Work w(*m, B, work);
  std::unique_ptr<std::atomic<int64_t>[]> next(new std::atomic<int64_t>[m->layers]);
  for (int64_t i = 0; i < m->layers; i++) next[i] = 0;
  if (threads == 1) {
    step_of_thread(*m, B, token, place, w, states, logits, next.get(), 0, 1);
    return 0;
  }
#pragma omp parallel num_threads(threads)  // it may be fewer
  step_of_thread(*m, B, token, place, w, states, logits, next.get(), omp_get_thread_num(), omp_get_num_threads());
  return 0;
}

}  // extern "C"
