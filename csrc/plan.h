// What the plans of all backends share. A plan says which kernel family runs a problem on a device
// and how the work is cut. It is a pure function of (Problem, device), without torch, CUDA or
// allocation. Thresholds that depend on the device are in the backends' plan.cpp; sizes that belong
// to one kernel's code are in that kernel's file.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "problem.h"

namespace bnext {

enum class Family : uint8_t {
  kElementwise,  // nothing to reduce first: one pass
  kResident,     // a task reads its channels once; they stay in its cache for the second pass
  kStreaming,    // all threads reduce, then all apply: memory is read twice
};

// How memory is cut into independent reductions ("bins").
enum class IndexMap : uint8_t {
  kRows,     // a bin is a channel: runs of HW adjacent elements, reduced along the run
  kColumns,  // a bin is a column: adjacent bins are adjacent in memory, reduced down the rows
};

inline std::string to_string(Family family) {
  return family == Family::kResident    ? "resident"
         : family == Family::kStreaming ? "streaming"
                                        : "elementwise";
}

inline std::string to_string(IndexMap map) {
  return map == IndexMap::kRows ? "rows" : "columns";
}

// The value in [first, last] with the given name; throws std::invalid_argument if there is none.
template <class E>
E parse(const char* what, const std::string& name, E first, E last) {
  std::string expected;
  for (int i = static_cast<int>(first); i <= static_cast<int>(last); ++i) {
    const E value = static_cast<E>(i);
    if (to_string(value) == name) return value;
    expected += value == first ? "" : value == last ? " or " : ", ";
    expected += to_string(value);
  }
  throw std::invalid_argument("bnext: " + std::string(what) + ": expected " + expected +
                              ", got \"" + name + "\"");
}

// name(field=value, ...) with the fields that Plan::fields lists.
template <class Plan>
std::string to_string(const char* name, const Plan& plan) {
  std::ostringstream out;
  out << name << std::boolalpha;
  const char* before = "(";
  Plan::fields([&](const char* field, auto member) {
    out << before << field << "=";
    before = ", ";
    if constexpr (std::is_enum_v<std::decay_t<decltype(plan.*member)>>)
      out << to_string(plan.*member);
    else
      out << plan.*member;
  });
  return out.str() + ")";
}

}  // namespace bnext
