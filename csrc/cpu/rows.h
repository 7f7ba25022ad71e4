// The walkers over rows: runs of adjacent elements of one channel, longer than two units.
// Compiled per instruction set, as vec.h.
#pragma once

#include "body.h"

namespace bnext::BNEXT_ISA_NAMESPACE {

// Bytes that reads are prefetched ahead of a row (24x64x112x112, float32: its sums 6.7 -> 4.4 ms).
inline constexpr int64_t kAheadBytes = 2048;

// The chunks of a slice: f(row, first element, length), the last chunk first where asked.
template <bool kReverse, class F>
inline void for_each_chunk(const CpuPlan& p, int64_t slice, F f) {
  const int64_t begin = p.first_chunk(slice), end = p.first_chunk(slice + 1);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t chunk = kReverse ? begin + end - 1 - i : i, piece = chunk % p.pieces;
    const int64_t first = piece * CpuPlan::kPiece;
    f(chunk / p.pieces, first, (piece + 1 == p.pieces ? p.width : first + CpuPlan::kPiece) - first);
  }
}

template <class Body>
struct RowSums {
  using T = typename Body::Element;
  using A = typename Body::Accumulator;
  using Coefficients = decltype(std::declval<Body>().at(0));
  static constexpr int kSums = Body::kSums;
  static constexpr int kChains =
      sizeof(A) == 8 ? 2 : 4;  // vectors side by side: latency, registers
  static constexpr int64_t kGroup = kChains * kLanes, kRun = 16 * kGroup;

  // The unit at a place.
  template <class Keep>
  static void add(const Body& body, const Coefficients& k, const Place& at, const Keep& kept,
                  Vec<A> (*sums)[kSums]) {
    for_units<1>(
        body, at, [](auto, Place&) {}, [&](auto, const Place& at) { return body.load(k, at); },
        [&](auto, const Place& at, const auto& values) { body.add(k, at, values, kept, sums); });
  }
  // A run of up to 4 * kRun elements. `tail`: the new ones of the unit that ends it.
  static void sum(const Body& body, const Coefficients& k, const Place& at, int64_t length,
                  const Mask<T, A>& tail, Vec<A> (&total)[1][kSums]) {
    clear(total);
    for (int64_t i = 0; i < length;) {
      Vec<A> run[1][kSums];
      clear(run);
      for (int block = 0; block < 4 && i < length; ++block) {
        Vec<A> chains[kChains][kSums], rest[kVecs<T>][kSums];
        clear(chains);
        for (int n = 0; n < 4 && i + kGroup <= length; ++n, i += kGroup)
          for_units<kChains / kVecs<T>>(
              body, at + i, [&](auto u, Place& here) { here = at + (i + (u + 1) * kUnit<T>); },
              [&](auto u, const Place& here) {
                if (u * kUnit<T> * sizeof(T) % 64 == 0)
                  body.template prefetch<3>(here.element + kAheadBytes / sizeof(T));
                return body.load(k, here);
              },
              [&](auto u, const Place& here, const auto& values) {
                body.add(k, here, values, All{}, chains + u * kVecs<T>);
              });
        unrolled<kSums>([&](auto s) {
          Vec<A> half = chains[0][s] + chains[kChains / 2][s];
          if constexpr (kChains == 4) half = half + (chains[1][s] + chains[3][s]);
          run[0][s] = run[0][s] + half;
        });
        if (i == length || i + kGroup <= length) continue;
        clear(rest);
        for (; i + kUnit<T> <= length; i += kUnit<T>) add(body, k, at + i, All{}, rest);
        if (i < length) add(body, k, at + (length - kUnit<T>), tail, rest);
        i = length;
        unrolled<kVecs<T> * kSums>(
            [&](auto n) { run[0][n % kSums] = run[0][n % kSums] + rest[n / kSums][n % kSums]; });
      }
      unrolled<kSums>([&](auto s) { total[0][s] = total[0][s] + run[0][s]; });
    }
  }
};

// Adds nothing: results[k][c] are the sums of channels [c0, c1) over the task's slice.
template <class Body>
[[gnu::noinline]] void sum_rows(const Body& body, const CpuPlan& p, const Task& task,
                                double* const* results) {
  using Sums = RowSums<Body>;
  using T = typename Sums::T;
  using A = typename Sums::A;
  constexpr int kSums = Sums::kSums;
  constexpr int64_t kChannels = 64;  // whose sums stay in the L1
  struct {
    Vec<A> chain[1][kSums];
    Vec<double> total[1][kSums], error[1][kSums];
  } sums[kChannels];
  const auto add = [&](int64_t c, int s, const Vec<A>& x) {
    add_in_double<A>(sums[c].total[0][s], sums[c].error[0][s], to_double(x));
  };
  for (int64_t c0 = task.c0; c0 < task.c1; c0 += kChannels) {
    const int64_t count = std::min(kChannels, task.c1 - c0);
    for (int64_t c = 0; c < count; ++c)
      clear(sums[c].chain), clear(sums[c].total), clear(sums[c].error);
    int chained = 0;
    const auto flush = [&] {
      for (int64_t c = 0; c < count && chained > 0; ++c) {
        for (int s = 0; s < kSums; ++s) add(c, s, sums[c].chain[0][s]);
        clear(sums[c].chain);
      }
      chained = 0;
    };
    for_each_chunk<false>(p, task.slice, [&](int64_t row, int64_t first, int64_t length) {
      const auto tail =
          from_bits<T, A>(static_cast<uint32_t>(~uint64_t{0} << (kUnit<T> - length % kUnit<T>)));
      const bool long_row = length > Sums::kRun;
      for (int64_t c = 0; c < count; ++c) {
        const auto k = body.at(c0 + c);
        const Place at = place<IndexMap::kRows>(p, row, c0 + c) + first;
        for (int64_t i = 0; i < length; i += 4 * Sums::kRun) {
          Vec<A> sum[1][kSums];
          Sums::sum(body, k, at + i, std::min(4 * Sums::kRun, length - i), tail, sum);
          for (int s = 0; s < kSums; ++s)
            if (long_row)
              add(c, s, sum[0][s]);
            else
              sums[c].chain[0][s] = sums[c].chain[0][s] + sum[0][s];
        }
      }
      if (!long_row && ++chained == 4) flush();
    });
    flush();
    for (int64_t c = 0; c < count; ++c)
      for (int s = 0; s < kSums; ++s)
        results[s][c0 + c] =
            sum_lanes(sums[c].total[0][s]) + finite_or_zero(sum_lanes(sums[c].error[0][s]));
  }
}

// `length` elements, at least a unit; the last unit rewrites what it shares with the one before.
template <bool kNontemporal, class Body, class Coefficients>
inline void apply_run(const Body& body, const Coefficients& k, const Place& at, int64_t length,
                      int64_t ahead) {
  using T = typename Body::Element;
  constexpr int kUnits = std::max<int>(64 / sizeof(T) / kUnit<T>, Body::kTogether);
  const auto apply = [&](auto, const Place& here, const auto& values) {
    body.template apply<kNontemporal>(k, here, values);
  };
  const Place last = at + (length - kUnit<T>);
  [[maybe_unused]] decltype(body.load(k, last)) tail;
  if constexpr (Body::kInPlace) tail = body.load(k, last);
  int64_t i = 0;
  for (; i + kUnits * kUnit<T> <= length; i += kUnits * kUnit<T>)
    for_units<kUnits>(
        body, at + i, [&](auto u, Place& here) { here = at + (i + (u + 1) * kUnit<T>); },
        [&](auto u, const Place& here) {
          if (u * kUnit<T> * sizeof(T) % 64 == 0) {
            body.template prefetch<2>(here.element + ahead);
            if constexpr (!kNontemporal) body.prefetch_stores(here.element);
          }
          return body.load(k, here);
        },
        apply);
  for (; i + kUnit<T> <= length; i += kUnit<T>)
    for_units<1>(
        body, at + i, [](auto, Place&) {},
        [&](auto, const Place& here) { return body.load(k, here); }, apply);
  if (i < length)
    for_units<1>(
        body, last, [](auto, Place&) {},
        [&](auto, const Place& here) {
          if constexpr (Body::kInPlace)
            return tail;
          else
            return body.load(k, here);
        },
        apply);
}

// The same elements of rows of channels [c0, c1).
template <bool kNontemporal, class Body>
[[gnu::noinline]] void apply_channels(const Body body, const CpuPlan& p, int64_t row, int64_t c0,
                                      int64_t c1, int64_t first, int64_t length, int64_t ahead) {
  for (int64_t c = c0; c < c1; ++c)
    apply_run<kNontemporal>(body, body.at(c), place<IndexMap::kRows>(p, row, c) + first, length,
                            ahead);
}

// Copies `count` elements past the caches; both lie at the same place of a cache line.
template <class T>
[[gnu::noinline]] void stream_run(T* to, const T* from, int64_t count) {
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t head =
      std::min<int64_t>(count, -(reinterpret_cast<uintptr_t>(to) / sizeof(T)) % line);
  std::memcpy(to, from, head * sizeof(T));
  int64_t i = head;
  for (; i + line <= count; i += line)
    for (int b = 0; b < 64; b += kVectorBytes) {
      using Register = typename Packed<T>::native;
      stream_register(reinterpret_cast<char*>(to + i) + b,
                      load_register<Register>(reinterpret_cast<const char*>(from + i) + b));
    }
  std::memcpy(to + i, from + i, (count - i) * sizeof(T));
}

// Rows in reverse, so that what was summed last is read first.
template <class Body>
[[gnu::noinline]] void apply_rows(const Body& body, const CpuPlan& p, const Task& task) {
  using T = typename Body::Element;
  constexpr int64_t kStage = 8192 / sizeof(T);  // elements that wait in the L1
  const int64_t ahead = task.ahead ? task.ahead : kAheadBytes / sizeof(T);
  const bool aligned = p.width * sizeof(T) % Packed<T>::kBytes == 0;
  alignas(64) T stage[Body::kOutputs][2 * kStage + 64 / sizeof(T)];

  // Stores past the caches must be aligned: odd rows of some channels wait in the L1 until they can
  // leave as whole lines.
  const auto staged = [&](int64_t row, int64_t c0, int64_t c1, int64_t first, int64_t length) {
    Body to_stage = body;
    const int64_t element = place<IndexMap::kRows>(p, row, c0).element + first;
    const auto in_line = [&](const T* out) {
      return static_cast<int64_t>(reinterpret_cast<uintptr_t>(out + element) % 64 / sizeof(T));
    };
    for (int o = 0; o < Body::kOutputs; ++o)
      if (body.out[o]) to_stage.out[o] = stage[o] + in_line(body.out[o]) - element;
    apply_channels<false>(to_stage, p, row, c0, c1, first, length, ahead);
    for (int o = 0; o < Body::kOutputs; ++o)
      if (body.out[o])
        stream_run(body.out[o] + element, stage[o] + in_line(body.out[o]), (c1 - c0) * length);
  };

  for_each_chunk<true>(p, task.slice, [&](int64_t row, int64_t first, int64_t length) {
    if (!p.nontemporal_stores) {
      apply_channels<false>(body, p, row, task.c0, task.c1, first, length, ahead);
    } else if (aligned) {
      apply_channels<true>(body, p, row, task.c0, task.c1, first, length, ahead);
    } else if (length < kStage) {
      const int64_t step = kStage / length;
      for (int64_t c = task.c0; c < task.c1; c += step)
        staged(row, c, std::min(task.c1, c + step), first, length);
    } else {
      const int64_t parts = length / kStage;
      for (int64_t c = task.c0; c < task.c1; ++c)
        for (int64_t i = 0; i < parts; ++i)
          staged(row, c, c + 1, first + i * kStage, i + 1 == parts ? length - i * kStage : kStage);
    }
  });
  if (p.nontemporal_stores) fence_nontemporal();
}

}  // namespace bnext::BNEXT_ISA_NAMESPACE
