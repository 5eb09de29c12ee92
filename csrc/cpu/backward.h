// Backpropagation through time, for any cell, in the storage type S.
#pragma once

#include "record.h"
#include "task.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

// Layer norm, clipping and the record need whole rows of dh: a step computes the products of all of
// them first.
template <class S>
struct BackwardTask : Task<S> {
  using Base = Task<S>;
  using Base::L;
  using typename Base::A;
  using typename Base::V;

  const BackwardProblem* problem;
  const Edges* edges;
  Packed<A> weights;
  int64_t du_stride;  // of a row of gates * S
  A* old_du;          // as stored, so that the carry and dW are made of the same numbers
  A* new_du;
  A* direct;        // direct part of the carry
  A* old_dcarried;  // [carried][rows], from the step after
  A* new_dcarried;
  A* total;        // [rows], where the record wants it: of the first carried state
  A* dparameters;  // [B, groups, parameters] rows: each one's part
  A* own_dh;       // of a few rows, this thread's own, and after it the same clipped
  // Where rows are whole:
  bool whole_rows;
  A* carried_dh;      // [rows], what came back through time
  A* dn;              // [rows][gates], with layer norm
  A* norm_gradients;  // [B, groups, 2, gates] rows: each one's part of dgamma and dbeta
  double* measured;   // this member's part of the record: [T, rows or 1, kFields]

  void run() {
    begin();
    const int64_t steps = this->shape.steps;
    for (int64_t i = 0; i < steps; ++i) {
      step(this->reverse() ? i : steps - 1 - i);
      this->crew.wait();  // new_du is whole, and old_du is read no more
      swap(old_du, new_du);
      swap(old_dcarried, new_dcarried);
    }
    end();
  }

 private:
  static void swap(A*& a, A*& b) {
    A* const kept = a;
    a = b;
    b = kept;
  }
  const CellFacts& facts() const { return this->cell->facts; }
  int gates() const { return facts().gates; }
  int64_t size() const { return this->shape.size; }
  bool norms() const { return problem->gamma != nullptr; }
  RNNFAST_INLINE int64_t place(int64_t row, int64_t unit) const {
    return row * this->stride + unit;
  }
  int64_t plane() const { return this->slice.count * this->stride; }
  RNNFAST_INLINE A* dcarried_at(int index, int64_t row, int64_t unit) const {
    return old_dcarried + index * plane() + place(row, unit);
  }
  // Rows of [B, groups, values]: those of one row of the batch.
  int64_t of_row(int64_t row, int values) const {
    const int64_t groups = this->shape.directions * this->shape.heads;
    return ((this->slice.first + row) * groups + this->slice.group) * values * this->stride;
  }
  // Its part of dgamma; that of dbeta comes after it.
  A* norm_gradient(int64_t row) const { return norm_gradients + of_row(row, 2 * gates()); }
  const A* parameters() const {
    return static_cast<const A*>(problem->parameters) + this->slice.group * size();
  }
  const void* grad_carried_n() const {
    return facts().emits ? problem->grad_h_n : problem->grad_c_n;
  }
  // The gradient from outside of h at a row's last step.
  const void* grad_h_n() const { return facts().emits ? nullptr : problem->grad_h_n; }

  void begin() {
    if (this->crew.index == 0)
      for (int64_t i = 0; i < this->slice.count * du_stride; ++i) old_du[i] = 0;
    this->for_each_vector([&](int64_t row, int64_t unit) {
      if (facts().direct_gradient) store_raw(direct + place(row, unit), V{});
      for (int i = 0; i < facts().carried; ++i)
        store_raw(dcarried_at(i, row, unit), this->state_or_zero(grad_carried_n(), row, unit));
      for (int i = 0; i < facts().parameters; ++i)
        store_raw(dparameters + of_row(row, facts().parameters) + i * this->stride + unit, V{});
      for (int i = 0; norms() && i < 2 * gates(); ++i)
        store_raw(norm_gradient(row) + i * this->stride + unit, V{});
    });
    this->crew.wait();
  }

  BackwardStep<S> at_step(int64_t t) const {
    const int64_t towards = this->reverse() ? 1 : -1;  // to the step before it
    const bool last = this->reverse() ? t + 1 == this->shape.steps : t == 0;
    BackwardStep<S> at;
    at.t = t;
    at.size = size();
    at.grad_y = this->template rows<const S>(problem->grad_y, 1, t);
    at.grad_cells = this->template rows<const S>(problem->grad_cells, 1, t);
    at.y = this->template rows<const S>(problem->y, 1, t);
    at.saved = this->template rows<const S>(problem->saved, facts().saved, t);
    at.ahat = this->template rows<const S>(problem->ahat, gates(), t);
    at.dp = this->template rows<S>(problem->dp, gates(), t);
    at.du = this->template rows<S>(problem->du, gates(), t);
    if (!last) {
      at.before = this->template rows<const S>(problem->y, 1, t + towards);
      at.next_grad_y = towards * problem->grad_y.stride_t;
      at.next_y = towards * problem->y.stride_t;
      at.next_saved = towards * problem->saved.stride_t;
      at.next_dp = towards * problem->dp.stride_t;
    }
    at.new_du = {new_du, du_stride};
    at.direct = direct;
    at.dcarried = old_dcarried;
    at.new_dcarried = new_dcarried;
    at.total = total;
    at.stride = this->stride;
    at.plane = plane();
    at.parameters = parameters();
    at.parameter_stride = this->all_units();
    if (facts().parameters > 0) {
      at.dparameters = dparameters + of_row(0, facts().parameters);
      at.dparameters_stride = of_row(1, facts().parameters) - of_row(0, facts().parameters);
    }
    return at;
  }

  void step(int64_t t) {
    const bool reverse = this->reverse();
    const int64_t steps = this->shape.steps;
    const BackwardStep<S> at = at_step(t);
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
    const auto flows = [&](int64_t row) RNNFAST_INLINE_LAMBDA {
      return t < length(row) && !enters(row) && !stops(row);
    };
    const auto skip = [&](int64_t row, int64_t end) RNNFAST_INLINE_LAMBDA {
      while (row < end && !flows(row)) ++row;
      return row == end;
    };
    const auto epilogue = [&](const Tile<A>& tile) RNNFAST_INLINE_LAMBDA {
      for (int64_t row = tile.row, end; row < tile.row_end; row = end) {
        end = row + 1;
        if (flows(row)) {
          while (end < tile.row_end && flows(end)) ++end;
          carry(at, tile.rows(row, end));
        } else if (t < length(row)) {
          start(at, tile.rows(row, end), enters(row));
        } else {
          pass(at, row, tile.first * L, tile.end * L);
        }
      }
    };
    for_each_product(weights, old_du, du_stride, 1, this->tiling, skip, epilogue);
    if (!whole_rows) return;
    this->crew.wait();  // carried_dh is whole
    finish_rows(at);
  }

  // The step at which BPTT enters the row: nothing has come through time yet.
  RNNFAST_INLINE bool enters(int64_t t, int64_t row) const {
    return t == (this->reverse() ? 0 : this->length(row) - 1);
  }
  // Where the row goes on, whether its gradient ends at the edge that it would come across.
  RNNFAST_INLINE bool stops(int64_t t, int64_t row) const {
    const int64_t edge = this->reverse() ? t : t + 1;
    const std::uint8_t* const resets = this->resets(edge);
    return (problem->window > 0 && edge % problem->window == 0) ||
           (resets != nullptr && resets[row] != 0);
  }

  // Carries the gradient of rows that have one from the step after.
  RNNFAST_INLINE void carry(const BackwardStep<S>& at, const Tile<A>& tile) const {
    if (facts().direct_gradient) add_direct(tile);
    if (!whole_rows) return points(at, tile);
    for (int64_t row = tile.row; row < tile.row_end; ++row) {
      const V* product = tile.products + (row - tile.row) * tile.row_stride;
      for (int64_t unit = tile.first * L; unit < tile.end * L; unit += L, ++product)
        store_raw(carried_dh + place(row, unit), *product);
    }
  }

  void add_direct(const Tile<A>& tile) const {
    for (int64_t row = tile.row; row < tile.row_end; ++row) {
      V* product = tile.products + (row - tile.row) * tile.row_stride;
      for (int64_t unit = tile.first * L; unit < tile.end * L; unit += L, ++product)
        *product += load(direct + place(row, unit));
    }
  }

  RNNFAST_INLINE void points(const BackwardStep<S>& at, const Tile<A>& tile) const {
    const Block<A> block = {tile.row,      tile.row_end,    tile.first, tile.end,
                            tile.products, tile.row_stride, 1,          1};
    if (facts().reads_previous) return points_from(at, block);
    this->cell->backward(at, block);
  }

  // h_prev of a row lies elsewhere at its first step and after a reset; all other rows together.
  void points_from(const BackwardStep<S>& step, const Block<A>& block) const {
    for (int64_t row = block.row, end; row < block.row_end; row = end) {
      end = row + 1;
      BackwardStep<S> at = step;
      at.before = before(step, row);
      if (at.before.data == step.before.data)
        while (end < block.row_end && before(step, end).data == step.before.data) ++end;
      Block<A> part = block;
      part.row = row;
      part.row_end = end;
      part.products += (row - block.row) * block.row_stride;
      run_cell(at, part);
    }
  }
  void run_cell(const BackwardStep<S>& at, const Block<A>& block) const {
    if (at.dn != nullptr) {
      this->cell->backward_normed(at, block);
    } else {
      this->cell->backward(at, block);
    }
  }

  Rows<const S> before(const BackwardStep<S>& at, int64_t row) const {
    const bool reverse = this->reverse();
    const S* const rest = static_cast<const S*>(edges->rest) + this->slice.group * size();
    if (this->cut(reverse ? at.t + 1 : at.t, row)) return {rest, 0};
    if (at.t != (reverse ? this->length(row) - 1 : 0)) return at.before;
    if (edges->first == nullptr) return {rest, 0};
    return {this->template state<const S>(edges->first, row, 0), 0};
  }

  // A step that nothing comes back to: the row's last one, or one before an edge that stops it.
  void start(const BackwardStep<S>& at, const Tile<A>& tile, bool enters) const {
    V* product = tile.products;
    for (int64_t unit = tile.first * L; unit < tile.end * L; unit += L, ++product) {
      for (int i = 0; !enters && i < facts().carried; ++i)
        store_raw(dcarried_at(i, tile.row, unit), V{});
      if (whole_rows) {
        store_raw(carried_dh + place(tile.row, unit), V{});
      } else {
        *product = enters ? this->state_or_zero(grad_h_n(), tile.row, unit) : V{};
      }
    }
    if (!whole_rows) points(at, tile);
  }

  // A step outside the row's length: the gradient waits, nothing flows into p.
  void pass(const BackwardStep<S>& at, int64_t row, int64_t unit, int64_t end) const {
    for (; unit < end; unit += L) {
      const int64_t count = size() - unit;
      for (int i = 0; i < facts().carried; ++i)
        store_raw(new_dcarried + i * plane() + place(row, unit), load(dcarried_at(i, row, unit)));
      for (int i = 0; i < gates(); ++i) {
        const int64_t place = unit + i * size();
        const Raw<A> waiting = load(old_du + row * du_stride + place, count);
        store(at.new_du.at(row, place), waiting, count);
        store(at.dp.at(row, place), Raw<S>{}, count);
        if (problem->du.data != nullptr) store(at.du.at(row, place), Raw<S>{}, count);
      }
    }
  }

  // ------------------------------------------------------------------------------- whole rows

  // dh of a row, from what came through time and what came from outside.
  struct Gradient {
    const A* through_time;
    const S* grad_y;
    const S* grad_h_n;  // at the row's last step
    int64_t size;

    template <bool kWhole>
    RNNFAST_INLINE V of(int64_t unit) const {
      const int64_t count = size - unit;
      V dh = load(through_time + unit);
      if (grad_y != nullptr) dh += load_if<kWhole>(grad_y + unit, count);
      if (grad_h_n != nullptr) dh += load(grad_h_n + unit, count);
      return dh;
    }
  };

  RNNFAST_INLINE Gradient gradient(const BackwardStep<S>& at, int64_t row) const {
    const bool last = grad_h_n() != nullptr && enters(at.t, row);
    return {carried_dh + place(row, 0), at.grad_y.data != nullptr ? at.grad_y.at(row, 0) : nullptr,
            last ? this->template state<const S>(grad_h_n(), row, 0) : nullptr, size()};
  }
  A* dn_of(int64_t row) const { return dn + row * gates() * this->stride; }

  // The carried states beside h, whose gradients are clipped and measured together with dh.
  int beside() const { return facts().emits ? 0 : facts().carried; }
  // dc of a row at fixed h, before it is clipped.
  template <bool kWhole>
  RNNFAST_INLINE V dcarried_of(const BackwardStep<S>& at, int index, int64_t row,
                               int64_t unit) const {
    const int64_t count = size() - unit;
    V value = load(dcarried_at(index, row, unit));
    if (index == 0 && at.grad_cells.data != nullptr)
      value += load_if<kWhole>(at.grad_cells.at(row, unit), count);
    return kWhole ? value : first_lanes<A>(value, count);
  }

  // This member's units of a row's dh, before it is clipped.
  RNNFAST_INLINE void fill_dh(const Gradient& dh, A* to, int64_t next) const {
    for_units<A>(this->first_unit(), this->end_unit(), size(),
                 [&](auto whole, int64_t unit) RNNFAST_INLINE_LAMBDA {
                   store_raw(to + unit, dh.template of<decltype(whole)::value>(unit));
                   if (dh.grad_y != nullptr) prefetch(dh.grad_y + unit, next);
                 });
  }

  // What is left of a step once carried_dh is whole.
  void finish_rows(const BackwardStep<S>& given) const {
    BackwardStep<S> at = given;
    at.grad_y = {};  // dh has it
    if (beside() > 0) {
      at.grad_cells = {};  // so has this, which rows_points fills
      at.dcarried = new_dcarried;
    }
    if (norms()) set_norm(at);
    // Layer norm needs dn of all units: of a crew, it waits for the others.
    const bool waits = norms() && this->crew.count > 1;
    for (int64_t first = 0, end; first < this->slice.count; first = end) {
      end = first + 1;
      if (at.t >= this->length(first)) continue;
      while (end < this->slice.count && end - first < kFewRows && at.t < this->length(end)) ++end;
      rows_points(given, at, first, end);
      for (int64_t row = first; row < end && !waits; ++row)
        finish(given, at, row, dh_of(row - first));
    }
    if (!waits) return;
    this->crew.wait();
    for (int64_t row = 0; row < this->slice.count; ++row) {
      if (at.t >= this->length(row)) continue;
      if (measured != nullptr) fill_dh(gradient(given, row), dh_of(0), 0);
      finish(given, at, row, dh_of(0));
    }
  }

  A* dh_of(int64_t i) const { return own_dh + i * this->stride; }

  // The cell's part of a few rows.
  void rows_points(const BackwardStep<S>& given, const BackwardStep<S>& at, int64_t row,
                   int64_t row_end) const {
    const int64_t first = this->tiling.first_unit, end = first + this->tiling.units.total;
    const bool clips = problem->clip < __builtin_inf();
    for (int64_t i = 0; row + i < row_end; ++i) {
      const Gradient dh = gradient(given, row + i);
      fill_dh(dh, dh_of(i), given.next_grad_y);
      const A scale = clips ? static_cast<A>(clipping(given, dh, row + i)) : A(1);
      for (int index = 0; index < beside(); ++index)
        for_units<A>(first * L, end * L, size(),
                     [&](auto whole, int64_t unit) RNNFAST_INLINE_LAMBDA {
                       constexpr bool kWhole = decltype(whole)::value;
                       store_raw(new_dcarried + index * plane() + place(row + i, unit),
                                 dcarried_of<kWhole>(given, index, row + i, unit) * scale);
                     });
      if (!clips) continue;
      for (int64_t unit = first * L; unit < end * L; unit += L)
        store_raw(dh_of(kFewRows + i) + unit, load(dh_of(i) + unit) * scale);
    }
    const A* const products = dh_of(clips ? kFewRows : 0) + first * L;
    const Block<A> block = {
        row, row_end, first, end, reinterpret_cast<const V*>(products), this->stride / L};
    if (facts().reads_previous) {
      points_from(at, block);
    } else {
      run_cell(at, block);
    }
  }

  void set_norm(BackwardStep<S>& at) const {
    const int64_t own = this->group_width();
    at.gamma = static_cast<const A*>(problem->gamma) + own;
    at.beta = problem->beta != nullptr ? static_cast<const A*>(problem->beta) + own : nullptr;
    at.normed_alone = problem->norm_recurrent;
    at.dn = dn;
    at.dn_stride = gates() * this->stride;
  }

  // Once dn is whole. dh: not clipped.
  RNNFAST_INLINE void finish(const BackwardStep<S>& given, const BackwardStep<S>& at, int64_t row,
                             const A* dh) const {
    if (norms()) through_norm(at, row);
    if (measured != nullptr) measure(given, dh, row, clipping(given, gradient(given, row), row));
  }

  // Defined in backward_rows.h.
  double clipping(const BackwardStep<S>& at, const Gradient& dh, int64_t row) const;
  void through_norm(const BackwardStep<S>& at, int64_t row) const;
  void through_norm_of(const BackwardStep<S>& at, int64_t row, int gate, const A* means,
                       A rstd) const;
  // Adds a row, or this member's units of it, to the record. Its da has just been written.
  [[gnu::noinline]] void measure(const BackwardStep<S>& at, const A* dh, int64_t row,
                                 double scale) const;
  // The record's share of the states beside h.
  struct Beside {
    double state = 0, carry = 0;
    V largest = {};
  };
  [[gnu::noinline]] Beside measure_beside(const BackwardStep<S>& at, int64_t row, bool carries,
                                          double* to) const;
  template <bool kWhole>
  RNNFAST_INLINE V dp_at(const BackwardStep<S>& at, int64_t row, int64_t unit, int gate) const;
  [[gnu::noinline]] void count_nonfinite(const BackwardStep<S>& at, const A* dh, int64_t row,
                                         double* to) const;

  // ------------------------------------------------------------------------------- the first step

  void end() {
    const bool products = problem->dh_0 != nullptr;
    if (!products && problem->dc_0 == nullptr) return;
    const auto skip = [=](int64_t, int64_t) RNNFAST_INLINE_LAMBDA { return !products; };
    const auto epilogue = [&](const Tile<A>& tile) RNNFAST_INLINE_LAMBDA {
      for (int64_t row = tile.row; row < tile.row_end; ++row)
        end_row(tile.rows(row, row + 1), !this->reverse() && this->cut(0, row));
    };
    for_each_product(weights, old_du, du_stride, 1, this->tiling, skip, epilogue);
  }

  void end_row(const Tile<A>& tile, bool fresh) const {
    const int64_t row = tile.row;
    const bool emits = facts().emits;
    if (this->length(row) > 0 && facts().direct_gradient && problem->dh_0 != nullptr)
      add_direct(tile);
    if (emits && this->length(row) > 0) emit_back(tile);
    for (int64_t unit = tile.first * L; unit < tile.end * L; unit += L) {
      const int64_t count = size() - unit;
      if (problem->dh_0 != nullptr) {
        V dh_0 = this->state_or_zero(problem->grad_h_n, row, unit);  // of a row of length 0
        if (this->length(row) > 0)
          dh_0 = emits ? load(dcarried_at(0, row, unit)) : tile.products[unit / L - tile.first];
        store(this->template state<S>(problem->dh_0, row, unit), narrow<S>(fresh ? V{} : dh_0),
              count);
      }
      if (problem->dc_0 != nullptr)
        store(this->template state<S>(problem->dc_0, row, unit),
              narrow<S>(fresh ? V{} : load(dcarried_at(0, row, unit))), count);
    }
  }

  // The products are the gradient of h_0 = emit(v_0).
  void emit_back(const Tile<A>& tile) const {
    const int64_t first = tile.first * L;
    const int64_t count = (tile.end * L < size() ? tile.end * L : size()) - first;
    for (int64_t unit = first; unit < first + count; unit += L)
      store_raw(own_dh + unit, this->state_or_zero(problem->h_0, tile.row, unit));
    this->cell->emit_back(reinterpret_cast<const A*>(tile.products), own_dh + first, plane(),
                          parameters() + first, this->all_units(), count,
                          dcarried_at(0, tile.row, first));
  }
};

}  // namespace rnnfast::cpu::RNNFAST_LEVEL

#include "backward_rows.h"
