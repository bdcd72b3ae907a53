// Selections of random rows by the kernels' device functions on a CPU, compared with a stable sort: selections SEED ROWS
#include <cmath>
#include <numeric>
#include <random>

#include "emulator.h"

#include "decode_select.cuh"
#include "rerank.cuh"
#include "route.cuh"
#include "score.cuh"
#include "select.cuh"
#include "threshold.cuh"

namespace {

std::mt19937 rng;

template <typename T>
T any_of(std::initializer_list<T> values) {
  return values.begin()[rng() % values.size()];
}

enum Kind {
  NORMAL,
  ZEROS,
  TIES,
  RELU,
  MOSTLY_ZERO,
  NEGATIVE,
  EQUAL,
  FORCED,
  RISING,
  FALLING,
  SPIKE,
  TAILS,
  RARE,
  STEPS,
  RUNS,
  SOME_NAN,
  MOSTLY_NAN,
  ALL_NAN,
  INFINITIES,
  ALL_INFINITE,
  ANY_BITS,
  KINDS
};

// Any NaN: of either sign, with any payload.
float any_nan() { return bits_of<float>((unsigned)rng() % 2 << 31 | 0x7f800000u | 1 + (unsigned)rng() % 0x7fffff); }

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
    case RARE: return std::max(x - 1.4f, 0.f);                                     // 92% are 0
    case RUNS: return (float)(i / 1024 * 2654435761u >> 8);                        // runs of 1024 equal scores
    case STEPS: return i % 1000 < 100 ? 2.f : i % 1000 < 500 ? -0.5f : x * 1e-3f;  // two plateaus, and scores between
    case SOME_NAN: return rng() % 100 == 0 ? any_nan() : x;
    case MOSTLY_NAN: return rng() % 100 == 0 ? x : any_nan();
    case ALL_NAN: return any_nan();
    case INFINITIES: return rng() % 8 < 5 ? any_of({INFINITY, -INFINITY, any_nan()}) : x;
    case ALL_INFINITE: return any_of({INFINITY, -INFINITY});
    case ANY_BITS: return bits_of<float>((unsigned)rng());
    default: return x;
  }
}

// The positions of the k best of `scores`, ascending; of equal scores the lower position is better. What is not a number is
// below all numbers, or above them, and equal among itself.
std::vector<int> best(const std::vector<float>& scores, int length, int k, bool nan_above = false) {
  std::vector<int> order(length);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    const bool a_nan = std::isnan(scores[a]), b_nan = std::isnan(scores[b]);
    if (a_nan || b_nan) return a_nan != b_nan && a_nan == nan_above;
    return scores[a] > scores[b];
  });
  order.resize(k);
  std::sort(order.begin(), order.end());
  return order;
}

int next_kind;  // the rows take turns

struct Row {
  int kind, length, form = rng() % 3, offset = form == 2 ? 777 : 0;
  std::vector<float> scores;
  std::vector<int> pages;

  explicit Row(int length, int fixed_kind = -1)
      : kind(fixed_kind < 0 ? next_kind++ % KINDS : fixed_kind),
        length(length),
        scores((length + 3) / 4 * 4 + 4, 1e38f),
        pages(length / 64 + 1) {
    for (int i = 0; i < length; ++i) scores[i] = score_of(kind, i, length);
    for (int& page : pages) page = rng() % 100000;
  }

  int output(int position) const { return misa::output_index(position, form, pages.data(), offset); }
};

// A place for k entries, and what must not be written behind it.
constexpr int kNotWritten = -7, kBehind = 64;
std::vector<int> output_of(int k) { return std::vector<int>(k + kBehind, kNotWritten); }

bool same(const char* what, const Row& row, int k, std::vector<int> expected, const std::vector<int>& out) {
  for (int& position : expected) position = row.output(position);
  expected.resize(k + kBehind, kNotWritten);
  if (expected == out) return true;
  const int at = std::mismatch(expected.begin(), expected.end(), out.begin()).first - expected.begin();
  std::printf("%s: kind %d, length %d, k %d, form %d: entry %d is %d, not %d\n", what, row.kind, row.length, k,
              row.form, at, out[at], expected[at]);
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
  std::vector<int> out = output_of(k);
  emulator::run(RANKS, misa::kThreads, [&](int rank) {
    Shared& mine = shared[rank];
    misa::select_row<RANKS>(row.scores.data(), row.length, k, rank, row.form, row.pages.data(), row.offset, mine.list,
                            mine.bins, mine.scratch, out.data());
  });
  return same("decode_select", row, k, best(row.scores, row.length, k), out);
}

bool rerank() {
  constexpr int kThreads = 256;
  const Row row(any_of({1, 33, 257, 2047, 2049, 5000, 8192}));
  const int k = std::min(row.length, any_of({64, 2048}));
  std::vector<int> list(row.length), out = output_of(k);
  std::iota(list.begin(), list.end(), 0);
  std::vector<unsigned> keys(row.length);
  for (int i = 0; i < row.length; ++i) keys[i] = misa::ordered(row.scores[i]);
  alignas(16) int bins[misa::kBins], scratch[64];
  emulator::run(1, kThreads, [&](int) {
    misa::select_listed<kThreads>(list.data(), keys.data(), row.length, k, bins, scratch, row.form, row.pages.data(),
                                  row.offset, out.data());
  });
  return same("rerank", row, k, best(row.scores, row.length, k), out);
}

// What `score` leaves of a score: plane 0, plane 1.
std::pair<bool, bool> marks(float score, const float* threshold) {
  const bool high = score > threshold[0], middle = score > threshold[1], low = score >= threshold[2];
  return {middle, high ^ middle ^ low};
}

// The words of both planes as a lane of `score` collects them.
std::pair<unsigned, unsigned> marks_of_word(const Row& row, int word, const float* threshold) {
  const float high = misa::as_threshold(threshold[0]), middle = misa::as_threshold(threshold[1]),
              below = misa::below_threshold(threshold[2]);
  const int first = word / 32 * misa::kSpan, pages = std::min((row.length - first + 63) / 64, 16);
  unsigned words[2] = {~0u, ~0u};  // whatever is left of a span before
  for (int page = 0; page < pages; ++page) {
    float score[2];
    for (int rr = 0; rr < 2; ++rr) {
      const int position = misa::plane_position(word, page * 2 + rr);
      score[rr] = position < row.length ? row.scores[position] : bits_of<float>(0x7fffffff);
    }
    misa::mark_page<1>(score, &high, &middle, &below, words);
  }
  return {misa::word_of_pages(words[0], pages), misa::word_of_pages(words[1], pages)};
}

// `threshold`, then `select` with the scores looked up instead of computed. misled: 1 and 2 are thresholds that bracket nothing.
template <int KIND>
bool prefill_select() {
  constexpr int kThreads = 256, kCapacity = misa::kSpan;
  const Row row(any_of({2049, 2303, 4097, 8192, 20003, 65537}), KIND);
  const int length = row.length, k = any_of({64, 2048}), shift = any_of({3, 4}), misled = rng() % 6,
            deviations = any_of({2, 3});
  std::vector<float> samples;
  for (int i = 0; misa::sample_position(i, shift) < length; ++i)
    samples.push_back(row.scores[misa::sample_position(i, shift)]);
  alignas(16) int bins[misa::kBins], scratch[64];
  float threshold[3];
  const int room = 3072 >> shift, threads = any_of({128, 256});
  emulator::run(1, threads, [&](int) {
    if (threads == 128) {
      misa::thresholds<128>(samples.data(), length, k, shift, deviations, room, bins, scratch, threshold);
    } else {
      misa::thresholds<256>(samples.data(), length, k, shift, deviations, room, bins, scratch, threshold);
    }
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
  // Of numbers alone: what becomes of the sign of anything else is the GPU's own.
  const auto finite = [](float score) { return std::isfinite(score); };
  if (std::all_of(row.scores.begin(), row.scores.begin() + length, finite)) {
    for (int word = 0; word < words; ++word) {
      if (marks_of_word(row, word, threshold) != std::pair(planes[0][word], planes[1][word])) {
        std::printf("marks: kind %d, length %d, word %d\n", row.kind, length, word);
        return false;
      }
    }
  }
  std::vector<int> out = output_of(k);
  std::vector<unsigned> places(kCapacity), slots(kCapacity), stage(kThreads / 32 * misa::kSpan);
  int info[misa::kCandidatesInts], radix[misa::kRadixInts], selected[kThreads / 32], count = 0;
  const misa::Candidates& candidates = misa::as_candidates(info);
  // The steps of misa_kernels/select.py.
  emulator::run(1, kThreads, [&](int) {
    misa::classify<kThreads>(planes[0].data(), planes[1].data(), words, length, k, threshold, scratch, info, selected);
    misa::radix_begin(radix, info, threshold);
    __syncthreads();
    const int upper = misa::upper_bracket(info);
    unsigned *const above = planes[upper].data(), *const within = planes[1 - upper].data();
    const bool all_fit = misa::num_candidates(info) <= kCapacity;
    bool searches = true;
    for (int turn = 0; turn < misa::radix_rounds(info) && searches; ++turn) {
      searches = misa::radix_searches(radix);
      misa::clear_bins<kThreads>(bins);
      for (int first = 0, last = words; first < words; first = last) {
        __syncthreads();
        if (!all_fit) last = misa::end_of_part<kThreads>(above, within, first, words, kCapacity, scratch);
        if (threadIdx.x == 0) count = 0;
        __syncthreads();
        misa::collect<kThreads>(above, within, words, first, last, places.data(), &count);
        __syncthreads();
        misa::find_slots<kThreads>(places.data(), count, row.pages.data(), slots.data());
        for (int i = threadIdx.x; i < count; i += kThreads) {
          const unsigned score = misa::ordered(row.scores[misa::position_of(places[i])]);
          if (searches) {
            misa::radix_count(radix, score, bins);
          } else {
            misa::radix_mark(radix, score, places[i], above, within, selected);
          }
        }
      }
      if (searches) misa::radix_advance<kThreads>(radix, bins, scratch);
    }
    __syncthreads();
    misa::emit<kThreads>(above, within, words, length, upper, misa::ties_selected(info, radix), selected, row.form,
                         row.pages.data(), row.offset, scratch, stage.data(), out.data());
  });
  // Nothing but time is lost without a bracket, but well-behaved scores have a narrow one, and so have plateaus.
  const bool bracketed = row.kind == NORMAL || row.kind == RARE || row.kind == ZEROS || row.kind == EQUAL ||
                         row.kind == MOSTLY_ZERO || row.kind == RELU || row.kind == RUNS;
  if (bracketed && misled > 2 && !candidates.tied && (candidates.bracket == misa::kNone || candidates.count > 3072)) {
    std::printf("thresholds: kind %d, length %d, k %d: %d candidates, bracket %d\n", row.kind, length, k,
                candidates.count, candidates.bracket);
    return false;
  }
  return same("prefill_select", row, k, best(row.scores, length, k), out);
}

// The heads of a row by their estimates, as the routers of prefill and decode pick them.
bool pick_heads() {
  const int heads = any_of({32, 64}), threads = any_of({128, 256});
  const int k = 1 + rng() % heads;
  Row row(heads);
  row.form = row.offset = 0;
  std::vector<int> out = output_of(k);
  unsigned votes[2];
  std::vector<unsigned> keys(heads);
  for (int i = 0; i < heads; ++i) keys[i] = misa::head_key(row.scores[i]);
  emulator::run(1, threads, [&](int) {
    if (heads == 32) {
      misa::pick_heads<32>(keys.data(), k, votes, out.data());
    } else {
      misa::pick_heads<64>(keys.data(), k, votes, out.data());
    }
  });
  return same("pick_heads", row, k, best(row.scores, heads, k, true), out);
}

}  // namespace

int main(int argc, char** argv) {
  rng.seed(std::atoi(argv[1]));
  const int rows = std::atoi(argv[2]);
  bool (*const selections[])() = {decode_select<1>, decode_select<2>,   decode_select<4>,     decode_select<8>,
                                  rerank,           prefill_select<-1>, prefill_select<RARE>, prefill_select<STEPS>,
                                  pick_heads};
  int passed = 0, done = 0;
  for (int i = 0; i < rows; ++i) {
    for (const auto select : selections) {
      next_kind = i;  // however many rows the selections before took: every one sees each kind
      passed += select();
      ++done;
    }
  }
  std::printf("%d of %d selections are right\n", passed, done);
  return passed != done;
}
