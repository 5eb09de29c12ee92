// What is left when da of all steps is known: sums over points (t, b), and products whose inner
// index runs over points.
//
//   dW_hh = sum of du^T h_before    db_hh = sum of du
//   dW_ih = sum of dp^T x           db_ih = sum of dp         dx = dp W_ih
#pragma once

#include "parallel.h"
#include "task.h"

namespace rnnfast::cpu::RNNFAST_LEVEL {

// Points taken at a time: a strip and two panels of them fit the L1 cache.
constexpr int64_t kChunk = 256;
// So many strips take half of a second-level cache of 1 MiB.
constexpr int64_t kStripsOfBlock = 64;

// Elements of a panel or strip: never a multiple of 4096 bytes, or all that are being packed would
// compete for one set of the L1 cache.
template <class A>
RNNFAST_INLINE constexpr int64_t with_gap(int64_t elements) {
  return elements + 64 / static_cast<int64_t>(sizeof(A));
}

template <class S>
RNNFAST_INLINE void fill_zero(void* data, int64_t elements) {
  for (int64_t i = 0; data != nullptr && i < elements; ++i) static_cast<S*>(data)[i] = S{};
}

template <class S>
struct PointGradients {
  using A = Arithmetic<S>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;

  const BackwardProblem& problem;
  CellFacts facts;
  int threads;  // at most
  Edges edges = {};
  A* base = nullptr;

  bool wanted() const {
    return problem.dw_hh != nullptr || problem.dw_ih != nullptr || problem.db_ih != nullptr ||
           problem.dx.data != nullptr;
  }
  int64_t elements() const {
    if (!wanted()) return 0;
    const Areas all = areas();
    return (threads > 1 ? streams() : 1) * all.crew_end + streams() * all.stream_end;
  }
  void place(const Scratch& memory) { base = reinterpret_cast<A*>(memory.data()); }

  // No points, no sums.
  void clear() const {
    fill_zero<S>(problem.dw_hh, width() * size());
    fill_zero<S>(problem.dw_ih, width() * problem.input_size);
    fill_zero<S>(problem.db_ih, width());
    fill_zero<S>(problem.db_hh, width());
    fill_zero<A>(problem.dgamma, width());
    fill_zero<A>(problem.dbeta, width());
    fill_zero<A>(problem.dparameters, facts.parameters * groups() * size());
  }

  // Every member of the team calls it.
  void run(const Member& member) const {
    const int crews = this->crews(member.count);
    const int each = member.count / crews;
    const int crew = member.index / each;
    const Areas all = areas();
    Barrier* const barriers = crews > 1 ? member.barriers + 1 + crew : member.barriers;
    Chunk chunk = {*this,
                   all,
                   member,
                   {member.index % each, each, barriers},
                   crews,
                   crew,
                   base + crew * all.crew_end,
                   base + crews * all.crew_end};
    chunk.run();
  }

 private:
  // Sums are kept in the arithmetic type and rounded once.
  static constexpr bool kNarrow = sizeof(S) != sizeof(A);

  // Where there are many points, the second half of the chunks has sums of its own: two crews of
  // threads take a half each, and need not wait for one another. How many sums there are does not
  // depend on the number of threads, so neither do the bits of their total. Two of the largest
  // would not fit the second-level cache.
  int streams() const {
    constexpr int64_t kMost = 1 << 17;
    const bool many = problem.shape.steps * problem.shape.batch >= 8 * kChunk;
    return many && width() * (size() + problem.input_size) <= kMost ? 2 : 1;
  }
  int crews(int count) const { return count % 2 == 0 ? streams() : 1; }

  int64_t size() const { return problem.shape.size; }
  int64_t groups() const { return problem.shape.directions * problem.shape.heads; }
  int64_t rows() const { return facts.gates * size(); }  // of a group's dW
  int64_t width() const { return groups() * rows(); }    // of dp
  static int64_t panels_of(int64_t columns) {
    return whole_blocks<A>(ceil_div(columns, L) * with_gap<A>(L * kChunk));
  }
  // Layer norm of p + u leaves one gradient of both.
  bool split() const {
    return problem.gamma != nullptr ? problem.norm_recurrent : facts.split_gradient;
  }
  // Without a du of its own a cell has one sum for both biases.
  int64_t biases() const { return split() ? 2 : 1; }
  int64_t sums_of_group() const { return whole_blocks<A>(most_tiles() * 2 * kStripLanes); }
  int64_t most_tiles() const { return ceil_div(rows(), kTileRows) + 2 * threads; }
  // The values of a strip for one k, in whole vectors.
  static constexpr int kStripLanes = (kStrip<A> + L - 1) / L * L;
  static int64_t strip() { return whole_blocks<A>(with_gap<A>(kChunk * kStrip<A>)); }
  PackedLayout<A> input_layout() const {
    return {width(), ceil_div(problem.input_size, L), 1, false, usual_sums<A>(width())};
  }

  // Where everything lies in scratch: in that of a crew, and in that of a stream.
  struct Areas {
    int64_t state_panels, input_panels, strips, w_ih, dp_rows, crew_end;
    int64_t sum_hh, sum_ih, sum_b, stream_end;
  };
  Areas areas() const {
    const bool inputs = problem.dw_ih != nullptr;
    const bool state = problem.dw_hh != nullptr;
    const bool dx = problem.dx.data != nullptr;
    Areas at = {};
    at.input_panels = at.state_panels + (state ? panels_of(size()) : 0);
    at.strips = at.input_panels + (inputs ? panels_of(problem.input_size) : 0);
    at.w_ih = at.strips + most_tiles() * strip();
    at.dp_rows = at.w_ih + (dx ? input_layout().group_stride() : 0);
    const int64_t dp_rows = (kChunk + threads) * row_stride<A>(width());
    at.crew_end = at.dp_rows + (dx ? whole_blocks<A>(dp_rows) : 0);
    const bool sums = kNarrow || streams() > 1;
    at.sum_ih = at.sum_hh + (sums && state ? whole_blocks<A>(width() * size()) : 0);
    at.sum_b = at.sum_ih + (sums && inputs ? whole_blocks<A>(width() * problem.input_size) : 0);
    at.stream_end =
        at.sum_b + (problem.db_ih != nullptr ? biases() * groups() * sums_of_group() : 0);
    return at;
  }

  // The current points, seen from one thread. It computes some rows of its crew's part of dW, and
  // dx of some points.
  struct Chunk {
    const PointGradients& shared;
    const Areas areas;
    const Member& team;
    const Member member;  // of the crew
    const int crews;
    const int crew;
    A* const crew_base;    // in scratch
    A* const stream_base;  // of the first one
    const BackwardProblem& problem = shared.problem;
    const Shape& shape = problem.shape;
    int64_t first_row = part_begin(shared.rows(), member.count, member.index);
    int64_t end_row = part_begin(shared.rows(), member.count, member.index + 1);
    Tiling tiling =
        make_tiling<Left::kStrips>(end_row - first_row, 0, 0, 1);  // units as each product has them
    int64_t next_t = 0, next_b = 0;
    int64_t points = 0;
    int stream = 0;
    int64_t t[kChunk] = {}, b[kChunk] = {};
    const S* du[kChunk] = {};
    const S* right[kChunk] = {};  // h_before, then x; null for a state of zeros

    void run() {
      const int streams = shared.streams();
      for (stream = crew; stream < streams; stream += crews) begin();
      pack_weights();
      const int64_t half = ceil_div(ceil_div(all_points(), kChunk), streams);
      for (int64_t index = 0; gather(); ++index) {
        stream = index < half ? 0 : 1;
        if (crews > 1 && stream != crew) continue;
        if (problem.dw_ih != nullptr) {
          for (int64_t k = 0; k < points; ++k)
            right[k] = static_cast<const S*>(problem.x.data) + t[k] * problem.x.stride_t +
                       b[k] * problem.x.stride_b;
          pack_panels(areas.input_panels, problem.input_size);
        }
        for (int64_t group = 0; group < shared.groups(); ++group) sum_group(group);
        if (problem.dx.data != nullptr) input_gradient();
      }
      end();
    }

   private:
    A* at(int64_t area) const { return crew_base + area; }
    void meet() const {
      if (member.count > 1) member.barriers->wait(member.count);
    }
    A* of_stream(int64_t area) const { return stream_base + stream * areas.stream_end + area; }
    // The first sums are the result, where that is as wide.
    A* sums(int64_t area, void* result) const {
      return kNarrow || stream > 0 ? of_stream(area) : static_cast<A*>(result);
    }
    // Calls body(row of width()) for the rows of all groups that this thread computes.
    template <class Body>
    void for_each_row(Body&& body) const {
      for (int64_t group = 0; group < shared.groups(); ++group)
        for (int64_t row = first_row; row < end_row; ++row) body(group * shared.rows() + row);
    }

    void begin() {
      for_each_row([&](int64_t row) {
        if (problem.dw_hh != nullptr)
          fill_zero<A>(sums(areas.sum_hh, problem.dw_hh) + row * shape.size, shape.size);
        if (problem.dw_ih != nullptr)
          fill_zero<A>(sums(areas.sum_ih, problem.dw_ih) + row * problem.input_size,
                       problem.input_size);
      });
      if (problem.db_ih != nullptr)
        for (int64_t i = 0; i < shared.biases() * shared.groups(); ++i)
          fill_zero<A>(own_sums(i), tiling.rows.runs * 2 * kStripLanes);
    }

    void pack_weights() const {
      if (problem.dx.data == nullptr) return;
      const PackedLayout<A> layout = shared.input_layout();
      const int64_t end = part_begin(layout.units, member.count, member.index + 1);
      for (int64_t unit = part_begin(layout.units, member.count, member.index); unit < end; ++unit)
        pack_columns(static_cast<const S*>(problem.w_ih), layout.inner, problem.input_size, unit,
                     at(areas.w_ih) + unit * layout.panel_stride());
    }  // the others read it after a chunk's first meeting

    void end() {
      if (crews > 1) team.barriers[0].wait(team.count);
      if (crew > 0) return;
      stream = 0;
      for_each_row([&](int64_t row) {
        if (problem.dw_hh != nullptr) total(areas.sum_hh, problem.dw_hh, row, shape.size);
        if (problem.dw_ih != nullptr) total(areas.sum_ih, problem.dw_ih, row, problem.input_size);
      });
      for (int64_t group = 0; problem.db_ih != nullptr && group < shared.groups(); ++group) {
        write_sums(problem.db_ih, shared.biases() * group, group);
        write_sums(problem.db_hh, shared.biases() * (group + 1) - 1, group);
      }
    }

    // A row of a dW.
    void total(int64_t area, void* result, int64_t row, int64_t columns) {
      const int64_t first = row * columns;
      A* const sum = sums(area, result) + first;
      if (shared.streams() > 1) {
        const A* const other = of_stream(area) + areas.stream_end + first;
        for (int64_t i = 0; i < columns; ++i) sum[i] += other[i];
      }
      if constexpr (kNarrow) write(result, sum - first, first, columns);
    }

    static void write(void* result, const A* sums, int64_t first, int64_t count) {
      for (int64_t i = 0; i < count; i += L)
        store(static_cast<S*>(result) + first + i, narrow<S>(load(sums + first + i, count - i)),
              count - i);
    }

    int64_t all_points() const {
      if (problem.lengths == nullptr) return shape.steps * shape.batch;
      int64_t sum = 0;
      for (int64_t row = 0; row < shape.batch; ++row) sum += problem.lengths[row];
      return sum;
    }

    // The next points within their row's length; false when there are none left.
    bool gather() {
      points = 0;
      for (; next_t < shape.steps; ++next_t, next_b = 0) {
        for (; next_b < shape.batch; ++next_b) {
          if (points == kChunk) return true;
          if (problem.lengths == nullptr || next_t < problem.lengths[next_b]) {
            t[points] = next_t;
            b[points++] = next_b;
          } else if (problem.dx.data != nullptr && next_b % team.count == team.index) {
            fill_zero<S>(static_cast<S*>(problem.dx.data) + next_t * problem.dx.stride_t +
                             next_b * problem.dx.stride_b,
                         problem.input_size);
          }
        }
      }
      return points > 0;
    }

    void sum_group(int64_t group) {
      const Sequence<void*>& du_of = shared.split() ? problem.du : problem.dp;
      const bool reverse = group >= shape.heads;
      const S* const rest = static_cast<const S*>(shared.edges.rest);
      for (int64_t k = 0; k < points; ++k) {
        du[k] = static_cast<const S*>(du_of.data) + t[k] * du_of.stride_t + b[k] * du_of.stride_b +
                group * shared.rows();
        const int64_t length = problem.lengths != nullptr ? problem.lengths[b[k]] : shape.steps;
        const int64_t edge = reverse ? t[k] + 1 : t[k];  // between the step and the one before it
        if (problem.reset != nullptr && edge < length &&
            problem.reset[edge * shape.batch + b[k]] != 0) {
          right[k] = rest != nullptr ? rest + group * shape.size : nullptr;
        } else if (t[k] != (reverse ? length - 1 : 0)) {
          right[k] = static_cast<const S*>(problem.y.data) +
                     (reverse ? t[k] + 1 : t[k] - 1) * problem.y.stride_t +
                     b[k] * problem.y.stride_b + group * shape.size;
        } else if (shared.edges.first != nullptr) {
          right[k] = static_cast<const S*>(shared.edges.first) + state_offset(shape, group, b[k]);
        } else {
          right[k] = rest != nullptr ? rest + group * shape.size : nullptr;
        }
      }
      if (problem.dw_hh != nullptr) pack_panels(areas.state_panels, shape.size);
      if (end_row > first_row) pack_strips();
      meet();
      if (end_row > first_row) {
        const int64_t row = group * shared.rows() + first_row;
        if (problem.dw_hh != nullptr)
          multiply(areas.state_panels, shape.size,
                   sums(areas.sum_hh, problem.dw_hh) + row * shape.size);
        if (shared.split()) {
          if (problem.db_ih != nullptr) sum_strips(own_sums(2 * group + 1));
          for (int64_t k = 0; k < points; ++k)
            du[k] = static_cast<const S*>(problem.dp.data) + t[k] * problem.dp.stride_t +
                    b[k] * problem.dp.stride_b + group * shared.rows();
          pack_strips();
        }
        if (problem.dw_ih != nullptr)
          multiply(areas.input_panels, problem.input_size,
                   sums(areas.sum_ih, problem.dw_ih) + row * problem.input_size);
        if (problem.db_ih != nullptr) sum_strips(own_sums(shared.biases() * group));
      }
      meet();  // the panels may change
    }

    // Both copies go along the rows of the points, which come from far away.
    void pack_panels(int64_t area, int64_t columns) const {
      const int64_t units = ceil_div(columns, L);
      const int64_t first = part_begin(units, member.count, member.index);
      const int64_t end = part_begin(units, member.count, member.index + 1);
      const int64_t whole = columns / L < end ? columns / L : end;
      const int64_t stride = with_gap<A>(points * L);
      const int64_t count = points;
      A* to = at(area) + first * stride;
      for (int64_t k = 0; k < count; ++k, to += L) {
        const S* const from = right[k];
        A* panel = to;
        if (from == nullptr) {
          for (int64_t unit = first; unit < end; ++unit, panel += stride) store_raw(panel, V{});
          continue;
        }
        int64_t unit = first;
        for (; unit < whole; ++unit, panel += stride) store_raw(panel, load(from + unit * L));
        if (unit < end) store_raw(panel, load(from + unit * L, columns - unit * L));
      }
    }

    // A member has at most one tile more than it would have of all tiles together.
    int64_t first_tile() const { return first_row / kTileRows + 2 * member.index; }
    A* own_strips() const { return at(areas.strips) + first_tile() * strip(); }
    int64_t strip_stride() const { return with_gap<A>(points * kStrip<A>); }

    void pack_strips() const {
      const Cut tiles = tiling.rows;
      const int64_t rest = shared.rows() - first_row;
      const int64_t stride = strip_stride();
      const int64_t count = points;
      A* to = own_strips();
      for (int64_t k = 0; k < count; ++k, to += kStrip<A>) {
        const S* const from = du[k] + first_row;
        A* strip = to;
        for (int64_t i = 0, row = 0; i < tiles.runs; row += tiles.length(i), ++i, strip += stride) {
          if (row + kStripLanes <= rest) {
            for (int r = 0; r < kStrip<A>; r += L) store_raw(strip + r, load(from + row + r));
          } else {
            for (int r = 0; r < kStrip<A> && row + r < rest; r += L)
              store_raw(strip + r, load(from + row + r, rest - row - r));
          }
        }
      }
    }

    // sum[row][column] += the product, for this thread's rows.
    void multiply(int64_t panels, int64_t columns, A* sum) const {
      const Tiling tiles =
          make_tiling<Left::kStrips>(end_row - first_row, 0, ceil_div(columns, L), 1);
      // The points of a short sequence are a sum that torch takes with shorter parts.
      const Shape& shape = shared.problem.shape;
      const bool brief = shape.steps * shape.batch <= 384;
      const Sums sums = brief ? Sums{part_for<A>(32), 1} : usual_sums<A>(points);
      const Packed<A> packed = {at(panels), points, with_gap<A>(points * L), false, sums};
      // Strips that fit the second-level cache, times all panels.
      int64_t first = 0;  // row of the block
      for (int64_t run = 0; run < tiles.rows.runs; run += kStripsOfBlock) {
        Tiling block = tiles;
        block.rows = tiles.rows.part(run, kStripsOfBlock);
        for_each_product<A, Left::kStrips>(
            packed, own_strips() + run * strip_stride(), strip_stride(), 1, block,
            [](int64_t, int64_t) { return false; },
            [&](const Tile<A>& tile) RNNFAST_INLINE_LAMBDA {
              const V* product = tile.products;
              const int64_t next = (tile.row_end - tile.row) * columns;  // to the next tile
              for (int64_t row = first + tile.row; row < first + tile.row_end; ++row)
                for (int64_t column = tile.first * L; column < tile.end * L;
                     column += L, ++product) {
                  A* const to = sum + row * columns + column;
                  const int64_t rest = columns - column;
                  prefetch(to, next);
                  store(to, load(to, rest) + *product, rest);
                }
            });
        first += block.rows.total;
      }
    }

    // db of this thread's rows, as the strips lie: for each tile the sums, then what they have
    // lost.
    A* own_sums(int64_t index) const {
      return of_stream(areas.sum_b) + index * shared.sums_of_group() +
             first_tile() * 2 * kStripLanes;
    }

    void sum_strips(A* sums) const {
      constexpr int64_t kFew = 8;
      const int64_t stride = strip_stride();
      for (int64_t i = 0; i < tiling.rows.runs; ++i, sums += 2 * kStripLanes) {
        for (int r = 0; r < kStrip<A>; r += L) {
          const A* const from = own_strips() + i * stride + r;
          V sum = load(sums + r), lost = load(sums + kStripLanes + r);
          for (int64_t begin = 0; begin < points; begin += kFew) {
            const int64_t end = points - begin < kFew ? points : begin + kFew;
            V part = load(from + begin * kStrip<A>);
            for (int64_t k = begin + 1; k < end; ++k) part += load(from + k * kStrip<A>);
            add_exactly(part, sum, lost);
          }
          store_raw(sums + r, sum);
          store_raw(sums + kStripLanes + r, lost);
        }
      }
    }

    void write_sums(void* db, int64_t index, int64_t group) const {
      if (db == nullptr) return;
      const A* sums = own_sums(index);
      const A* const other = sums + areas.stream_end;
      S* const to = static_cast<S*>(db) + group * shared.rows() + first_row;
      for (int64_t i = 0, row = 0; i < tiling.rows.runs; ++i, sums += 2 * kStripLanes) {
        for (int r = 0; r < tiling.rows.length(i); ++r, ++row) {
          A sum = sums[r], lost = sums[kStripLanes + r];
          if (shared.streams() > 1) {
            const int64_t place = sums - own_sums(index) + r;
            add_exactly(other[place], sum, lost);
            lost += other[place + kStripLanes];
          }
          store(to + row, narrow<S>(splat(with_lost(sum, lost))), 1);
        }
      }
    }

    // Its points' dp was copied into strips by everybody before the last meeting, and is copied
    // here once more before dx is written, perhaps in its place.
    void input_gradient() const {
      const PackedLayout<A> layout = shared.input_layout();
      const int64_t stride = row_stride<A>(layout.inner);
      const int64_t first = part_begin(points, member.count, member.index);
      const int64_t count = part_begin(points, member.count, member.index + 1) - first;
      A* const rows = at(areas.dp_rows) + first * stride;
      for (int64_t k = 0; k < count; ++k)
        copy_row(rows + k * stride,
                 static_cast<const S*>(problem.dp.data) + t[first + k] * problem.dp.stride_t +
                     b[first + k] * problem.dp.stride_b,
                 layout.inner);
      const int64_t columns = problem.input_size;
      for_each_product(
          layout.group(at(areas.w_ih), 0), static_cast<const A*>(rows), stride, 1,
          make_tiling(count, 0, layout.units, 1), [](int64_t, int64_t) { return false; },
          [&](const Tile<A>& tile) RNNFAST_INLINE_LAMBDA {
            const V* product = tile.products;
            for (int64_t k = first + tile.row; k < first + tile.row_end; ++k) {
              S* const to = static_cast<S*>(problem.dx.data) + t[k] * problem.dx.stride_t +
                            b[k] * problem.dx.stride_b;
              for (int64_t column = tile.first * L; column < tile.end * L; column += L, ++product)
                store(to + column, narrow<S>(*product), columns - column);
            }
          });
    }
  };
};

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
