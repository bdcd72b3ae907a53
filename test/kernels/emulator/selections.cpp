// Selections of random rows by the kernels' device functions on a CPU, compared with a stable sort: selections SEED ROWS
#include <cmath>
#include <numeric>
#include <random>

#include "emulator.h"

#include "decode_select.cuh"
#include "rerank.cuh"
#include "select.cuh"
#include "threshold.cuh"

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

// What `score` leaves of a score, as `mark_page` does: plane 0, plane 1.
std::pair<bool, bool> marks(float score, const float* threshold) {
  const bool high = score > threshold[0], middle = score > threshold[1], low = score >= threshold[2];
  return {middle, high ^ middle ^ low};
}

// `threshold`, then `select` with the scores looked up instead of computed. misled: 1 and 2 are thresholds that bracket nothing.
bool prefill_select() {
  constexpr int kThreads = 256, kCapacity = 512;
  const Row row(any_of({2049, 2303, 4097, 8192, 20003, 65537}));
  const int length = row.length, k = any_of({64, 2048}), shift = any_of({3, 4}), misled = rng() % 6;
  std::vector<float> samples;
  for (int i = 0; misa::sample_position(i, shift) < length; ++i) samples.push_back(row.scores[misa::sample_position(i, shift)]);
  alignas(16) int bins[misa::kBins], scratch[64];
  float threshold[3];
  emulator::run(1, kThreads, [&](int) {
    misa::thresholds<kThreads>(samples.data(), length, k, shift, any_of({3, 5}), bins, scratch, threshold);
  });
  if (misled == 1) threshold[0] = threshold[1] = threshold[2] = -1e30f;
  if (misled == 2) threshold[0] = threshold[1] = threshold[2] = 1e31f;

  const int words = (length + misa::kSpan - 1) / misa::kSpan * 32;
  std::vector<unsigned> planes[2] = {std::vector<unsigned>(words), std::vector<unsigned>(words)};
  for (int word = 0; word < words; ++word) {
    for (int bit = 0; bit < 32; ++bit) {
      const int position = misa::plane_position(word, bit);
      if (position >= length) continue;
      const auto [first, second] = marks(row.scores[position], threshold);
      planes[0][word] |= (unsigned)first << bit;
      planes[1][word] |= (unsigned)second << bit;
    }
  }
  std::vector<int> out(k, -7), positions(kCapacity);
  std::vector<unsigned> entries(kCapacity);
  int info[4], count = 0;
  alignas(8) int state[8];
  emulator::run(1, kThreads, [&](int) {
    misa::classify<kThreads>(planes[0].data(), planes[1].data(), words, length, k, threshold, scratch, info);
    const int plane = info[3] == 2;
    unsigned *const above = planes[plane].data(), *const within = planes[1 - plane].data();
    const int chunk = info[0] > kCapacity ? kCapacity / 32 : words;
    misa::radix_begin_between(state, info[1], info[3], threshold);
    __syncthreads();
    for (int digit = 0; digit <= misa::kDigits && info[2] == 0 && info[1] > 0; ++digit) {
      if (digit < misa::kDigits && misa::radix_state(state)->done) continue;
      if (digit < misa::kDigits) misa::clear_bins<kThreads>(bins);
      for (int first = 0; first < words; first += chunk) {
        __syncthreads();
        if (threadIdx.x == 0) count = 0;
        __syncthreads();
        misa::collect<kThreads>(above, within, first, min(first + chunk, words), row.pages.data(), positions.data(), entries.data(),
                                &count);
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += kThreads) {
          misa::radix_visit(state, digit, misa::ordered(row.scores[positions[i]]), positions[i], bins, above);
        }
      }
      if (digit < misa::kDigits) misa::radix_advance<kThreads>(state, bins, scratch);
    }
    __syncthreads();
    misa::emit<kThreads>(above, within, words, plane == 1, info[2] == 0 ? 0 : info[1], row.form, row.pages.data(), row.offset,
                         scratch, out.data());
  });
  // Nothing but time is lost without a bracket, but well-behaved scores have a narrow one.
  if (row.kind == NORMAL && misled > 2 && (info[3] == 0 || info[0] > 3072)) {
    std::printf("thresholds: length %d, k %d: %d candidates, case %d\n", length, k, info[0], info[3]);
    return false;
  }
  return same("prefill_select", row, k, best(row.scores, length, k), out);
}

}  // namespace

int main(int argc, char** argv) {
  rng.seed(std::atoi(argv[1]));
  const int rows = std::atoi(argv[2]);
  int passed = 0;
  for (int i = 0; i < rows; ++i) {
    passed += decode_select<1>() + decode_select<2>() + decode_select<4>() + decode_select<8>() + rerank() + prefill_select();
  }
  std::printf("%d of %d selections are right\n", passed, rows * 6);
  return passed != rows * 6;
}
