// The time loop forward, generic over the cell (csrc/cells) and the storage type S.
#pragma once

#include "task.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

// Rows of x that are copied and projected at once.
constexpr int64_t kInputRows = 96;

// kNorm: layer norm between p + u and the rest of the cell. It needs whole rows: a step computes
// the products of all of them first.
template <class Cell, class S, class P, bool kNorm>
struct ForwardTask : Task<Cell, S> {
  using Base = Task<Cell, S>;
  using Base::L;
  using typename Base::A;
  using typename Base::V;

  const ForwardProblem* problem;
  Packed<A> weights;
  A* old_state;  // as stored in y: rounded, so that backward and dW see what the step saw
  A* new_state;
  A* carried;  // [kCarried][rows]
  A* preact;   // [rows], with kNorm

  // Where x is given: p of a few steps at a time, which is never written out.
  int64_t chunk;  // steps
  Packed<A> input_weights;
  A* inputs;     // this thread's copy of rows of x
  A* projected;  // [chunk][rows]

  // Enough rows for the weights to be read from the second-level cache a few times only, few
  // enough for p to stay there.
  static int64_t chunk_steps(int64_t steps, int64_t rows) {
    const int64_t chunk = rows > 128 ? 1 : 256 / (rows > 0 ? rows : 1);
    return chunk < steps ? chunk : steps;
  }
  static int64_t scratch_elements(int64_t rows, int64_t stride, int64_t chunk, int64_t size) {
    return whole_blocks<A>((2 + Cell::kCarried + (kNorm ? 1 : 0)) * rows * stride +
                           chunk * rows * row_stride<A>(Cell::kGates * size));
  }

  void run() {
    begin();
    const int64_t steps = this->shape.steps;
    for (int64_t i = 0; i < steps; ++i) {
      if (chunk > 0 && i % chunk == 0) project(i, steps - i < chunk ? steps - i : chunk);
      step(i);
      this->crew.wait();  // new_state is whole, and old_state is read no more
      A* const swap = old_state;
      old_state = new_state;
      new_state = swap;
    }
    end();
  }

 private:
  RNNFAST_INLINE int64_t place(int64_t row, int64_t unit) const {
    return row * this->stride + unit;
  }
  RNNFAST_INLINE A* carried_at(int index, int64_t row, int64_t unit) const {
    return carried + index * this->slice.count * this->stride + place(row, unit);
  }

  void begin() {
    this->for_each_vector([&](int64_t row, int64_t unit) {
      const bool fresh = !this->reverse() && this->cut(0, row);
      store_raw(old_state + place(row, unit),
                fresh ? V{} : this->state_or_zero(problem->h_0, 0, row, unit));
      for (int i = 0; i < Cell::kCarried; ++i)
        store_raw(carried_at(i, row, unit),
                  fresh ? V{} : this->state_or_zero(problem->c_0, i, row, unit));
    });
    this->crew.wait();
  }

  void end() {
    this->for_each_vector([&](int64_t row, int64_t unit) {
      const int64_t count = this->shape.size - unit;
      store(this->template state<S>(problem->h_n, 0, row, unit),
            narrow<S>(load(old_state + place(row, unit))), count);
      for (int i = 0; i < Cell::kCarried; ++i)
        store(this->template state<S>(problem->c_n, i, row, unit),
              narrow<S>(load(carried_at(i, row, unit))), count);
    });
  }

  RNNFAST_INLINE int64_t time(int64_t i) const {
    return this->reverse() ? this->shape.steps - 1 - i : i;
  }
  int64_t projected_stride() const { return row_stride<A>(Cell::kGates * this->shape.size); }

  // p of the `count` steps from the i-th on: this member's units of it, which nobody else reads.
  void project(int64_t i, int64_t count) {
    const int64_t rows = this->slice.count;
    const int64_t input_stride = row_stride<A>(problem->input_size);
    const int64_t size = this->shape.size;
    const auto counts = [&](int64_t index) {
      return this->lengths == nullptr || time(i + index / rows) < this->length(index % rows);
    };
    for (int64_t first = 0, end; first < count * rows; first = end) {
      end = count * rows - first < kInputRows ? count * rows : first + kInputRows;
      for (int64_t index = first; index < end; ++index)
        copy_row(inputs + (index - first) * input_stride,
                 static_cast<const S*>(problem->x.data) +
                     time(i + index / rows) * problem->x.stride_t +
                     (this->slice.first + index % rows) * problem->x.stride_b,
                 problem->input_size);
      const Tiling tiles =
          make_tiling(end - first, this->tiling.first_unit, this->tiling.units.total, Cell::kGates,
                      input_weights.sums.chains);
      const auto skip = [&](int64_t row, int64_t row_end) RNNFAST_INLINE_LAMBDA {
        while (row < row_end && !counts(first + row)) ++row;
        return row == row_end;
      };
      const auto epilogue = [&](int64_t row, int64_t vector, int64_t vector_end, const V* p)
                                RNNFAST_INLINE_LAMBDA {
                                  A* const to = projected + (first + row) * projected_stride();
                                  for (; vector < vector_end; ++vector)
                                    for (int gate = 0; gate < Cell::kGates; ++gate, ++p)
                                      store(to + gate * size + vector * L, *p, size - vector * L);
                                };
      for_each_product<A, Cell::kGates>(input_weights, inputs, input_stride, tiles, skip, epilogue);
    }
  }

  struct Step {
    Rows<const P> p, next_p;
    Rows<S> y, next_y, saved, ahat, next_ahat;
    Rows<const A> old_state;
    Rows<A> new_state, carried, preact;
    int64_t carried_stride;  // from one carried value to the next
    int64_t size;
  };

  RNNFAST_INLINE Rows<const P> rows_of_p(int64_t i) const {
    if constexpr (__is_same(P, A)) {
      if (chunk > 0)
        return {projected + i % chunk * this->slice.count * projected_stride(), projected_stride()};
    }
    return this->template rows<const P>(problem->p, Cell::kGates, time(i));
  }

  void step(int64_t i) {
    const int64_t t = time(i);
    const int64_t next = time(i + 1 < this->shape.steps ? i + 1 : i);  // for what is prefetched
    const Step at = {rows_of_p(i),
                     rows_of_p(i + 1 < this->shape.steps ? i + 1 : i),
                     this->template rows<S>(problem->y, 1, t),
                     this->template rows<S>(problem->y, 1, next),
                     this->template rows<S>(problem->saved, Cell::kSaved, t),
                     this->template rows<S>(problem->ahat, 1, t),
                     this->template rows<S>(problem->ahat, 1, next),
                     {old_state, this->stride},
                     {new_state, this->stride},
                     {carried, this->stride},
                     {preact, this->stride},
                     this->slice.count * this->stride,
                     this->shape.size};
    const int64_t* const lengths =
        this->lengths != nullptr ? this->lengths + this->slice.first : nullptr;
    const auto active = [=](int64_t row) RNNFAST_INLINE_LAMBDA {
      return lengths == nullptr || t < lengths[row];
    };
    const auto skip = [&](int64_t row, int64_t end) RNNFAST_INLINE_LAMBDA {
      while (row < end && !active(row)) ++row;
      return row == end;
    };
    const int64_t edge = this->reverse() ? t : t + 1;  // between this step and the one after it
    const std::uint8_t* const resets = edge > 0 ? this->resets(edge) : nullptr;
    const auto forget = [&](int64_t row, int64_t vector, int64_t end) RNNFAST_INLINE_LAMBDA {
      if (resets == nullptr || !this->cut(edge, row)) return;
      for (; vector < end; ++vector) {
        store_raw(at.new_state.at(row, vector * L), V{});
        for (int i = 0; i < Cell::kCarried; ++i)
          store_raw(at.carried.at(row, vector * L) + i * at.carried_stride, V{});
      }
    };
    const auto epilogue = [&](int64_t row, int64_t vector, int64_t end,
                              const V* u) RNNFAST_INLINE_LAMBDA {
      const int64_t first = vector;
      if (!active(row)) {
        for (; vector < end; ++vector) pass(at, row, vector * L);
        return;
      }
      if constexpr (kNorm) {
        for (; vector < end; ++vector, ++u) {
          const int64_t unit = vector * L;
          at.next_p.prefetch(row, unit);
          store_raw(at.preact.at(row, unit), load(at.p.at(row, unit), at.size - unit) + u[0]);
        }
      } else {
        for (; vector < end && end * L <= at.size; ++vector, u += Cell::kGates)
          point<true>(at, row, vector * L, u);
        for (; vector < end; ++vector, u += Cell::kGates) point<false>(at, row, vector * L, u);
        forget(row, first, end);
      }
    };
    for_each_product<A, Cell::kGates>(weights, old_state, this->stride, this->tiling, skip,
                                      epilogue);
    if constexpr (kNorm) {
      this->crew.wait();  // preact is whole
      // The moments of a few rows, then what follows from them: one row alone would wait for its
      // sums, the division and the root.
      constexpr int64_t kFew = 8;
      Moments<A> moments[kFew];
      for (int64_t first = 0, end; first < this->slice.count; first = end) {
        end = this->slice.count - first < kFew ? this->slice.count : first + kFew;
        for (int64_t row = first; row < end; ++row) {
          const bool counts = active(row);
          if (counts)
            moments[row - first] = Moments<A>::of(at.preact.at(row, 0), at.size, problem->norm_eps);
          if (this->crew.index == 0) rstd(t, row) = counts ? moments[row - first].rstd : 0;
        }
        for (int64_t row = first; row < end; ++row) {
          if (!active(row)) continue;
          normalize(at, row, moments[row - first]);
          forget(row, this->tiling.first_unit, this->tiling.first_unit + this->tiling.units.total);
        }
      }
    }
  }

  RNNFAST_INLINE A& rstd(int64_t t, int64_t row) const {
    return static_cast<A*>(problem->rstd)[this->rstd_place(t, row)];
  }

  // Each member of the crew takes the moments of the whole row, and then its own units.
  RNNFAST_INLINE void normalize(const Step& at, int64_t row, const Moments<A>& moments) const {
    const A* const a = at.preact.at(row, 0);
    const A* const gamma = static_cast<const A*>(problem->gamma) + this->parameter(0);
    const A* const beta = problem->beta != nullptr
                              ? static_cast<const A*>(problem->beta) + this->parameter(0)
                              : nullptr;
    for_units<A>(this->first_unit(), this->end_unit(), at.size,
                 [&](auto whole, int64_t unit) RNNFAST_INLINE_LAMBDA {
                   constexpr bool kWhole = decltype(whole)::value;
                   const int64_t count = at.size - unit;
                   at.next_y.prefetch(row, unit);
                   at.next_ahat.prefetch(row, unit);
                   const V ahat = moments.normalize(load(a + unit));
                   store_if<kWhole>(at.ahat.at(row, unit), narrow<S>(ahat), count);
                   const V scaled = ahat * load_if<kWhole>(gamma + unit, count);
                   const V shift = beta != nullptr ? load_if<kWhole>(beta + unit, count) : V{};
                   const V h_prev = load(at.old_state.at(row, unit));
                   const Raw<S> h =
                       narrow<S>(Cell::forward(&scaled, &shift, h_prev, nullptr, nullptr));
                   store_if<kWhole>(at.y.at(row, unit), h, count);
                   store_raw(at.new_state.at(row, unit), widen<S>(h));
                 });
  }

  // A step outside the row's length.
  RNNFAST_INLINE static void pass(const Step& at, int64_t row, int64_t unit) {
    store_raw(at.new_state.at(row, unit), load(at.old_state.at(row, unit)));
    store(at.y.at(row, unit), Raw<S>{}, at.size - unit);
    if constexpr (kNorm) store(at.ahat.at(row, unit), Raw<S>{}, at.size - unit);
  }

  // Kept short: several of them at once, divisions and all, fit what the processor looks ahead.
  template <bool kWhole>
  RNNFAST_INLINE static void point(const Step& at, int64_t row, int64_t unit, const V* u) {
    const int64_t count = at.size - unit;
    at.next_p.prefetch(row, unit);
    at.next_y.prefetch(row, unit);
    Values<V, Cell::kGates> p;
    Values<V, Cell::kCarried> state;
    Values<V, Cell::kSaved> saved;
    for (int i = 0; i < Cell::kGates; ++i)
      p.at[i] = load_if<kWhole>(at.p.at(row, unit + i * at.size), count);
    for (int i = 0; i < Cell::kCarried; ++i)
      state.at[i] = load(at.carried.at(row, unit) + i * at.carried_stride);
    const V h_prev = load(at.old_state.at(row, unit));
    const Raw<S> h = narrow<S>(Cell::forward(p.at, u, h_prev, state.at, saved.at));
    store_if<kWhole>(at.y.at(row, unit), h, count);
    store_raw(at.new_state.at(row, unit), widen<S>(h));
    for (int i = 0; i < Cell::kCarried; ++i)
      store_raw(at.carried.at(row, unit) + i * at.carried_stride, state.at[i]);
    for (int i = 0; i < Cell::kSaved; ++i)
      store_if<kWhole>(at.saved.at(row, unit + i * at.size), narrow<S>(saved.at[i]), count);
  }
};

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
