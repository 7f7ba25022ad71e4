// The backward kernels: sums read grad_out and the input once (and the residual, where f' needs the
// sum of them), apply reads them once more and writes the gradients. Compiled per instruction set,
// as forward_kernels.cpp.
#include "gradient.h"

namespace bnext::BNEXT_ISA_NAMESPACE {
namespace {

// What a backward computes: sums (sum_dy, sum_dy_xmu), and dx from batch statistics or frozen ones.
// The residual's gradient goes with dx.
struct Outputs {
  bool sums, batch, frozen;
};

// f': 1, ReLU's where the mask or z made again from x has it pass, or that of any activation.
enum class Slope { kOne, kMask, kInput, kAny };

template <class T>
constexpr int outputs(Slope slope, Outputs wanted) {
  if (!wanted.batch && !wanted.frozen) return slope == Slope::kAny && stages(sizeof(T));
  return slope == Slope::kMask || slope == Slope::kAny ? 2 : 1;  // where there can be a residual
}

// A: of the sums.
template <class T, IndexMap kIndexMap, class A, Slope kSlope, Outputs kWanted>
struct Backward : BodyOf<T, kIndexMap, 2 + (kSlope == Slope::kAny), outputs<T>(kSlope, kWanted)> {
  using Accumulator = A;
  using C = compute_t<T>;
  static constexpr int kSums = 2;
  static constexpr bool kMakesZ = kSlope == Slope::kInput || kSlope == Slope::kAny;
  static constexpr bool kReadsInput = kWanted.sums || kWanted.batch || kMakesZ;
  static constexpr int kTogether = kSlope == Slope::kAny ? AnyAct<T>::kUnits : 1;
  static constexpr bool kInPlace = kWanted.batch && kSlope == Slope::kOne && stages(sizeof(T));
  BackwardArrays arrays;
  AnyAct<T> act;

  struct Coefficients {
    Recomputed<T, kIndexMap, kMakesZ> forward;
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
    if constexpr (kSlope == Slope::kAny)
      if (this->in[2]) __builtin_prefetch(this->in[2] + element, 0, kLocality);
  }

  // With dy before the activation. Where that is any, z waits with it, and x is read again.
  struct Values {
    Unit<T> x, dy;
  };
  struct Waiting {
    typename AnyAct<T>::Operands v[kVecs<T>];
  };
  auto load(const Coefficients& k, const Place& place) const {
    using Relu = Activation<Act::kRelu>;
    const Unit<T> dy = load_unit(this->in[1] + place.element);
    std::conditional_t<kSlope == Slope::kAny, Waiting, Values> values;
    if constexpr (kSlope == Slope::kAny) {
      Unit<T> z = k.forward.z(load_unit(this->in[0] + place.element));
      if (this->mask) {
        const Mask<T> passed = read_mask<T>(this->mask, place);
        unrolled<kVecs<T>>([&](auto j) { z.v[j] = select(passed.v[j], Vec<C>(1), Vec<C>(-1)); });
      } else if (this->in[2]) {
        const Unit<T> residual = load_unit(this->in[2] + place.element);
        unrolled<kVecs<T>>([&](auto j) { z.v[j] = z.v[j] + residual.v[j]; });
      }
      unrolled<kVecs<T>>([&](auto j) { values.v[j] = {z.v[j], dy.v[j]}; });
    } else {
      values.dy = dy;
      if constexpr (kReadsInput) values.x = load_unit(this->in[0] + place.element);
      Mask<T> passed;
      if constexpr (kSlope == Slope::kMask) passed = read_mask<T>(this->mask, place);
      if constexpr (kSlope == Slope::kInput) {
        const Unit<T> z = k.forward.z(values.x);
        unrolled<kVecs<T>>([&](auto j) { passed.v[j] = Relu::passes(z.v[j]); });
      }
      if constexpr (kSlope != Slope::kOne)
        unrolled<kVecs<T>>(
            [&](auto j) { values.dy.v[j] = Relu::gradient(passed.v[j], dy.v[j], {}); });
    }
    return values;
  }
  void finish(Waiting* values, int count) const { act.through(values->v, count * kVecs<T>); }
  const Values& finished(const Place&, const Values& values) const { return values; }
  Values finished(const Place& place, const Waiting& values) const {
    Values r;
    r.x = load_unit(this->in[0] + place.element);
    unrolled<kVecs<T>>([&](auto j) { r.dy.v[j] = values.v[j].dy; });
    return r;
  }

  template <bool kNontemporal>
  void write(const Coefficients& k, const Place& place, const Unit<T>& x, const Unit<T>& dy) const {
    // Of kernels for a residual, either gradient may be left out.
    constexpr bool kResidual = Backward::kOutputs == 2;
    if (!kResidual || this->out[0]) {
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
    if constexpr (kResidual)
      if (this->out[1]) store_unit<kNontemporal>(this->out[1] + place.element, dy);
  }

  template <class Loaded, class Keep>
  void add(const Coefficients& k, const Place& place, const Loaded& loaded, const Keep& kept,
           Vec<A> (*sums)[kSums]) const {
    const Values& values = finished(place, loaded);  // clang 15 captures no structured binding
    unrolled<kVecs<T>>([&](auto j) {
      const Vec<A> g = keep(kept, j, convert<A>(values.dy.v[j]));
      const Vec<A> xmu = keep(kept, j, convert<A>(values.x.v[j]) - convert<A>(k.forward.mean[j]));
      sums[j][0] = sums[j][0] + g;
      sums[j][1] = fma(g, xmu, sums[j][1]);
    });
    if constexpr (kWanted.frozen)
      write<false>(k, place, values.x, values.dy);
    else if constexpr (Backward::kOutputs > 0)
      if (this->out[0]) store_unit<false>(this->out[0] + place.element, values.dy);
  }

  template <bool kNontemporal, class Loaded>
  void apply(const Coefficients& k, const Place& place, const Loaded& loaded) const {
    const auto& [x, dy] = finished(place, loaded);
    write<kNontemporal>(k, place, x, dy);
  }
};

template <class T>
struct Table {
  using C = compute_t<T>;

  template <class A, Outputs kWanted>
  static void backward(const CpuPlan& p, const Task& task, const BackwardArrays& arrays,
                       const BackwardArgs& args, Act act, Sums sums) {
    constexpr bool kApplies = kWanted.batch || kWanted.frozen;
    void* const staged = args.grad_residual ? args.grad_residual : args.grad_input;
    constexpr bool kReadsStaged = kWanted.batch && stages(sizeof(T));
    if (kReadsStaged && is_any(act)) {
      BackwardArgs rest = args;
      rest.grad_out = staged;
      if (args.grad_input) backward<A, kWanted>(p, task, arrays, rest, Act::kNone, sums);
      return;
    }
    const auto run = [&]<Slope kSlope>(std::integral_constant<Slope, kSlope>) {
      with_map(p.map, [&](auto map) {
        // Next to an activation sums that nobody asked for cost little.
        constexpr bool kSums = kWanted.sums || (kWanted.frozen && kSlope == Slope::kAny);
        constexpr Outputs kComputed{kSums, kWanted.batch, kWanted.frozen};
        Backward<T, map, A, kSlope, kComputed> body;
        body.in[0] = static_cast<const T*>(args.input);
        body.in[1] = static_cast<const T*>(args.grad_out);
        if constexpr (kSlope == Slope::kAny) body.in[2] = static_cast<const T*>(args.residual);
        if constexpr (kApplies)
          body.out[0] = static_cast<T*>(args.grad_input);
        else
          body.out[0] = is_any(act) ? static_cast<T*>(staged) : nullptr;
        if constexpr (body.kOutputs == 2) body.out[1] = static_cast<T*>(args.grad_residual);
        body.mask = const_cast<uint8_t*>(args.mask);
        body.arrays = arrays;
        body.act = {act, args.act_param};
        if constexpr (kSums)
          sum(body, p, task, sums);
        else
          apply(body, p, task);
      });
    };
    constexpr bool kRare = kWanted.sums && sizeof(A) > sizeof(C);
    if constexpr (!kReadsStaged)
      if (kRare || is_any(act)) return run(std::integral_constant<Slope, Slope::kAny>{});
    if constexpr (!kRare) {
      if (act == Act::kNone)
        run(std::integral_constant<Slope, Slope::kOne>{});
      else if (args.mask)
        run(std::integral_constant<Slope, Slope::kMask>{});
      else
        run(std::integral_constant<Slope, Slope::kInput>{});
    }
  }
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
