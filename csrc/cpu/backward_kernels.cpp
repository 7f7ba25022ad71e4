// The backward kernels: sums read grad_out and the input once, apply reads them once more and
// writes the gradients. Compiled per instruction set, as forward_kernels.cpp.
#include "gradient.h"

namespace bnext::BNEXT_ISA_NAMESPACE {
namespace {

// What a backward computes: sums (sum_dy, sum_dy_xmu), and dx from batch statistics or frozen ones.
// The residual's gradient goes with dx.
struct Outputs {
  bool sums, batch, frozen;
};

// A: of the sums.
template <class T, IndexMap kIndexMap, class A, Kind kKind, Source kSource, Outputs kWanted>
struct Backward : BodyOf<T, kIndexMap, 2 + (kSource == Source::kSum),
                         kWanted.batch || kWanted.frozen ? 2 : 0> {
  using Accumulator = A;
  using C = compute_t<T>;
  static constexpr int kSums = 2, kGroupRows = 8;
  using Forward = Recomputed<T, kIndexMap, kSource>;
  static constexpr bool kReadsInput = kWanted.sums || kWanted.batch || Forward::kWhole;
  // A residual was added, so it may have a gradient of its own.
  static constexpr bool kAdded = kSource == Source::kMask || kSource == Source::kSum;
  BackwardArrays arrays;
  ActGradient<T, kKind, kSource> act;

  struct Coefficients {
    Forward forward;
    PerUnit<kIndexMap, T> invstd, a, b, c;
  };
  Coefficients at(int64_t bin) const {
    Coefficients k{{arrays, bin}, {}, {}, {}, {}};
    if constexpr (kWanted.batch || kWanted.frozen) k.a = {arrays.a, bin};
    if constexpr (kWanted.batch)
      k.invstd = {arrays.invstd, bin}, k.b = {arrays.b, bin}, k.c = {arrays.c, bin};
    return k;
  }

  template <int kLocality>
  void prefetch(int64_t element) const {
    if constexpr (kReadsInput) __builtin_prefetch(this->in[0] + element, 0, kLocality);
    __builtin_prefetch(this->in[1] + element, 0, kLocality);
    if constexpr (kSource == Source::kSum)
      __builtin_prefetch(this->in[2] + element, 0, kLocality);
  }

  Unit<T> load_dy(const Coefficients& k, const Unit<T>& x, const Place& place) const {
    Unit<T> dy = load_unit(this->in[1] + place.element);
    Unit<T> residual;
    if constexpr (kSource == Source::kSum) residual = load_unit(this->in[2] + place.element);
    act.through(k.forward, x, residual, this->mask, place, dy);
    return dy;
  }

  template <bool kNontemporal>
  void write(const Coefficients& k, const Place& place, const Unit<T>& x, const Unit<T>& dy) const {
    if (!kAdded || this->out[0]) {
      Unit<T> dx;
      // With frozen statistics dx does not depend on x, not even where x is inf or nan.
      unrolled<kVecs<T>>([&](auto j) {
        if constexpr (kWanted.batch)
          dx.v[j] = bnext::apply(
              InputGrad<Vec<C>>{k.forward.mean[j], k.invstd[j], k.a[j], k.b[j], k.c[j]}, dy.v[j],
              x.v[j]);
        else
          dx.v[j] = dy.v[j] * k.a[j];
      });
      store_unit<kNontemporal>(this->out[0] + place.element, dx);
    }
    if (kAdded && this->out[1]) store_unit<kNontemporal>(this->out[1] + place.element, dy);
  }

  template <class Keep>
  void add(const Coefficients& k, const Place& place, const Keep& kept,
           Vec<A> (*sums)[kSums]) const {
    const Unit<T> x = load_unit(this->in[0] + place.element);
    const Unit<T> dy = load_dy(k, x, place);
    unrolled<kVecs<T>>([&](auto j) {
      const Vec<A> g = keep(kept, j, convert<A>(dy.v[j]));
      const Vec<A> xmu = keep(kept, j, convert<A>(x.v[j]) - convert<A>(k.forward.mean[j]));
      sums[j][0] = sums[j][0] + g;
      sums[j][1] = fma(g, xmu, sums[j][1]);
    });
    if constexpr (kWanted.frozen) write<false>(k, place, x, dy);
  }

  template <bool kNontemporal>
  void apply(const Coefficients& k, const Place& place) const {
    Unit<T> x;
    if constexpr (kReadsInput) x = load_unit(this->in[0] + place.element);
    write<kNontemporal>(k, place, x, load_dy(k, x, place));
  }
};

template <class T>
struct Table {
  template <class A, Outputs kWanted>
  static void backward(const CpuPlan& p, const Task& task, const BackwardArrays& arrays,
                       const BackwardArgs& args, Act act, Sums sums) {
    with_map(p.map, [&](auto map) {
      with_activation<Source::kSum>(act, args, [&](auto kind, auto source) {
        Backward<T, map, A, kind, source, kWanted> body;
        body.in[0] = static_cast<const T*>(args.input);
        body.in[1] = static_cast<const T*>(args.grad_out);
        if constexpr (source == Source::kSum) body.in[2] = static_cast<const T*>(args.residual);
        body.out[0] = static_cast<T*>(args.grad_input);
        if constexpr (kWanted.batch || kWanted.frozen)
          body.out[1] = static_cast<T*>(args.grad_residual);
        body.mask = const_cast<uint8_t*>(args.mask);
        body.arrays = arrays;
        body.act = {{act, args.act_param}};
        if constexpr (kWanted.sums)
          sum(body, p, task, sums);
        else
          apply(body, p, task);
      });
    });
  }
  using C = compute_t<T>;
  static constexpr BackwardKernels value{spread<T, C>,
                                         backward<C, Outputs{true, false, false}>,
                                         backward<double, Outputs{true, false, false}>,
                                         backward<C, Outputs{false, true, false}>,
                                         backward<C, Outputs{false, false, true}>,
                                         backward<C, Outputs{true, false, true}>};
};

}  // namespace

template <>
const BackwardKernels& kernels(DType dtype) {
  return table_of<Table>(dtype);
}

}  // namespace bnext::BNEXT_ISA_NAMESPACE
