// The double backward's kernels, compiled per instruction set as forward_kernels.cpp. Bytes per
// element: sums reads grad_grad_input, grad_out and input once; apply reads them (and
// grad_grad_residual) again and writes what is asked for. Sums are kept in double: three reads hide
// the conversions.
#include "gradient.h"

namespace bnext::BNEXT_ISA_NAMESPACE {
namespace {

// Of an activation that needs no more than where it passed.
template <class T, IndexMap kIndexMap, Kind kKind, bool kApplies>
struct DoubleBackward : BodyOf<T, kIndexMap, 4, kApplies ? 2 : 0> {
  using Accumulator = double;
  using C = compute_t<T>;
  static constexpr int kSums = 5;
  DoubleBackwardArrays arrays;
  AnyAct<T> act;

  struct Coefficients {
    Recomputed<T, kIndexMap, kKind != Kind::kNone> forward;
    PerUnit<kIndexMap, T> invstd, a_u, a_h, a_1, b_g, b_u, b_h, b_1;
  };
  Coefficients at(int64_t bin) const {
    Coefficients k{{arrays, bin}, {}, {}, {}, {}, {}, {}, {}, {}};
    if constexpr (kApplies)
      k.invstd = {arrays.invstd, bin}, k.a_u = {arrays.a_u, bin}, k.a_h = {arrays.a_h, bin},
      k.a_1 = {arrays.a_1, bin}, k.b_g = {arrays.b_g, bin}, k.b_u = {arrays.b_u, bin},
      k.b_h = {arrays.b_h, bin}, k.b_1 = {arrays.b_1, bin};
    return k;
  }

  struct Values {
    Unit<T> x, u, g;  // g where the activation passed
    Mask<T> passed;
  };
  Values load(const Coefficients& k, const Place& place) const {
    Values v;
    v.x = load_unit(this->in[0] + place.element);
    v.u = load_unit(this->in[1] + place.element);
    v.g = load_unit(this->in[2] + place.element);
    if constexpr (kKind != Kind::kNone) {
      v.passed = this->mask ? read_mask<T>(this->mask, place)
                            : act.template passes<kKind>(k.forward.z(v.x));
      act.template through<kKind>(v.passed, v.g);
    }
    return v;
  }

  template <class Keep>
  void add(const Coefficients& k, const Place&, const Values& v, const Keep& kept,
           Vec<double> (*sums)[kSums]) const {
    unrolled<kVecs<T>>([&](auto j) {
      const Vec<double> u = keep(kept, j, to_double(v.u.v[j]));
      const Vec<double> g = keep(kept, j, to_double(v.g.v[j]));
      const Vec<double> xmu = keep(kept, j, to_double(v.x.v[j]) - to_double(k.forward.mean[j]));
      sums[j][0] = sums[j][0] + u;
      sums[j][1] = sums[j][1] + g;
      sums[j][2] = fma(u, xmu, sums[j][2]);
      sums[j][3] = fma(g, xmu, sums[j][3]);
      sums[j][4] = fma(u, g, sums[j][4]);
    });
  }

  template <bool kNontemporal>
  void apply(const Coefficients& k, const Place& place, const Values& v) const {
    Unit<T> residual, grad_grad_out, grad_input;
    if (this->out[0] && this->in[3]) residual = load_unit(this->in[3] + place.element);
    unrolled<kVecs<T>>([&](auto j) {
      const Vec<C> h = (v.x.v[j] - k.forward.mean[j]) * k.invstd[j];
      Vec<C> z = fma(v.u.v[j], k.a_u[j], fma(h, k.a_h[j], k.a_1[j]));
      if (this->in[3]) z = z + residual.v[j];
      grad_grad_out.v[j] = z;
      grad_input.v[j] =
          fma(v.g.v[j], k.b_g[j], fma(v.u.v[j], k.b_u[j], fma(h, k.b_h[j], k.b_1[j])));
    });
    if (this->out[0]) {
      if constexpr (kKind != Kind::kNone) act.template through<kKind>(v.passed, grad_grad_out);
      store_unit<kNontemporal>(this->out[0] + place.element, grad_grad_out);
    }
    if (this->out[1]) store_unit<kNontemporal>(this->out[1] + place.element, grad_input);
  }
};

template <class T>
struct Table {
  template <bool kApplies, class Run>
  static void with_body(const CpuPlan& p, const DoubleBackwardArrays& arrays,
                        const DoubleBackwardArgs& args, Act act, Run run) {
    with_map(p.map, [&](auto map) {
      with_kind(act, [&](auto kind) {
        DoubleBackward<T, map, kind, kApplies> body;
        body.in[0] = static_cast<const T*>(args.input);
        body.in[1] = static_cast<const T*>(args.grad_grad_input);
        body.in[2] = static_cast<const T*>(args.grad_out);
        body.in[3] = kApplies ? static_cast<const T*>(args.grad_grad_residual) : nullptr;
        if constexpr (kApplies) {
          body.out[0] = static_cast<T*>(args.grad_grad_out);
          body.out[1] = static_cast<T*>(args.grad_input);
        }
        body.mask = const_cast<uint8_t*>(args.mask);
        body.arrays = arrays;
        body.act = {act, args.act_param};
        run(body);
      });
    });
  }
  static void sums(const CpuPlan& p, const Task& task, const DoubleBackwardArrays& arrays,
                   const DoubleBackwardArgs& args, Act act, Sums results) {
    with_body<false>(p, arrays, args, act, [&](const auto& body) { sum(body, p, task, results); });
  }
  static void apply(const CpuPlan& p, const Task& task, const DoubleBackwardArrays& arrays,
                    const DoubleBackwardArgs& args, Act act) {
    with_body<true>(p, arrays, args, act,
                    [&](const auto& body) { BNEXT_ISA_NAMESPACE::apply(body, p, task); });
  }
  static constexpr DoubleBackwardKernels value{spread<T, compute_t<T>>, sums, apply};
};

}  // namespace

template <>
const DoubleBackwardKernels& kernels(DType dtype) {
  return table_of<Table>(dtype);
}

}  // namespace bnext::BNEXT_ISA_NAMESPACE
