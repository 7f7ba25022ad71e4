// From a plan's and a call's switches to a walker over a body.
// Compiled per instruction set, as vec.h.
#pragma once

#include "columns.h"
#include "rows.h"

namespace bnext::BNEXT_ISA_NAMESPACE {

// This instruction set's table; see kernels.h.
template <class Table>
const Table& kernels(DType dtype);

template <class Body>
inline void sum(const Body& body, const CpuPlan& p, const Task& task, double* const* results) {
  if constexpr (Body::kMap == IndexMap::kRows)
    sum_rows(body, p, task, results);
  else
    sum_columns(body, p, task, results);
}
template <class Body>
inline void apply(const Body& body, const CpuPlan& p, const Task& task) {
  if constexpr (Body::kMap == IndexMap::kRows)
    apply_rows(body, p, task);
  else
    apply_columns(body, p, task);
}

// From run-time switches to an instantiation: f gets an integral constant for each.
template <class F>
inline void with_map(IndexMap map, F f) {
  if (map == IndexMap::kRows)
    f(std::integral_constant<IndexMap, IndexMap::kRows>{});
  else
    f(std::integral_constant<IndexMap, IndexMap::kColumns>{});
}
template <class F>
inline void with_bool(bool value, F f) {
  if (value)
    f(std::true_type{});
  else
    f(std::false_type{});
}

// Table<T>::value for the dtype's storage type T.
template <template <class> class Table>
inline const auto& table_of(DType dtype) {
  return visit_dtype<bfloat16, float16>(
      dtype, [](auto t) -> const auto& { return Table<decltype(t)>::value; });
}

}  // namespace bnext::BNEXT_ISA_NAMESPACE
