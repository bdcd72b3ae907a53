// Selections of random rows by the kernels' device functions on a CPU, compared with a stable sort: selections SEED ROWS
#include <cmath>
#include <numeric>
#include <random>

#include "emulator.h"

#include "decode_select.cuh"
#include "rerank.cuh"

namespace {

std::mt19937 rng;

int any_of(std::initializer_list<int> values) { return values.begin()[rng() % values.size()]; }

enum Kind { NORMAL, ZEROS, TIES, RELU, MOSTLY_ZERO, NEGATIVE, EQUAL, FORCED, RISING, FALLING, SPIKE, TAILS, KINDS };

float score_of(int kind, int i, int length) {
  const float x = std::normal_distribution<float>()(rng);
  switch (kind) {
    case ZEROS: return i % 2 ? -0.f : 0.f;
    case TIES: return std::round(x * any_of({1, 8}));
    case RELU: return std::max(x - 1.2f, 0.f);
    case MOSTLY_ZERO: return rng() % 10 < 7 ? 0.f : x;
    case NEGATIVE: return -std::fabs(x);
    case EQUAL: return 1.5f;
    case FORCED: return i < 100 || i >= length - 50 ? INFINITY : x;
    case RISING: return (float)i;
    case FALLING: return (float)-i;
    case SPIKE: return i == length / 2 ? 1e30f : x * 1e-20f;
    case TAILS: return x * x * x * 1e3f;
    default: return x;
  }
}

// The positions of the k best of `scores`, ascending; of equal scores the lower position is better.
std::vector<int> best(const std::vector<float>& scores, int length, int k) {
  std::vector<int> order(length);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return scores[a] > scores[b]; });
  order.resize(k);
  std::sort(order.begin(), order.end());
  return order;
}

struct Row {
  int kind = rng() % KINDS, length, form = rng() % 3, offset = form == 2 ? 777 : 0;
  std::vector<float> scores;
  std::vector<int> pages;

  explicit Row(int length) : length(length), scores((length + 3) / 4 * 4 + 4, 1e38f), pages(length / 64 + 1) {
    for (int i = 0; i < length; ++i) scores[i] = score_of(kind, i, length);
    for (int& page : pages) page = rng() % 100000;
  }

  int output(int position) const { return misa::output_index(position, form, pages.data(), offset); }
};

bool same(const char* what, const Row& row, int k, std::vector<int> expected, const std::vector<int>& out) {
  for (int& position : expected) position = row.output(position);
  if (expected == out) return true;
  const int at = std::mismatch(expected.begin(), expected.end(), out.begin()).first - expected.begin();
  std::printf("%s: kind %d, length %d, k %d, form %d: entry %d is %d, not %d\n", what, row.kind, row.length, k, row.form, at,
              out[at], expected[at]);
  return false;
}

struct Shared {
  alignas(16) uint2 list[misa::kCandidates];
  alignas(16) int bins[2 * misa::kBins];
  alignas(16) int scratch[64];
};

template <int RANKS>
bool decode_select() {
  const Row row(any_of({2049, 2303, 4097, 8191, 8192, 8193, 16385, 20003, 65537, 131071, 131072, 140001}));
  int k = any_of({64, 2048, 2048, 8192});
  if (k >= row.length) k = 64;
  std::vector<Shared> shared(RANKS);
  std::memset((void*)shared.data(), 0xa5, RANKS * sizeof(Shared));
  misa::shared = (char*)shared.data();
  misa::shared_size = sizeof(Shared);
  std::vector<int> out(k, -7);
  emulator::run(RANKS, misa::kThreads, [&](int rank) {
    Shared& mine = shared[rank];
    misa::select_row<RANKS>(row.scores.data(), row.length, k, rank, row.form, row.pages.data(), row.offset, mine.list, mine.bins,
                            mine.scratch, out.data());
  });
  return same("decode_select", row, k, best(row.scores, row.length, k), out);
}

bool rerank() {
  constexpr int kThreads = 256;
  const Row row(any_of({1, 33, 257, 2047, 2049, 5000, 8192}));
  const int k = std::min(row.length, any_of({64, 2048}));
  std::vector<int> list(row.length), out(k, -7);
  std::iota(list.begin(), list.end(), 0);
  std::vector<unsigned> keys(row.length);
  for (int i = 0; i < row.length; ++i) keys[i] = misa::ordered(row.scores[i]);
  alignas(16) int bins[misa::kBins], scratch[64];
  emulator::run(1, kThreads, [&](int) {
    misa::select_listed<kThreads>(list.data(), keys.data(), row.length, k, bins, scratch, row.form, row.pages.data(), row.offset,
                                  out.data());
  });
  return same("rerank", row, k, best(row.scores, row.length, k), out);
}

}  // namespace

int main(int argc, char** argv) {
  rng.seed(std::atoi(argv[1]));
  const int rows = std::atoi(argv[2]);
  int passed = 0;
  for (int i = 0; i < rows; ++i) {
    passed += decode_select<1>() + decode_select<2>() + decode_select<4>() + decode_select<8>() + rerank();
  }
  std::printf("%d of %d selections are right\n", passed, rows * 5);
  return passed != rows * 5;
}
