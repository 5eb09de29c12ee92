// Whether visit_fields of a struct visits every field, found when it is compiled: a field that it
// forgets would keep its default, and no call could set it.
#pragma once

#include <cstddef>

namespace rnnfast {

struct AnyValue {
  template <class T>
  operator T() const;
};

// The fields of an aggregate: as many values as its braces take.
template <class T, class... Values>
consteval std::size_t count_fields(Values... values) {
  if constexpr (requires { T{values..., AnyValue{}}; }) {
    return count_fields<T>(values..., AnyValue{});
  } else {
    return sizeof...(Values);
  }
}

template <class T>
consteval std::size_t count_visited() {
  T object{};
  std::size_t count = 0;
  visit_fields(object, [&](const char*, auto&) { ++count; });
  return count;
}

// Nested: the struct of a field whose own fields are visited in its place.
template <class T, class Nested>
consteval bool visits_all_fields() {
  return count_visited<T>() == count_fields<T>() - 1 + count_visited<Nested>();
}

}  // namespace rnnfast
