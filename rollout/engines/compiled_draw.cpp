// The next token of every row: the inverse of the distribution function of softmax(logits / temperature), and the
// logarithm of its probability. What sampling.py computes without filters, by two looks at the logits of a row.
//
//   largest     of the row
//   sums        of e^(x - largest), for each block of ids: float within it, double from block to block
//   the block   in which the sum so far exceeds random * total, and in it the id
//
// What is drawn in a row depends on nothing else: neither on the other rows nor on the number of threads.
//
// Legend: B rows, N ids, W lanes of a vector.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include <omp.h>

#include "vectors.h"

namespace {

constexpr int64_t BLOCK = 256;       // ids
constexpr int64_t SMALL = 64 << 10;  // logits that are not worth a second thread

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
    V s = {};
    for (int64_t i = block * BLOCK; i < N && i < (block + 1) * BLOCK; i += W) s += exponentials(i);
    double total = 0;
    for (int i = 0; i < W; i++) total += s[i];
    return total;
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

void draw_row(const Row& row, double random, double* sums, int64_t* token, float* logprob) {
  const int64_t blocks = up(row.N, BLOCK) / BLOCK;
  double total = 0;
  for (int64_t b = 0; b < blocks; b++) total += sums[b] = row.sum_of(b);
  const double target = random * total;
  double before = 0;
  int64_t block = 0;
  while (block + 1 < blocks && !(before + sums[block] > target)) before += sums[block++];  // the last: no number at all
  const int64_t found = row.within(block, before, target);
  *token = found < 0 ? row.N - 1 : found;
  *logprob = float(double(row.logits[*token] / row.temperature) - row.largest - std::log(total));
}

}  // namespace

extern "C" {

// logits [B, N], random [B] in [0, 1) -> token, logprob [B]. Logits that are no numbers give the last id, and NaN.
void draw(const float* logits, int64_t B, int64_t N, const double* random, float temperature, int64_t* token,
          float* logprob, int64_t threads) {
#pragma omp parallel num_threads(B * N < SMALL ? 1 : threads)
  {
    std::unique_ptr<double[]> sums(new double[up(N, BLOCK) / BLOCK]);
#pragma omp for
    for (int64_t r = 0; r < B; r++)
      draw_row(Row(logits + r * N, N, temperature), random[r], sums.get(), token + r, logprob + r);
  }
}

}  // extern "C"
