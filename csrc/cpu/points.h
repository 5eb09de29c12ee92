// The time loops know a cell by its numbers and by functions that compute runs of its vectors.
// They are all that is compiled for each cell; the loops are compiled once for each storage type.
#pragma once

#include "cells/cell.h"
#include "rows.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

// The part of one tensor that one step reads or writes.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;

  RNNFAST_INLINE T* at(int64_t row, int64_t unit) const { return data + row * stride + unit; }
  RNNFAST_INLINE Rows from(int64_t row) const { return {data + row * stride, stride}; }
};

// Room for the values of a cell; one even where it has none, since C++ has no empty arrays.
template <class V, int kCount>
struct Values {
  V at[kCount > 0 ? kCount : 1];
};

// Asks for a line `ahead` elements on before its use: rows lie too far apart for the hardware to
// see a stream.
template <class T>
RNNFAST_INLINE void prefetch(const T* from, int64_t ahead) {
  __builtin_prefetch(from + ahead);
}

// Rows that are computed whole, by one call of a cell.
constexpr int64_t kFewRows = 8;

// Vectors [first, end) of rows [row, row_end), and the products for them: strides count vectors.
template <class A>
struct Block {
  int64_t row, row_end;
  int64_t first, end;
  const Vec<A>* products;
  int64_t row_stride;
  int64_t unit_stride = 1;
  int64_t gate_stride = 1;
};

// Rows of several values of a unit: value i of a unit comes i * `size` elements after the first,
// in scratch i * `plane`.
template <class S>
struct ForwardStep {
  using A = Arithmetic<S>;
  int64_t size;
  Rows<const S> p;
  Rows<const A> projected;  // instead of p, where its data is not null
  int64_t next_p = 0;       // elements to those of the next step, for what is prefetched
  Rows<S> y;
  Rows<S> saved, cells;  // where they are wanted; cells: the first carried state of each step
  int64_t next_y = 0, next_saved = 0;
  const A* old_state;
  A* new_state;
  A* carried;
  A* unrounded;    // h, where S is narrower than A and the cell reads it so
  int64_t stride;  // of the rows of these four
  int64_t plane;
  const A* parameters;  // of this group
  int64_t parameter_stride;
};

template <class S>
struct BackwardStep {
  using A = Arithmetic<S>;
  int64_t t;
  int64_t size;
  Rows<const S> grad_y, grad_cells;  // may be absent
  int64_t next_grad_y = 0;
  Rows<const S> y, before, saved, ahat;  // before: h_prev
  int64_t next_y = 0, next_saved = 0;
  Rows<S> dp, du;
  int64_t next_dp = 0;
  Rows<A> new_du;
  A* direct;
  const A* dcarried;  // from the step after
  A* new_dcarried;
  A* total;        // where it is wanted
  int64_t stride;  // of the rows of these four
  int64_t plane;
  const A* parameters;
  int64_t parameter_stride;
  A* dparameters = nullptr;  // of the first row
  int64_t dparameters_stride = 0;
  // With layer norm:
  const A* gamma = nullptr;
  const A* beta = nullptr;
  A* dn = nullptr;  // gradient of what was normalized: a row for each gate
  int64_t dn_stride = 0;
  bool normed_alone = false;  // u was normalized, and p was not
};

// A cell's numbers: see cells/cell.h.
struct CellFacts {
  int gates;
  int carried;
  int saved;
  int parameters;
  bool emits;
  bool recurrent_bias;
  bool split_gradient;
  bool direct_gradient;
  bool reads_previous;

  template <class Cell>
  static constexpr CellFacts of() {
    return {Cell::kGates,         Cell::kCarried,        Cell::kSaved,
            Cell::kParameters,    Cell::kEmits,          Cell::kRecurrentBias,
            Cell::kSplitGradient, Cell::kDirectGradient, Cell::kReadsPrevious};
  }
};

template <class S>
struct CellPoints {
  using A = Arithmetic<S>;
  CellFacts facts;
  void (*forward)(const ForwardStep<S>&, const Block<A>&);
  void (*backward)(const BackwardStep<S>&, const Block<A>&);  // products: dh, but for grad_y
  void (*backward_normed)(const BackwardStep<S>&, const Block<A>&);
  // The sum of the gains of the row's units [first, end).
  A (*gain)(const BackwardStep<S>&, int64_t row, int64_t first, int64_t end);
  // h[0, count) of carried states of one row, at a given unit of the group; null but with emits.
  void (*emit)(const A* carried, int64_t plane, const A* parameters, int64_t parameter_stride,
               int64_t count, A* h);
  void (*emit_back)(const A* dh, const A* carried, int64_t plane, const A* parameters,
                    int64_t parameter_stride, int64_t count, A* dcarried);
};

template <class Cell, class S>
struct PointsOf {
  using A = Arithmetic<S>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;
  static constexpr bool kNarrow = sizeof(S) != sizeof(A);
  static constexpr bool kUnrounded = kNarrow && Cell::kDirectGradient;

  static constexpr CellPoints<S> all() {
    CellPoints<S> points = {
        CellFacts::of<Cell>(), forward, backward<false>, backward<true>, gain, nullptr, nullptr};
    if constexpr (Cell::kEmits) {
      points.emit = emit;
      points.emit_back = emit_back;
    }
    return points;
  }

 private:
  using Parameters = Values<V, Cell::kParameters>;
  RNNFAST_INLINE static Parameters parameters(const A* from, int64_t stride, int64_t count) {
    Parameters values;
    for (int i = 0; i < Cell::kParameters; ++i) values.at[i] = load(from + i * stride, count);
    return values;
  }

  // Calls body(whole, row, unit, products) for every vector of the block.
  template <class Body>
  RNNFAST_INLINE static void for_block(const Block<A>& block, int64_t size, Body&& body) {
    const int64_t whole_end = block.end * L <= size ? block.end : size / L;
    const V* row_products = block.products;
    for (int64_t row = block.row; row < block.row_end; ++row, row_products += block.row_stride) {
      const V* products = row_products;
      int64_t vector = block.first;
      for (; vector < whole_end; ++vector, products += unit_stride(block))
        body(Bool<true>{}, row, vector * L, products);
      for (; vector < block.end; ++vector, products += unit_stride(block))
        body(Bool<false>{}, row, vector * L, products);
    }
  }
  RNNFAST_INLINE static int64_t unit_stride(const Block<A>& block) {
    return Cell::kGates == 1 ? 1 : block.unit_stride;
  }

  // Kept short: several of them at once, divisions and all, fit what the processor looks ahead.
  [[gnu::noinline]] static void forward(const ForwardStep<S>& step, const Block<A>& given) {
    const ForwardStep<S> at = step;  // in registers: any store might change what is in memory
    const Block<A> block = given;
    for_block(block, at.size,
              [&](auto whole, int64_t row, int64_t unit, const V* products) RNNFAST_INLINE_LAMBDA {
                constexpr bool kWhole = decltype(whole)::value;
                const int64_t count = at.size - unit;
                const int64_t place = row * at.stride + unit;
                Values<V, Cell::kGates> p, u;
                Values<V, Cell::kCarried> carried;
                Values<V, Cell::kSaved> saved;
                bool wide = false;
                if constexpr (kNarrow) wide = at.projected.data != nullptr;
                if (wide) {
                  prefetch(at.projected.at(row, unit), at.next_p);
                  for (int i = 0; i < Cell::kGates; ++i)
                    p.at[i] = load_if<kWhole>(at.projected.at(row, unit + i * at.size), count);
                } else {
                  for (int i = 0; i < Cell::kGates; ++i) {
                    const S* const p_i = at.p.at(row, unit + i * at.size);
                    prefetch(p_i, at.next_p);
                    p.at[i] = load_if<kWhole>(p_i, count);
                  }
                }
                S* const y = at.y.at(row, unit);
                prefetch(y, at.next_y);
                for (int i = 0; i < Cell::kGates; ++i) u.at[i] = products[i * block.gate_stride];
                for (int i = 0; i < Cell::kCarried; ++i)
                  carried.at[i] = load(at.carried + place + i * at.plane);
                const Parameters own = parameters(at.parameters + unit, at.parameter_stride, count);
                const V h_prev = load((kUnrounded ? at.unrounded : at.old_state) + place);
                const V exact = Cell::forward({p.at, u.at, h_prev, own.at}, carried.at, saved.at);
                const Raw<S> h = narrow<S>(exact);
                store_if<kWhole>(y, h, count);
                store_raw(at.new_state + place, widen<S>(h));
                if constexpr (kUnrounded) store_raw(at.unrounded + place, exact);
                for (int i = 0; i < Cell::kCarried; ++i)
                  store_raw(at.carried + place + i * at.plane, carried.at[i]);
                if constexpr (Cell::kSaved > 0) {
                  if (at.saved.data != nullptr) {
                    for (int i = 0; i < Cell::kSaved; ++i) {
                      S* const to = at.saved.at(row, unit + i * at.size);
                      prefetch(to, at.next_saved);
                      store_if<kWhole>(to, narrow<S>(saved.at[i]), count);
                    }
                  }
                }
                if constexpr (Cell::kCarried > 0) {
                  if (at.cells.data != nullptr)
                    store_if<kWhole>(at.cells.at(row, unit), narrow<S>(carried.at[0]), count);
                }
              });
  }

  template <bool kWhole>
  RNNFAST_INLINE static V h_from_norm(const BackwardStep<S>& at, int64_t row, int64_t unit) {
    const int64_t count = at.size - unit;
    const V ahat = load_if<kWhole>(at.ahat.at(row, unit), count);
    const V scale = load_if<kWhole>(at.gamma + unit, count);
    const V shift = at.beta != nullptr ? load_if<kWhole>(at.beta + unit, count) : V{};
    const V scaled = ahat * scale;
    return Cell::forward({&scaled, &shift, V{}, nullptr}, nullptr, nullptr);
  }

  // kNormed: what has been normalized gets its gradient in dn, not rounded.
  template <bool kNormed>
  [[gnu::noinline]] static void backward(const BackwardStep<S>& step, const Block<A>& given) {
    const BackwardStep<S> at = step;
    const Block<A> block = given;
    for_block(
        block, at.size,
        [&](auto whole, int64_t row, int64_t unit, const V* products) RNNFAST_INLINE_LAMBDA {
          constexpr bool kWhole = decltype(whole)::value;
          const int64_t count = at.size - unit;
          const int64_t place = row * at.stride + unit;
          V dh = products[0];
          if (at.grad_y.data != nullptr) {
            const S* const grad_y = at.grad_y.at(row, unit);
            dh += load_if<kWhole>(grad_y, count);
            prefetch(grad_y, at.next_grad_y);
          }
          if constexpr (!kNormed) {
            prefetch(at.y.at(row, unit), at.next_y);
            for (int i = 0; i < Cell::kGates; ++i)
              prefetch(at.dp.at(row, unit + i * at.size), at.next_dp);
          }
          V h = load_if<kWhole>(at.y.at(row, unit), count), h_prev = {};
          if constexpr (kNormed && kNarrow && Cell::kRecomputesH) {
            if (!at.normed_alone) h = h_from_norm<kWhole>(at, row, unit);
          }
          if constexpr (Cell::kReadsPrevious)
            h_prev = load_if<kWhole>(at.before.at(row, unit), count);
          Values<V, Cell::kSaved> saved;
          for (int i = 0; i < Cell::kSaved; ++i) {
            const S* const from = at.saved.at(row, unit + i * at.size);
            prefetch(from, at.next_saved);
            saved.at[i] = load_if<kWhole>(from, count);
          }
          Values<V, Cell::kCarried> carried, total;
          for (int i = 0; i < Cell::kCarried; ++i)
            carried.at[i] = load(at.dcarried + place + i * at.plane);
          if constexpr (Cell::kCarried > 0) {
            if (at.grad_cells.data != nullptr)
              carried.at[0] += load_if<kWhole>(at.grad_cells.at(row, unit), count);
          }
          const Parameters own = parameters(at.parameters + unit, at.parameter_stride, count);
          Values<V, Cell::kGates> dp;
          Values<V, Cell::kSplitGradient ? Cell::kGates : 0> du;
          Parameters learned;
          const V bypass = Cell::backward({dh, h, h_prev, saved.at, own.at},
                                          {carried.at, dp.at, du.at, learned.at, total.at});
          if constexpr (Cell::kDirectGradient) store_raw(at.direct + place, bypass);
          for (int i = 0; i < Cell::kCarried; ++i)
            store_raw(at.new_dcarried + place + i * at.plane, carried.at[i]);
          if constexpr (Cell::kCarried > 0 && !Cell::kEmits) {
            if (at.total != nullptr) store_raw(at.total + place, total.at[0]);
          }
          for (int i = 0; i < Cell::kParameters; ++i) {
            A* const sum = at.dparameters + row * at.dparameters_stride + i * at.stride + unit;
            store_raw(sum, load(sum) + learned.at[i]);
          }
          for (int i = 0; i < Cell::kGates; ++i) {
            const V inner = Cell::kSplitGradient ? du.at[Cell::kSplitGradient ? i : 0] : dp.at[i];
            if constexpr (kNormed) {
              store_raw(at.dn + row * at.dn_stride + i * at.stride + unit, inner);
              if (!at.normed_alone) continue;
            }
            Raw<S> stored = narrow<S>(dp.at[i]);
            store_if<kWhole>(at.dp.at(row, unit + i * at.size), stored, count);
            if constexpr (kNormed) continue;
            if constexpr (Cell::kSplitGradient) {
              stored = narrow<S>(inner);
              store_if<kWhole>(at.du.at(row, unit + i * at.size), stored, count);
            }
            // With several gates the rest of the last vector belongs to the next gate.
            store_if<kWhole || Cell::kGates == 1>(at.new_du.at(row, unit + i * at.size),
                                                  widen<S>(stored), count);
          }
        });
  }

  [[gnu::noinline]] static A gain(const BackwardStep<S>& step, int64_t row, int64_t first,
                                  int64_t end) {
    const BackwardStep<S> at = step;
    V sum = {};
    for_units<A>(first, end, at.size, [&](auto whole, int64_t unit) RNNFAST_INLINE_LAMBDA {
      constexpr bool kWhole = decltype(whole)::value;
      const int64_t count = at.size - unit;
      Values<V, Cell::kSaved> saved;
      for (int i = 0; i < Cell::kSaved; ++i)
        saved.at[i] = load_if<kWhole>(at.saved.at(row, unit + i * at.size), count);
      const Parameters own = parameters(at.parameters + unit, at.parameter_stride, count);
      const V gain = Cell::gain(load_if<kWhole>(at.y.at(row, unit), count), saved.at, own.at);
      sum += kWhole ? gain : first_lanes<A>(gain, count);
    });
    return sum_lanes<A>(sum);
  }

  static void emit(const A* carried, int64_t plane, const A* parameters_at,
                   int64_t parameter_stride, int64_t count, A* h) {
    for (int64_t unit = 0; unit < count; unit += L) {
      Values<V, Cell::kCarried> states;
      for (int i = 0; i < Cell::kCarried; ++i)
        states.at[i] = load(carried + i * plane + unit, count - unit);
      const Parameters own = parameters(parameters_at + unit, parameter_stride, count - unit);
      store(h + unit, narrow<A>(Cell::emit(states.at, own.at)), count - unit);
    }
  }

  static void emit_back(const A* dh, const A* carried, int64_t plane, const A* parameters_at,
                        int64_t parameter_stride, int64_t count, A* dcarried) {
    for (int64_t unit = 0; unit < count; unit += L) {
      Values<V, Cell::kCarried> states, gradients;
      for (int i = 0; i < Cell::kCarried; ++i) {
        states.at[i] = load(carried + i * plane + unit, count - unit);
        gradients.at[i] = load(dcarried + i * plane + unit, count - unit);
      }
      const Parameters own = parameters(parameters_at + unit, parameter_stride, count - unit);
      Cell::emit_back(load(dh + unit, count - unit), states.at, own.at, gradients.at);
      for (int i = 0; i < Cell::kCarried; ++i)
        store(dcarried + i * plane + unit, narrow<A>(gradients.at[i]), count - unit);
    }
  }
};

template <class Cell, class S>
inline constexpr CellPoints<S> kPoints = PointsOf<Cell, S>::all();

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
