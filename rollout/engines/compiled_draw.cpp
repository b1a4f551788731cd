// The next token of every row: the inverse of the distribution function of softmax(logits / temperature), over all ids
// or over those that filters leave, and the logarithm of its probability. What sampling.py computes, by a few looks at
// the logits of a row.
//
//   largest     of the row
//   sums        of e^(x - largest), for each block of ids: numbers of float, added up in double
//   the block   in which the sum so far exceeds random * total, and in it the id
//
// With filters the ids that are left are found first, without sorting a row: only the largest are looked at, as many
// as it takes, and the sums are of these ids alone.
//
// What is drawn in a row depends on nothing else: neither on the other rows nor on the number of threads.
//
// Legend: B rows, N ids, W lanes of a vector.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include <omp.h>

#include "vectors.h"

namespace {

constexpr int64_t BLOCK = 256;       // ids
constexpr int64_t SMALL = 64 << 10;  // logits that are not worth a second thread

typedef double D __attribute__((vector_size(8 * W)));

inline D wide(V v) { return __builtin_convertvector(v, D); }

inline double sum(const D& v) {
  double total = 0;
  for (int i = 0; i < W; i++) total += v[i];
  return total;
}

struct Row {
  const float* logits;
  int64_t N;
  float temperature, largest;

  Row(const float* logits, int64_t N, float temperature) : logits(logits), N(N), temperature(temperature) {
    V most = all(-INFINITY);
    for (int64_t i = 0; i < N; i += W) {
      const V x = at(i);
      most = x > most ? x : most;
    }
    largest = most[0];
    for (int i = 1; i < W; i++) largest = most[i] > largest ? most[i] : largest;
  }

  // Logits from `i` on, over the temperature; -inf behind the last.
  V at(int64_t i) const {
    if (i + W <= N) return load(logits + i) / temperature;
    V x = all(-INFINITY);
    memcpy(&x, logits + i, 4 * (N - i));
    return x / temperature;
  }

  V exponentials(int64_t i) const { return exponential(at(i) - largest); }

  double sum_of(int64_t block) const {
    D s = {};
    for (int64_t i = block * BLOCK; i < N && i < (block + 1) * BLOCK; i += W) s += wide(exponentials(i));
    return sum(s);
  }

  // The first id of a block with which a sum that was `before` exceeds `target`. Rounding may leave none: then the last
  // that has a probability, and -1 where there is no number.
  int64_t within(int64_t block, double before, double target) const {
    int64_t last = -1;
    for (int64_t i = block * BLOCK; i < N && i < (block + 1) * BLOCK; i += W) {
      const V e = exponentials(i);
      for (int64_t lane = 0; lane < W && i + lane < N; lane++) {
        before += e[lane];
        if (e[lane] > 0) last = i + lane;
        if (before > target) return last;
      }
    }
    return last;
  }
};

struct Drawn {
  int64_t* token;
  float* logprob;

  // `found` is -1 where there is no number: then the last id is named, and its log-prob is none.
  void put(const Row& row, int64_t found, double total) {
    *token = found < 0 ? row.N - 1 : found;
    *logprob = found < 0 ? NAN : float(double(row.logits[*token] / row.temperature) - row.largest - std::log(total));
  }
};

void draw_of_all(const Row& row, double random, std::vector<double>& sums, Drawn drawn) {
  const int64_t blocks = up(row.N, BLOCK) / BLOCK;
  sums.resize(blocks);
  double total = 0;
  for (int64_t b = 0; b < blocks; b++) total += sums[b] = row.sum_of(b);
  const double target = random * total;
  double before = 0;
  int64_t block = 0;
  while (block + 1 < blocks && !(before + sums[block] > target)) before += sums[block++];  // the last: no number at all
  drawn.put(row, row.within(block, before, target), total);
}

// ------------------------------------------------------------------------------------------------------------- filters

struct Filters {
  int64_t top_k;  // 0: off
  double top_p, min_p;  // 1 and 0: off
};

// One row that is filtered. The memory is kept from row to row.
class Filtered {
 public:
  // The ids that are left, ascending, into `ids`; how many. None of a row in which something is no number.
  int64_t left(const Row& row, const Filters& filters, int32_t* ids) {
    N = row.N;
    x.resize(up(N, W)), e.resize(up(N, W));
    V checked = {};
    for (int64_t i = 0; i < N; i += W) {
      const V heated = row.at(i);
      store(&x[i], heated), store(&e[i], exponential(heated - row.largest));  // behind the last: -inf and 0
      checked += load(&e[i]);
    }
    if (const float seen = sum(checked); seen != seen) return 0;
    const float top = filters.top_k > 0 && filters.top_k < N ? the(filters.top_k) : -INFINITY;
    const Candidate edge = filters.top_p < 1 ? edge_of(top, filters.top_p) : Candidate(-1.f, 0);
    const float near = filters.min_p > 0 ? float(row.largest + std::log(filters.min_p)) : -INFINITY;
    const float least = std::max(top, near);
    int64_t n = 0;
    for (int64_t i = 0; i < N; i++)
      if (x[i] >= least && x[i] > -INFINITY && Candidate(e[i], i) >= edge) ids[n++] = i;
    return n;
  }

  void draw(const Row& row, double random, const int32_t* ids, int64_t n, Drawn drawn) const {
    double total = 0, sum = 0;
    for (int64_t i = 0; i < n; i++) total += e[ids[i]];
    const double target = random * total;
    int64_t found = -1;
    for (int64_t i = 0; i < n && !(sum > target); i++) {
      sum += e[ids[i]];
      if (e[ids[i]] > 0) found = ids[i];
    }
    drawn.put(row, found, total);
  }

 private:
  typedef std::pair<float, int32_t> Candidate;  // e^(x - largest) and its id: of equal ones the higher id comes first

  // Cuts of e, one below the other, until enough is above; 0 leaves nothing out.
  template <class F>
  static float cut_with(F enough) {
    for (int below : {2, 4, 8, 12, 16, 24, 40, 80})
      if (const float cut = std::ldexp(1.f, -below); enough(cut)) return cut;
    return 0;
  }

  // The k-th largest logit.
  float the(int64_t k) {
    const float cut = cut_with([&](float c) {
      int64_t above = 0;
      for (int64_t i = 0; i < N; i++) above += e[i] >= c;
      return above >= k;
    });
    some.clear();
    for (int64_t i = 0; i < N; i++)
      if (e[i] >= cut) some.push_back(x[i]);
    if (int64_t(some.size()) < k) return -INFINITY;  // what is no number is in no order
    std::nth_element(some.begin(), some.begin() + (k - 1), some.end(), std::greater<float>());
    return some[k - 1];
  }

  // Of ids whose logit is `least` or more: what their e sum up to from `cut` on.
  double sum_from(float least, float cut) const {
    D s = {};
    for (int64_t i = 0; i < N; i += W) {
      const V of = load(&e[i]);
      s += wide(load(&x[i]) >= all(least) && of >= all(cut) ? of : V{});
    }
    return sum(s);
  }

  // The last that stays of the fewest, by size, that reach `top_p` of the sum.
  Candidate edge_of(float least, double top_p) {
    const double wanted = top_p * sum_from(least, 0);
    const float cut = cut_with([&](float c) { return sum_from(least, c) >= wanted; });
    largest.clear();
    for (int64_t i = 0; i < N; i++)
      if (e[i] >= cut && x[i] >= least) largest.emplace_back(e[i], i);
    double before = 0;  // the sum of those before `first`, which misses it; that of those before `end` reaches it
    auto first = largest.begin(), end = largest.end();
    while (end - first > 1) {
      const auto middle = first + (end - first) / 2;
      std::nth_element(first, middle, end, std::greater<Candidate>());
      double sum = before;
      for (auto it = first; it < middle; it++) sum += it->first;
      if (sum >= wanted) end = middle;
      else first = middle, before = sum;
    }
    return *first;
  }

  int64_t N = 0;
  std::vector<float> x, e, some;  // [N] logits over the temperature, and e^(x - largest)
  std::vector<Candidate> largest;
};

}  // namespace

extern "C" {

// logits [B, N], random [B] in [0, 1) -> token, logprob [B]. With `ids` [B, N] what filters leave is drawn from, and
// those ids are the first `n_ids` [B] of each row there. Logits that are no numbers give the last id, and NaN.
void draw(const float* logits, int64_t B, int64_t N, const double* random, float temperature, int64_t* token,
          float* logprob, int64_t top_k, double top_p, double min_p, int32_t* ids, int64_t* n_ids, int64_t threads) {
#pragma omp parallel num_threads(B * N < SMALL ? 1 : threads)
  {
    std::vector<double> sums;
    Filtered filtered;
#pragma omp for schedule(dynamic)
    for (int64_t r = 0; r < B; r++) {
      const Row row(logits + r * N, N, temperature);
      const Drawn drawn{token + r, logprob + r};
      if (!ids) {
        draw_of_all(row, random[r], sums, drawn);
        continue;
      }
      n_ids[r] = filtered.left(row, {top_k, top_p, min_p}, ids + r * N);
      filtered.draw(row, random[r], ids + r * N, n_ids[r], drawn);
    }
  }
}

}  // extern "C"
