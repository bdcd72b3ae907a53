// How Python launches kernels: an operation's, one after the other, in one call. A step of a server has the same shapes in every
// layer, so all of a launch but its pointers is laid out beforehand. Host code; `builder/launches.py` adds a function for each
// kernel, and `sgl_kernel_misa/library.py` fills the structures.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

// Arguments of a kernel: 8 bytes each, the pointers first, each value in the first bytes of its own.
using Values = const uint64_t*;

template <typename T>
T argument(Values values, size_t place) {
  T value;
  static_assert(sizeof value <= sizeof *values);
  std::memcpy(&value, values + place, sizeof value);
  return value;
}

// Where a pointer comes from: a tensor of the chain and the bytes from its start.
struct Place {
  int64_t tensor;
  int64_t offset;
};

struct Launch {
  int (*run)(Values values, void* stream);
  Values values;        // without the pointers
  const Place* places;  // of the pointers
  int32_t pointers;
  int32_t arguments;  // the pointers among them
};

constexpr int MAX_ARGUMENTS = 64;

// Returns 0, or which launch failed, from 1.
extern "C" int launch_chain(const Launch* launches, int32_t count, const uint64_t* tensors, void* stream) {
  for (int32_t i = 0; i < count; ++i) {
    const Launch& launch = launches[i];
    // A copy: other threads may be launching the same chain.
    uint64_t values[MAX_ARGUMENTS];
    std::memcpy(values, launch.values, launch.arguments * sizeof *values);
    for (int32_t j = 0; j < launch.pointers; ++j) {
      const Place& place = launch.places[j];
      values[j] = tensors[place.tensor] + place.offset;
    }
    if (launch.run(values, stream)) return i + 1;
  }
  return 0;
}
