// Backpropagation through time, generic over the cell (csrc/cells) and the storage type S.
#pragma once

#include "task.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

// kRows: for layer norm, clipping or the record. They need whole rows of dh: a step computes the
// products of all of them first.
template <class Cell, class S, bool kRows>
struct BackwardTask : Task<Cell, S> {
  using Base = Task<Cell, S>;
  using Base::L;
  using typename Base::A;
  using typename Base::V;

  const BackwardProblem* problem;
  Packed<A> weights;
  int64_t du_stride;  // of a row of gates * S
  A* old_du;          // as stored, so that the carry and dW are made of the same numbers
  A* new_du;
  A* direct;    // direct part of the carry
  A* dcarried;  // [kCarried][rows]

  // With kRows:
  A* carried_dh;      // [rows], what came back through time
  A* dn;              // of one row, this thread's own
  A* norm_gradients;  // [B, groups, 2] rows: each one's part of dgamma and dbeta
  double* measured;   // this member's part of the record: [T, rows or 1, kFields]

  static int64_t scratch_elements(int64_t rows, int64_t stride, int64_t du_stride) {
    const int64_t others = (Cell::kDirectGradient ? 1 : 0) + Cell::kCarried + (kRows ? 1 : 0);
    return whole_blocks<A>(rows * (2 * du_stride + others * stride));
  }

  void run() {
    begin();
    const int64_t steps = this->shape.steps;
    for (int64_t i = 0; i < steps; ++i) {
      step(this->reverse() ? i : steps - 1 - i);
      this->crew.wait();  // new_du is whole, and old_du is read no more
      A* const swap = old_du;
      old_du = new_du;
      new_du = swap;
    }
    end();
  }

 private:
  RNNFAST_INLINE int64_t place(int64_t row, int64_t unit) const {
    return row * this->stride + unit;
  }
  RNNFAST_INLINE A* dcarried_at(int index, int64_t row, int64_t unit) const {
    return dcarried + index * this->slice.count * this->stride + place(row, unit);
  }
  // Its part of dgamma; that of dbeta comes after it.
  RNNFAST_INLINE A* norm_gradient(int64_t row) const {
    const int64_t groups = this->shape.directions * this->shape.heads;
    return norm_gradients +
           ((this->slice.first + row) * groups + this->slice.group) * 2 * this->stride;
  }
  bool normalizes() const { return problem->gamma != nullptr; }

  void begin() {
    if (this->crew.index == 0)
      for (int64_t i = 0; i < this->slice.count * du_stride; ++i) old_du[i] = 0;
    this->for_each_vector([&](int64_t row, int64_t unit) {
      if constexpr (Cell::kDirectGradient) store_raw(direct + place(row, unit), V{});
      for (int i = 0; i < Cell::kCarried; ++i)
        store_raw(dcarried_at(i, row, unit), this->state_or_zero(problem->grad_c_n, i, row, unit));
      if (kRows && normalizes()) {
        store_raw(norm_gradient(row) + unit, V{});
        store_raw(norm_gradient(row) + this->stride + unit, V{});
      }
    });
    this->crew.wait();
  }

  struct Step {
    Rows<const S> grad_y, next_grad_y, y, next_y, before, saved, ahat, next_ahat;
    Rows<S> dp, next_dp, du;
    Rows<const A> old_du;
    Rows<A> new_du, direct, dcarried;
    int64_t dcarried_stride;
    int64_t size;
    int64_t t;
    int64_t row;  // the first one

    // For a pass over one row, whose addresses are to be found once.
    RNNFAST_INLINE Step from(int64_t r) const {
      return {grad_y.from(r),
              next_grad_y.from(r),
              y.from(r),
              next_y.from(r),
              before.from(r),
              saved.from(r),
              ahat.from(r),
              next_ahat.from(r),
              dp.from(r),
              next_dp.from(r),
              du.from(r),
              old_du.from(r),
              new_du.from(r),
              direct.from(r),
              dcarried.from(r),
              dcarried_stride,
              size,
              t,
              row + r};
    }
  };

  void step(int64_t t) {
    const bool reverse = this->reverse();
    const int64_t steps = this->shape.steps;
    const int64_t before = reverse ? t + 1 : t - 1;
    const int64_t next = before < 0 || before == steps ? t : before;  // for what is prefetched
    const Step at = {this->template rows<const S>(problem->grad_y, 1, t),
                     this->template rows<const S>(
                         problem->grad_y.data != nullptr ? problem->grad_y : problem->y, 1, next),
                     this->template rows<const S>(problem->y, 1, t),
                     this->template rows<const S>(problem->y, 1, next),
                     this->template rows<const S>(problem->y, 1, next),
                     this->template rows<const S>(problem->saved, Cell::kSaved, t),
                     this->template rows<const S>(problem->ahat, 1, t),
                     this->template rows<const S>(problem->ahat, 1, next),
                     this->template rows<S>(problem->dp, Cell::kGates, t),
                     this->template rows<S>(problem->dp, Cell::kGates, next),
                     this->template rows<S>(problem->du, Cell::kGates, t),
                     {old_du, du_stride},
                     {new_du, du_stride},
                     {direct, this->stride},
                     {dcarried, this->stride},
                     this->slice.count * this->stride,
                     this->shape.size,
                     t,
                     0};
    const int64_t* const lengths =
        this->lengths != nullptr ? this->lengths + this->slice.first : nullptr;
    const auto length = [=](int64_t row) RNNFAST_INLINE_LAMBDA {
      return lengths != nullptr ? lengths[row] : steps;
    };
    // The step at which BPTT enters the row: nothing has come through time yet.
    const auto enters = [=](int64_t row)
                            RNNFAST_INLINE_LAMBDA { return t == (reverse ? 0 : length(row) - 1); };
    // Where the row goes on, whether its gradient ends at the edge that it would come across.
    const int64_t edge = reverse ? t : t + 1;
    const bool window = problem->window > 0 && edge % problem->window == 0;
    const std::uint8_t* const resets = this->resets(edge);
    const auto stops = [=](int64_t row) RNNFAST_INLINE_LAMBDA {
      return window || (resets != nullptr && resets[row] != 0);
    };
    const auto skip = [&](int64_t row, int64_t end) RNNFAST_INLINE_LAMBDA {
      while (row < end && (t >= length(row) || enters(row) || stops(row))) ++row;
      return row == end;
    };
    const auto epilogue = [&](int64_t row, int64_t vector, int64_t end,
                              const V* product) RNNFAST_INLINE_LAMBDA {
      if (t >= length(row)) {
        for (; vector < end; ++vector) pass(at, row, vector * L);
      } else if (enters(row) || stops(row)) {
        for (; vector < end; ++vector) start(at, row, vector * L, enters(row));
      } else if constexpr (kRows) {
        for (; vector < end; ++vector, ++product)
          store_raw(carried_dh + place(row, vector * L), carry(at, row, vector * L, product));
      } else if (end * L <= at.size) {
        for (; vector < end; ++vector, ++product) {
          const int64_t unit = vector * L;
          point<true>(at, row, unit, carry(at, row, unit, product) + grad_y<true>(at, row, unit));
        }
      } else {
        for (; vector < end; ++vector, ++product) {
          const int64_t unit = vector * L;
          point<false>(at, row, unit, carry(at, row, unit, product) + grad_y<false>(at, row, unit));
        }
      }
    };
    for_each_product<A, 1>(weights, old_du, du_stride, this->tiling, skip, epilogue);
    if constexpr (kRows) {
      this->crew.wait();  // carried_dh is whole
      for (int64_t row = 0; row < this->slice.count; ++row)
        if (t < length(row)) finish(at.from(row), enters(row), !enters(row) && !stops(row));
    }
  }

  RNNFAST_INLINE static V carry(const Step& at, int64_t row, int64_t unit, const V* product) {
    if constexpr (Cell::kDirectGradient) return product[0] + load(at.direct.at(row, unit));
    return product[0];
  }

  template <bool kWhole>
  RNNFAST_INLINE static V grad_y(const Step& at, int64_t row, int64_t unit) {
    if (at.grad_y.data == nullptr) return V{};
    return load_if<kWhole>(at.grad_y.at(row, unit), at.size - unit);
  }

  // A step that nothing comes back to: the row's last one, or one before an edge that stops it.
  RNNFAST_INLINE void start(const Step& at, int64_t row, int64_t unit, bool enters) const {
    if (!enters)
      for (int i = 0; i < Cell::kCarried; ++i) store_raw(dcarried_at(i, row, unit), V{});
    if constexpr (kRows) {
      store_raw(carried_dh + place(row, unit), V{});
    } else {
      const V last = enters ? this->state_or_zero(problem->grad_h_n, 0, row, unit) : V{};
      point<false>(at, row, unit, last + grad_y<false>(at, row, unit));
    }
  }

  // With several gates the rest of the last vector belongs to the next gate.
  template <bool kWhole>
  RNNFAST_INLINE static void keep_du(const Step& at, int64_t row, int64_t unit, int gate, V value) {
    A* const to = at.new_du.at(row, gate * at.size + unit);
    store_if<kWhole || Cell::kGates == 1>(to, value, at.size - unit);
  }

  // A step outside the row's length: the gradient waits, nothing flows into p.
  RNNFAST_INLINE static void pass(const Step& at, int64_t row, int64_t unit) {
    const int64_t count = at.size - unit;
    for (int i = 0; i < Cell::kGates; ++i) {
      const int64_t place = unit + i * at.size;
      keep_du<false>(at, row, unit, i, load(at.old_du.at(row, place), count));
      store(at.dp.at(row, place), Raw<S>{}, count);
      if constexpr (Cell::kSplitGradient) store(at.du.at(row, place), Raw<S>{}, count);
    }
  }

  RNNFAST_INLINE V state_before(const Step& at, int64_t row, int64_t unit) const {
    const int64_t r = at.row + row;
    if (this->cut(this->reverse() ? at.t + 1 : at.t, r)) return V{};
    const bool first = this->reverse() ? at.t == this->length(r) - 1 : at.t == 0;
    if (first) return this->state_or_zero(problem->h_0, 0, r, unit);
    return load(at.before.at(row, unit), at.size - unit);
  }

  // From dh, all of it, to dp and what goes back through time.
  template <bool kWhole>
  RNNFAST_INLINE void point(const Step& at, int64_t row, int64_t unit, V dh) const {
    const int64_t count = at.size - unit;
    at.next_grad_y.prefetch(row, unit);
    at.next_y.prefetch(row, unit);
    at.next_dp.prefetch(row, unit);
    const V h = load_if<kWhole>(at.y.at(row, unit), count);
    V h_before = {};
    if constexpr (Cell::kReadsPrevious) h_before = state_before(at, row, unit);
    Values<V, Cell::kSaved> saved;
    for (int i = 0; i < Cell::kSaved; ++i)
      saved.at[i] = load_if<kWhole>(at.saved.at(row, unit + i * at.size), count);
    Values<V, Cell::kCarried> state;
    for (int i = 0; i < Cell::kCarried; ++i)
      state.at[i] = load(at.dcarried.at(row, unit) + i * at.dcarried_stride);
    Values<V, Cell::kGates> dp;
    Values<V, Cell::kSplitGradient ? Cell::kGates : 0> du;
    const V bypass = Cell::backward(dh, h, h_before, saved.at, state.at, dp.at, du.at);
    if constexpr (Cell::kDirectGradient) store_raw(at.direct.at(row, unit), bypass);
    for (int i = 0; i < Cell::kCarried; ++i)
      store_raw(at.dcarried.at(row, unit) + i * at.dcarried_stride, state.at[i]);
    for (int i = 0; i < Cell::kGates; ++i) {
      Raw<S> stored = narrow<S>(dp.at[i]);
      store_if<kWhole>(at.dp.at(row, unit + i * at.size), stored, count);
      if constexpr (Cell::kSplitGradient) {
        stored = narrow<S>(du.at[i]);
        store_if<kWhole>(at.du.at(row, unit + i * at.size), stored, count);
      }
      keep_du<kWhole>(at, row, unit, i, widen<S>(stored));
    }
  }

  // ------------------------------------------------------------------------------- whole rows

  // What is measured of a row, or of this member's units of it.
  struct Measures {
    Squares<A> state, carry, preact;
    V largest = {};
    V slopes = {};
    V finite = {};  // NaN from the first h on that is inf or NaN
  };

  // dh of a row, from what came through time and what came from outside.
  struct Gradient {
    const Step& at;  // from this row on
    const A* through_time;
    const S* grad_y;
    const S* grad_h_n;  // at the row's last step

    template <bool kWhole>
    RNNFAST_INLINE V of(int64_t unit) const {
      const int64_t count = at.size - unit;
      V dh = load(through_time + unit);
      if (grad_y != nullptr) dh += load_if<kWhole>(grad_y + unit, count);
      if (grad_h_n != nullptr) dh += load(grad_h_n + unit, count);
      return dh;
    }
  };

  RNNFAST_INLINE void finish(const Step& at, bool enters, bool carried) const {
    const bool last = enters && problem->grad_h_n != nullptr;
    const Gradient dh = {
        at, carried_dh + place(at.row, 0),
        problem->grad_y.data != nullptr ? at.grad_y.data : nullptr,
        last ? this->template state<const S>(problem->grad_h_n, 0, at.row, 0) : nullptr};
    const double scale = problem->clip < __builtin_inf() ? clipping(dh) : 1;
    if (measured != nullptr) {
      Measures measures;
      finish(dh, scale, &measures);
      keep(dh, scale, carried, measures);
    } else {
      finish(dh, scale, nullptr);
    }
  }

  RNNFAST_INLINE void finish(const Gradient& dh, double scale, Measures* measures) const {
    if (Cell::kNormalizes && normalizes()) {
      if constexpr (Cell::kNormalizes) through_norm(dh, static_cast<A>(scale), measures);
      return;
    }
    for_units<A>(this->first_unit(), this->end_unit(), dh.at.size,
                 [&](auto whole, int64_t unit) RNNFAST_INLINE_LAMBDA {
                   constexpr bool kWhole = decltype(whole)::value;
                   const V value = dh.template of<kWhole>(unit);
                   point<kWhole>(dh.at, 0, unit, value * static_cast<A>(scale));
                   if (measures != nullptr) measure<kWhole>(dh, unit, value, *measures);
                 });
  }

  // Every member of the crew takes the norm of the whole row.
  RNNFAST_INLINE double clipping(const Gradient& dh) const {
    Squares<A> squares;
    for_units<A>(0, dh.at.size, dh.at.size, [&](auto whole, int64_t unit) RNNFAST_INLINE_LAMBDA {
      constexpr bool kWhole = decltype(whole)::value;
      const V value = dh.template of<kWhole>(unit);
      squares.add(kWhole ? value : first_lanes<A>(value, dh.at.size - unit));
    });
    const double norm = __builtin_sqrt(squares.total());
    return norm > problem->clip && norm < __builtin_inf() ? problem->clip / norm : 1;
  }

  // da = rstd (dahat - mean(dahat) - ahat mean(dahat ahat)) with dahat = gamma dn. Every member of
  // the crew takes the means of the whole row.
  //
  // An h that was rounded to 16 bits has few digits of f' left where f is flat, and dgamma is the
  // sum of what is lost. There f takes h from ahat anew: the flatter it is, the less it makes of
  // the rounding of ahat. Where the sign is all that counts, that of the stored h is the right one.
  RNNFAST_INLINE void through_norm(const Gradient& dh, A scale, Measures* measures) const {
    const Step& at = dh.at;
    const A* const gamma = static_cast<const A*>(problem->gamma) + this->parameter(0);
    const A* const beta = problem->beta != nullptr
                              ? static_cast<const A*>(problem->beta) + this->parameter(0)
                              : nullptr;
    const A rstd = static_cast<const A*>(problem->rstd)[this->rstd_place(at.t, at.row)];
    A means[2];
    sum_row<A>(at.size, means, [&](auto whole, int64_t unit, V* values) RNNFAST_INLINE_LAMBDA {
      constexpr bool kWhole = decltype(whole)::value;
      const int64_t count = at.size - unit;
      const V gain = load_if<kWhole>(gamma + unit, count);
      const V ahat = load_if<kWhole>(at.ahat.at(0, unit), count);
      V h;
      if constexpr (sizeof(S) == sizeof(A) || Cell::kSignAlone) {
        h = load_if<kWhole>(at.y.at(0, unit), count);
      } else {
        const V scaled = ahat * gain;
        const V shift = beta != nullptr ? load_if<kWhole>(beta + unit, count) : V{};
        h = Cell::forward(&scaled, &shift, V{}, nullptr, nullptr);
      }
      V value;
      Cell::backward(dh.template of<kWhole>(unit) * scale, h, V{}, nullptr, nullptr, &value,
                     nullptr);
      store_raw(dn + unit, value);
      values[0] = value * gain;
      values[1] = values[0] * ahat;
    });
    for (A& mean : means) mean /= static_cast<A>(at.size);
    A* const dgamma = norm_gradient(at.row);
    A* const dbeta = dgamma + this->stride;
    for_units<A>(this->first_unit(), this->end_unit(), at.size,
                 [&](auto whole, int64_t unit) RNNFAST_INLINE_LAMBDA {
                   constexpr bool kWhole = decltype(whole)::value;
                   const int64_t count = at.size - unit;
                   at.next_grad_y.prefetch(0, unit);
                   at.next_y.prefetch(0, unit);
                   at.next_ahat.prefetch(0, unit);
                   at.next_dp.prefetch(0, unit);
                   const V value = load(dn + unit);
                   const V ahat = load_if<kWhole>(at.ahat.at(0, unit), count);
                   store_raw(dgamma + unit, load(dgamma + unit) + value * ahat);
                   store_raw(dbeta + unit, load(dbeta + unit) + value);
                   const V dahat = value * load_if<kWhole>(gamma + unit, count);
                   const Raw<S> da = narrow<S>(((dahat - means[0]) - ahat * means[1]) * rstd);
                   store_if<kWhole>(at.dp.at(0, unit), da, count);
                   keep_du<kWhole>(at, 0, unit, 0, widen<S>(da));
                   if (measures != nullptr)
                     measure<kWhole>(dh, unit, dh.template of<kWhole>(unit), *measures);
                 });
  }

  // `value` is dh of these units; their da has just been written.
  template <bool kWhole>
  RNNFAST_INLINE void measure(const Gradient& dh, int64_t unit, V value, Measures& sums) const {
    const int64_t count = dh.at.size - unit;
    const V h = load_if<kWhole>(dh.at.y.at(0, unit), count);
    V slope;
    Cell::backward(V{} + A(1), h, V{}, nullptr, nullptr, &slope, nullptr);
    V past = load(dh.through_time + unit), da = load(dh.at.new_du.at(0, unit));
    if constexpr (!kWhole) {
      value = first_lanes<A>(value, count);
      past = first_lanes<A>(past, count);
      da = first_lanes<A>(da, count);
      slope = first_lanes<A>(slope, count);
    }
    sums.state.add(value);
    sums.carry.add(past);
    sums.preact.add(da);
    sums.largest = value > sums.largest ? value : sums.largest;
    sums.largest = -value > sums.largest ? -value : sums.largest;
    sums.slopes += slope;
    sums.finite += h * A(0);
  }

  // Adds a row to the record.
  RNNFAST_INLINE void keep(const Gradient& dh, double scale, bool carried,
                           const Measures& sums) const {
    const int64_t rows = problem->per_sample ? this->slice.count : 1;
    double* const to =
        measured + (dh.at.t * rows + (problem->per_sample ? dh.at.row : 0)) * kFields;
    const int64_t end = this->end_unit() < dh.at.size ? this->end_unit() : dh.at.size;
    const double state = sums.state.total(), preact = sums.preact.total();
    const double largest = static_cast<double>(largest_lane<A>(sums.largest));
    to[kStateSquares] += state;
    to[kCarrySquares] += sums.carry.total();
    to[kClippedSquares] += state * scale * scale;
    to[kPreactSquares] += preact;
    to[kStateMax] = larger(to[kStateMax], state == state ? largest : state);  // NaN where one is
    to[kSlopes] += static_cast<double>(sum_lanes<A>(sums.slopes));
    const int64_t units = end > this->first_unit() ? end - this->first_unit() : 0;
    to[kEntries] += static_cast<double>(units);
    if (carried) to[kCarried] += static_cast<double>(units);
    const double any = state + preact + static_cast<double>(sum_lanes<A>(sums.finite));
    if (any - any != 0) count_nonfinite(dh, to);
  }

  [[gnu::noinline]] void count_nonfinite(const Gradient& dh, double* to) const {
    const auto finite = [](double x) { return x - x == 0; };
    for (int64_t unit = this->first_unit(); unit < this->end_unit(); unit += L) {
      const int64_t count = dh.at.size - unit < L ? dh.at.size - unit : L;
      const V value = dh.template of<false>(unit);
      const V da = load(dh.at.new_du.at(0, unit));
      const V h = load(dh.at.y.at(0, unit), count);
      for (int64_t i = 0; i < count; ++i) {
        to[kNonfiniteGrad] += finite(value[i]) && finite(da[i]) ? 0 : 1;
        to[kNonfiniteState] += finite(h[i]) ? 0 : 1;
      }
    }
  }

  void end() {
    if (problem->dh_0 == nullptr && problem->dc_0 == nullptr) return;
    const auto skip = [&](int64_t, int64_t)
                          RNNFAST_INLINE_LAMBDA { return problem->dh_0 == nullptr; };
    const auto epilogue = [&](int64_t row, int64_t vector, int64_t end,
                              const V* product) RNNFAST_INLINE_LAMBDA {
      const bool fresh = !this->reverse() && this->cut(0, row);
      for (; vector < end; ++vector, ++product) {
        const int64_t unit = vector * L;
        const int64_t count = this->shape.size - unit;
        if (problem->dh_0 != nullptr) {
          V dh_0 = this->state_or_zero(problem->grad_h_n, 0, row, unit);  // of a row of length 0
          if (this->length(row) > 0) {
            dh_0 = product[0];
            if constexpr (Cell::kDirectGradient) dh_0 += load(direct + place(row, unit));
          }
          if (fresh) dh_0 = V{};
          store(this->template state<S>(problem->dh_0, 0, row, unit), narrow<S>(dh_0), count);
        }
        if (problem->dc_0 != nullptr) {
          for (int i = 0; i < Cell::kCarried; ++i)
            store(this->template state<S>(problem->dc_0, i, row, unit),
                  narrow<S>(fresh ? V{} : load(dcarried_at(i, row, unit))), count);
        }
      }
    };
    for_each_product<A, 1>(weights, old_du, du_stride, this->tiling, skip, epilogue);
  }
};

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
