// The states that backward reads at the edges of a row.
#pragma once

#include "point_gradients.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

// h before the first step and after a reset, for a cell that makes h from its states.
template <class S>
struct EmittedEdges {
  using A = Arithmetic<S>;
  const BackwardProblem& problem;
  const CellPoints<S>& cell;

  bool needed() const { return cell.facts.emits || cell.facts.reads_previous; }
  int64_t width() const { return problem.shape.heads * problem.shape.size; }
  int64_t states() const { return problem.shape.directions * problem.shape.batch * width(); }
  // Bytes of the rows of S, and of the row of A before them that holds the emitted values.
  std::size_t bytes() const {
    if (!needed()) return 0;
    const int64_t row = whole_blocks<A>(2 * width());
    return static_cast<std::size_t>(row) * sizeof(A) +
           static_cast<std::size_t>(states() + problem.shape.directions * width()) * sizeof(S);
  }

  Edges fill(char* memory) const {
    if (!needed()) return {problem.h_0, nullptr};
    const Shape& shape = problem.shape;
    A* const row = reinterpret_cast<A*>(memory);
    S* const rest = reinterpret_cast<S*>(row + whole_blocks<A>(2 * width()));
    if (!cell.facts.emits) {
      fill_zero<S>(rest, shape.directions * width());
      return {problem.h_0, rest};
    }
    S* const first = rest + shape.directions * width();
    const S* const given = static_cast<const S*>(problem.h_0);
    for (int64_t d = 0; d < shape.directions; ++d) {
      emit(d, nullptr, row, rest + d * width());
      for (int64_t b = 0; b < shape.batch; ++b) {
        const int64_t at = (d * shape.batch + b) * width();
        emit(d, given != nullptr ? given + at : nullptr, row, first + at);
      }
    }
    return {first, rest};
  }

 private:
  // One row of all heads; null for a state of zeros.
  void emit(int64_t direction, const S* state, A* row, S* to) const {
    constexpr int L = kLanes<A>;
    A* const h = row + width();
    for (int64_t i = 0; i < width(); ++i) row[i] = state != nullptr ? load(state + i, 1)[0] : A(0);
    cell.emit(row, 0, static_cast<const A*>(problem.parameters) + direction * width(),
              problem.shape.directions * width(), width(), h);
    for (int64_t i = 0; i < width(); i += L)
      store(to + i, narrow<S>(load(h + i, width() - i)), width() - i);
  }
};

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
