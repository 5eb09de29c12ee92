// The time loop forward, for any cell, in the storage type S.
#pragma once

#include "task.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

// Rows of x that are copied and projected at once.
constexpr int64_t kInputRows = 96;

// With layer norm of what goes into the cell, a step computes the products of whole rows first.
template <class S>
struct ForwardTask : Task<S> {
  using Base = Task<S>;
  using Base::L;
  using typename Base::A;
  using typename Base::V;

  const ForwardProblem* problem;
  Packed<A> weights;
  A* old_state;  // as stored in y: rounded, so that backward and dW see what the step saw
  A* new_state;
  A* carried;     // [carried][rows]
  A* unrounded;   // [rows], where S is narrow and the cell has a direct gradient
  A* preact;      // [gates][rows], with layer norm
  A* normalized;  // [few rows][gates], this thread's own, with layer norm
  A* absent;      // [gates * S] of -0, which changes no sum: p where it is in preact already

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

  void run() {
    begin();
    const int64_t steps = this->shape.steps;
    const ForwardStep<S> first = step_at_0();
    ForwardStep<S> at = first;
    for (int64_t i = 0; i < steps; ++i) {
      if (chunk > 0 && i % chunk == 0) project(i, steps - i < chunk ? steps - i : chunk);
      advance(at, first, i);
      step(at, time(i));
      this->crew.wait();  // new_state is whole, and old_state is read no more
      A* const swap = old_state;
      old_state = new_state;
      new_state = swap;
    }
    end();
  }

 private:
  const CellFacts& facts() const { return this->cell->facts; }
  int gates() const { return facts().gates; }
  int64_t size() const { return this->shape.size; }
  bool norms() const { return problem->gamma != nullptr; }
  bool reads_unrounded() const { return sizeof(S) != sizeof(A) && facts().direct_gradient; }
  RNNFAST_INLINE int64_t place(int64_t row, int64_t unit) const {
    return row * this->stride + unit;
  }
  int64_t plane() const { return this->slice.count * this->stride; }
  RNNFAST_INLINE A* carried_at(int index, int64_t row, int64_t unit) const {
    return carried + index * plane() + place(row, unit);
  }
  RNNFAST_INLINE A* preact_at(int gate, int64_t row) const {
    return preact + (row * gates() + gate) * this->stride;
  }
  const A* parameters() const {
    return static_cast<const A*>(problem->parameters) + this->slice.group * size();
  }
  // Tensors of the states that are carried beside h, or that h is made of.
  const void* carried_0() const { return facts().emits ? problem->h_0 : problem->c_0; }
  void* carried_n() const { return facts().emits ? problem->h_n : problem->c_n; }

  // h of this member's units of a row whose carried states are set.
  void emit(A* to, int64_t row) const {
    const int64_t first = this->first_unit();
    const int64_t count = (this->end_unit() < size() ? this->end_unit() : size()) - first;
    if (count <= 0) return;
    A* const h = to + place(row, first);
    this->cell->emit(carried_at(0, row, first), plane(), parameters() + first, this->all_units(),
                     count, h);
    round_to_storage<S>(h, count);
  }

  void begin() {
    this->for_each_vector([&](int64_t row, int64_t unit) {
      const bool fresh = !this->reverse() && this->cut(0, row);
      const V h_0 = fresh ? V{} : this->state_or_zero(problem->h_0, row, unit);
      store_raw(old_state + place(row, unit), h_0);
      if (reads_unrounded()) store_raw(unrounded + place(row, unit), h_0);
      for (int i = 0; i < facts().carried; ++i)
        store_raw(carried_at(i, row, unit),
                  fresh ? V{} : this->state_or_zero(carried_0(), row, unit));
    });
    if (facts().emits)
      for (int64_t row = 0; row < this->slice.count; ++row) emit(old_state, row);
    this->crew.wait();
  }

  void end() {
    this->for_each_vector([&](int64_t row, int64_t unit) {
      const int64_t count = size() - unit;
      if (!facts().emits)
        store(this->template state<S>(problem->h_n, row, unit),
              narrow<S>(load(old_state + place(row, unit))), count);
      for (int i = 0; i < facts().carried; ++i)
        store(this->template state<S>(carried_n(), row, unit),
              narrow<S>(load(carried_at(i, row, unit))), count);
    });
  }

  RNNFAST_INLINE int64_t time(int64_t i) const {
    return this->reverse() ? this->shape.steps - 1 - i : i;
  }
  int64_t projected_stride() const { return row_stride<A>(gates() * size()); }

  // p of the `count` steps from the i-th on: this member's units of it, which nobody else reads.
  void project(int64_t i, int64_t count) {
    const int64_t rows = this->slice.count;
    const int64_t input_stride = row_stride<A>(problem->input_size);
    const int64_t stride = projected_stride(), size = this->size();
    const int gates = this->gates();
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
      const Tiling tiles = make_tiling(end - first, this->tiling.first_unit,
                                       this->tiling.units.total, gates, input_weights.sums.chains);
      const auto skip = [&](int64_t row, int64_t row_end) RNNFAST_INLINE_LAMBDA {
        while (row < row_end && !counts(first + row)) ++row;
        return row == row_end;
      };
      const auto epilogue = [&](const Tile<A>& tile) RNNFAST_INLINE_LAMBDA {
        for (int64_t row = tile.row; row < tile.row_end; ++row)
          for (int gate = 0; gate < gates; ++gate) {
            const V* p = tile.products + (row - tile.row) * tile.row_stride + gate;
            A* const to = projected + (first + row) * stride + gate * size;
            for_units<A>(tile.first * L, tile.end * L, size,
                         [&](auto whole, int64_t unit) RNNFAST_INLINE_LAMBDA {
                           store_if<decltype(whole)::value>(to + unit, *p, size - unit);
                           p += gates;
                         });
          }
      };
      for_each_product(input_weights, inputs, input_stride, gates, tiles, skip, epilogue);
    }
  }

  ForwardStep<S> step_at_0() const {
    ForwardStep<S> at;
    at.size = size();
    if (chunk == 0) at.p = this->template rows<const S>(problem->p, gates(), 0);
    at.y = this->template rows<S>(problem->y, 1, 0);
    at.saved = this->template rows<S>(problem->saved, facts().saved, 0);
    at.cells = this->template rows<S>(problem->cells, 1, 0);
    at.carried = carried;
    at.unrounded = unrounded;
    at.stride = this->stride;
    at.plane = plane();
    at.parameters = parameters();
    at.parameter_stride = this->all_units();
    return at;
  }
  RNNFAST_INLINE void advance(ForwardStep<S>& at, const ForwardStep<S>& first, int64_t i) const {
    const int64_t t = time(i);
    const bool last = i + 1 == this->shape.steps;
    const int64_t towards = last ? 0 : this->reverse() ? -1 : 1;
    if (chunk > 0) {
      const int64_t step = this->slice.count * projected_stride(), place = i % chunk;
      set_p(at, {projected + place * step, projected_stride()});
      at.next_p = place + 1 < chunk && !last ? step : 0;
    } else {
      at.p.data = first.p.data + t * problem->p.stride_t;
      at.next_p = towards * problem->p.stride_t;
    }
    at.y.data = first.y.data + t * problem->y.stride_t;
    at.next_y = towards * problem->y.stride_t;
    if (first.saved.data != nullptr) {
      at.saved.data = first.saved.data + t * problem->saved.stride_t;
      at.next_saved = towards * problem->saved.stride_t;
    }
    if (first.cells.data != nullptr) at.cells.data = first.cells.data + t * problem->cells.stride_t;
    at.old_state = old_state;
    at.new_state = new_state;
  }
  RNNFAST_INLINE static void set_p(ForwardStep<S>& at, Rows<const A> rows) {
    if constexpr (__is_same(S, A)) {
      at.p = rows;
    } else {
      at.projected = rows;
    }
  }
  template <bool kWhole>
  RNNFAST_INLINE static V p_at(const ForwardStep<S>& at, int64_t row, int64_t place,
                               int64_t count) {
    if (sizeof(S) != sizeof(A) && at.projected.data != nullptr)
      return load_if<kWhole>(at.projected.at(row, place), count);
    prefetch(at.p.at(row, place), at.next_p);
    return load_if<kWhole>(at.p.at(row, place), count);
  }

  void step(const ForwardStep<S>& at, int64_t t) {
    const int64_t* const lengths =
        this->lengths != nullptr ? this->lengths + this->slice.first : nullptr;
    const auto active = [=](int64_t row) RNNFAST_INLINE_LAMBDA {
      return lengths == nullptr || t < lengths[row];
    };
    const auto skip = [&](int64_t row, int64_t end) RNNFAST_INLINE_LAMBDA {
      while (row < end && !active(row)) ++row;
      return row == end;
    };
    const bool norms = this->norms();
    const auto compute = [&](const Tile<A>& tile) RNNFAST_INLINE_LAMBDA {
      if (norms) return tile.end * L <= at.size ? keep<true>(at, tile) : keep<false>(at, tile);
      this->cell->forward(at, {tile.row, tile.row_end, tile.first, tile.end, tile.products,
                               tile.row_stride, gates()});
      if (this->reset == nullptr) return;
      for (int64_t row = tile.row; row < tile.row_end; ++row)
        forget(t, row, tile.first * L, tile.end * L);
    };
    const auto epilogue = [&](const Tile<A>& tile) RNNFAST_INLINE_LAMBDA {
      if (lengths == nullptr) return compute(tile);
      for (int64_t row = tile.row, end; row < tile.row_end; row = end) {
        end = row + 1;
        if (active(row)) {
          while (end < tile.row_end && active(end)) ++end;
          compute(tile.rows(row, end));
        } else {
          pass(t, row, tile.first * L, tile.end * L);
        }
      }
    };
    for_each_product(weights, old_state, this->stride, gates(), this->tiling, skip, epilogue);
    if (norms) {
      this->crew.wait();  // preact is whole
      normalize(at, t);
    }
  }

  // A reset between this step and the one after it sets the state to zero.
  RNNFAST_INLINE void forget(int64_t t, int64_t row, int64_t unit, int64_t end) const {
    const int64_t edge = this->reverse() ? t : t + 1;
    if (this->reset == nullptr || edge == 0 || !this->cut(edge, row)) return;
    for (; unit < end; unit += L) {
      store_raw(new_state + place(row, unit), V{});
      if (reads_unrounded()) store_raw(unrounded + place(row, unit), V{});
      for (int i = 0; i < facts().carried; ++i) store_raw(carried_at(i, row, unit), V{});
    }
    if (facts().emits) emit(new_state, row);
  }

  // A step outside the row's length.
  void pass(int64_t t, int64_t row, int64_t unit, int64_t end) const {
    const Rows<S> y = this->template rows<S>(problem->y, 1, t);
    const Rows<S> ahat = this->template rows<S>(problem->ahat, gates(), t);
    const Rows<S> saved = this->template rows<S>(problem->saved, facts().saved, t);
    const Rows<S> cells = this->template rows<S>(problem->cells, 1, t);
    for (; unit < end; unit += L) {
      if (cells.data != nullptr) store(cells.at(row, unit), Raw<S>{}, size() - unit);
      store_raw(new_state + place(row, unit), load(old_state + place(row, unit)));
      store(y.at(row, unit), Raw<S>{}, size() - unit);
      for (int i = 0; saved.data != nullptr && i < facts().saved; ++i)
        store(saved.at(row, i * size() + unit), Raw<S>{}, size() - unit);
      for (int gate = 0; norms() && gate < gates(); ++gate)
        store(ahat.at(row, gate * size() + unit), Raw<S>{}, size() - unit);
    }
  }

  // ------------------------------------------------------------------------------- layer norm

  // What is normalized, gate by gate: p + u, or u alone.
  template <bool kWhole>
  void keep(const ForwardStep<S>& at, const Tile<A>& tile) const {
    const int gates = this->gates();
    const bool with_p = !problem->norm_recurrent;
    const int64_t first = tile.first * L, end = tile.end * L, size = this->size();
    for (int64_t row = tile.row; row < tile.row_end; ++row)
      for (int gate = 0; gate < gates; ++gate) {
        const V* u = tile.products + (row - tile.row) * tile.row_stride + gate;
        A* const to = preact_at(gate, row);
        for (int64_t unit = first; unit < end; unit += L, u += gates) {
          V value = *u;
          if (with_p) value = p_at<kWhole>(at, row, gate * size + unit, size - unit) + value;
          store_raw(to + unit, value);
        }
      }
  }

  // The moments of a few rows, then what follows from them: one row alone would wait for its sums,
  // the division and the root. Each member of the crew takes the moments of the whole row, and then
  // its own units.
  [[gnu::noinline]] void normalize(ForwardStep<S> at, int64_t t) const {
    const int64_t first_vector = this->tiling.first_unit;
    const int64_t end_vector = first_vector + this->tiling.units.total;
    const Rows<S> ahat = this->template rows<S>(problem->ahat, gates(), t);
    if (!problem->norm_recurrent) {
      at.projected = {};
      set_p(at, {absent, 0});
      at.next_p = 0;
    }
    Moments<A> moments[kFewRows];
    for (int64_t first = 0, end; first < this->slice.count; first = end) {
      end = first + 1;
      const bool counts = t < this->length(first);
      while (end < this->slice.count && end - first < kFewRows && (t < this->length(end)) == counts)
        ++end;
      for (int64_t row = first; row < end; ++row) {
        if (counts)
          moments[row - first] =
              Moments<A>::of(preact_at(0, row), gates(), this->stride, size(), problem->norm_eps);
        if (this->crew.index == 0)
          static_cast<A*>(problem->rstd)[this->rstd_place(t, row)] =
              counts ? moments[row - first].rstd : 0;
      }
      if (!counts) continue;
      const int64_t row_stride = gates() * this->stride;
      for (int64_t row = first; row < end; ++row)
        for (int gate = 0; gate < gates(); ++gate)
          normalize_gate(moments[row - first], gate, row,
                         normalized + (row - first) * row_stride + gate * this->stride,
                         {ahat.at(row, gate * size()), at.next_y});
      this->cell->forward(at, {first, end, first_vector, end_vector,
                               reinterpret_cast<const V*>(normalized) + first_vector,
                               row_stride / L, 1, this->stride / L});
      for (int64_t row = first; row < end; ++row) forget(t, row, first_vector * L, end_vector * L);
    }
  }

  // Rows<S>: its stride is here the way to the next step.
  RNNFAST_INLINE void normalize_gate(const Moments<A>& moments, int gate, int64_t row, A* to,
                                     Rows<S> ahat_row) const {
    const A* const a = preact_at(gate, row);
    const int64_t own = this->group_width() + gate * size();
    const A* const gamma = static_cast<const A*>(problem->gamma) + own;
    const A* const beta =
        problem->beta != nullptr ? static_cast<const A*>(problem->beta) + own : nullptr;
    for_units<A>(this->first_unit(), this->end_unit(), size(),
                 [&](auto whole, int64_t unit) RNNFAST_INLINE_LAMBDA {
                   constexpr bool kWhole = decltype(whole)::value;
                   const int64_t count = size() - unit;
                   prefetch(ahat_row.data + unit, ahat_row.stride);
                   const V ahat = moments.normalize(load(a + unit));
                   store_if<kWhole>(ahat_row.data + unit, narrow<S>(ahat), count);
                   // Both are loaded first: a branch between product and sum would keep the
                   // compiler from fusing them, in some vectors of a row and not in others.
                   const V scale = load_if<kWhole>(gamma + unit, count);
                   const V shift = beta != nullptr ? load_if<kWhole>(beta + unit, count) : V{};
                   store_raw(to + unit, ahat * scale + shift);
                 });
  }
};

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
