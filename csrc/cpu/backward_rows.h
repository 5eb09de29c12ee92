// Backward's work on whole rows: clipping, layer norm and the record. Included by backward.h.
#pragma once

namespace rnnfast::cpu::RNNFAST_LEVEL {

// Every member of the crew takes the norm of the whole row.
template <class S>
double BackwardTask<S>::clipping(const BackwardStep<S>& at, const Gradient& dh, int64_t row) const {
  if (!(problem->clip < __builtin_inf())) return 1;
  Squares<A> squares;
  for_units<A>(0, dh.size, dh.size, [&](auto whole, int64_t unit) RNNFAST_INLINE_LAMBDA {
    constexpr bool kWhole = decltype(whole)::value;
    const V value = dh.template of<kWhole>(unit);
    squares.add(kWhole ? value : first_lanes<A>(value, dh.size - unit));
  });
  for (int index = 0; index < beside(); ++index)
    for_units<A>(0, dh.size, dh.size, [&](auto whole, int64_t unit) RNNFAST_INLINE_LAMBDA {
      squares.add(dcarried_of<decltype(whole)::value>(at, index, row, unit));
    });
  const double norm = __builtin_sqrt(squares.total());
  return norm > problem->clip && norm < __builtin_inf() ? problem->clip / norm : 1;
}

// da = rstd (dahat - mean(dahat) - ahat mean(dahat ahat)) with dahat = gamma dn. Every member of
// the crew takes the means of the whole row.
template <class S>
void BackwardTask<S>::through_norm(const BackwardStep<S>& at, int64_t row) const {
  const A rstd = static_cast<const A*>(problem->rstd)[this->rstd_place(at.t, row)];
  A means[2] = {};
  for (int gate = 0; gate < gates(); ++gate) {
    const A* const gamma = at.gamma + gate * size();
    const S* const ahat_row = at.ahat.at(row, gate * size());
    const A* const dn_row = dn_of(row) + gate * this->stride;
    A sums[2];
    sum_row<A>(size(), sums, [&](auto whole, int64_t unit, V* values) RNNFAST_INLINE_LAMBDA {
      constexpr bool kWhole = decltype(whole)::value;
      const int64_t count = size() - unit;
      values[0] = load(dn_row + unit) * load_if<kWhole>(gamma + unit, count);
      values[1] = values[0] * load_if<kWhole>(ahat_row + unit, count);
    });
    for (int i = 0; i < 2; ++i) means[i] = gate == 0 ? sums[i] : means[i] + sums[i];
  }
  for (A& mean : means) mean /= static_cast<A>(gates() * size());
  for (int gate = 0; gate < gates(); ++gate) through_norm_of(at, row, gate, means, rstd);
}

template <class S>
void BackwardTask<S>::through_norm_of(const BackwardStep<S>& at, int64_t row, int gate,
                                      const A* means, A rstd) const {
  const A* const gamma = at.gamma + gate * size();
  const S* const ahat_row = at.ahat.at(row, gate * size());
  const A* const dn_row = dn_of(row) + gate * this->stride;
  A* const dgamma = norm_gradient(row) + gate * this->stride;
  A* const dbeta = dgamma + gates() * this->stride;
  S* const to = (at.normed_alone ? at.du : at.dp).at(row, gate * size());
  A* const to_du = at.new_du.at(row, gate * size());
  const int64_t next_ahat = problem->ahat.stride_t * (this->reverse() ? 1 : -1);
  const A mean = means[0], along = means[1];
  for_units<A>(this->first_unit(), this->end_unit(), size(),
               [&](auto whole, int64_t unit) RNNFAST_INLINE_LAMBDA {
                 constexpr bool kWhole = decltype(whole)::value;
                 const int64_t count = size() - unit;
                 prefetch(at.y.at(row, unit), at.next_y);
                 prefetch(ahat_row + unit, at.next_y != 0 ? next_ahat : 0);
                 prefetch(to + unit, at.next_dp);
                 const V value = load(dn_row + unit);
                 const V ahat = load_if<kWhole>(ahat_row + unit, count);
                 store_raw(dgamma + unit, load(dgamma + unit) + value * ahat);
                 store_raw(dbeta + unit, load(dbeta + unit) + value);
                 const V dahat = value * load_if<kWhole>(gamma + unit, count);
                 const Raw<S> da = narrow<S>(((dahat - mean) - ahat * along) * rstd);
                 store_if<kWhole>(to + unit, da, count);
                 store(to_du + unit, widen<S>(da), count);
               });
}

// Adds a row, or this member's units of it, to the record. Its da has just been written.
template <class S>
void BackwardTask<S>::measure(const BackwardStep<S>& at, const A* dh, int64_t row,
                              double scale) const {
  Squares<A> state_squares, carry_squares, preact_squares;
  V largest = {};
  V finite = {};  // NaN from the first h on that is inf or NaN
  for_units<A>(this->first_unit(), this->end_unit(), size(),
               [&](auto whole, int64_t unit) RNNFAST_INLINE_LAMBDA {
                 constexpr bool kWhole = decltype(whole)::value;
                 const int64_t count = size() - unit;
                 V value = load(dh + unit);
                 V past = load(carried_dh + place(row, unit));
                 if constexpr (!kWhole) {
                   value = first_lanes<A>(value, count);
                   past = first_lanes<A>(past, count);
                 }
                 state_squares.add(value);
                 carry_squares.add(past);
                 for (int gate = 0; gate < gates(); ++gate)
                   preact_squares.add(dp_at<kWhole>(at, row, unit, gate));
                 largest = value > largest ? value : largest;
                 largest = -value > largest ? -value : largest;
                 finite += load_if<kWhole>(at.y.at(row, unit), count) * A(0);
               });
  const int64_t rows = problem->per_sample ? this->slice.count : 1;
  double* const to = measured + (at.t * rows + (problem->per_sample ? row : 0)) * kFields;
  const bool carries = !enters(at.t, row) && !stops(at.t, row);
  Beside others;
  if (beside() > 0) {
    others = measure_beside(at, row, carries, to);
    largest = others.largest > largest ? others.largest : largest;
  }
  const int64_t end = this->end_unit() < size() ? this->end_unit() : size();
  const double state = state_squares.total() + others.state, preact = preact_squares.total();
  const double most = static_cast<double>(largest_lane<A>(largest));
  to[kStateSquares] += state;
  to[kCarrySquares] += carry_squares.total() + others.carry;
  to[kClippedSquares] += state * scale * scale;
  to[kPreactSquares] += preact;
  to[kStateMax] = larger(to[kStateMax], state == state ? most : state);  // NaN where one is
  to[kSlopes] +=
      static_cast<double>(this->cell->gain(at, row, this->first_unit(), this->end_unit()));
  const int64_t units = end > this->first_unit() ? end - this->first_unit() : 0;
  to[kEntries] += static_cast<double>(units);
  if (carries) to[kCarried] += static_cast<double>(units);
  const double any = state + preact + static_cast<double>(sum_lanes<A>(finite));
  if (any - any != 0) count_nonfinite(at, dh, row, to);
}

// The same of the states beside h. Apart, so that the sums of h stay in registers.
template <class S>
typename BackwardTask<S>::Beside BackwardTask<S>::measure_beside(const BackwardStep<S>& at,
                                                                 int64_t row, bool carries,
                                                                 double* to) const {
  Squares<A> state_squares, carry_squares, cell_squares, cell_carry_squares;
  V largest = {};
  for_units<A>(this->first_unit(), this->end_unit(), size(),
               [&](auto whole, int64_t unit) RNNFAST_INLINE_LAMBDA {
                 constexpr bool kWhole = decltype(whole)::value;
                 const auto own = [&](const A* from) RNNFAST_INLINE_LAMBDA {
                   return kWhole ? load(from) : first_lanes<A>(load(from), size() - unit);
                 };
                 for (int index = 0; index < beside(); ++index) {
                   const V dc = dcarried_of<kWhole>(at, index, row, unit);
                   state_squares.add(dc);
                   largest = dc > largest ? dc : largest;
                   largest = -dc > largest ? -dc : largest;
                   if (!carries) continue;
                   const V carry = own(dcarried_at(index, row, unit));
                   carry_squares.add(carry);
                   if (index == 0) cell_carry_squares.add(carry);
                 }
                 cell_squares.add(own(total + place(row, unit)));
               });
  to[kCellSquares] += cell_squares.total();
  to[kCellCarrySquares] += cell_carry_squares.total();
  return {state_squares.total(), carry_squares.total(), largest};
}

template <class S>
template <bool kWhole>
typename BackwardTask<S>::V BackwardTask<S>::dp_at(const BackwardStep<S>& at, int64_t row,
                                                   int64_t unit, int gate) const {
  return load_if<kWhole>(static_cast<const S*>(at.dp.at(row, gate * size() + unit)), size() - unit);
}

template <class S>
void BackwardTask<S>::count_nonfinite(const BackwardStep<S>& at, const A* dh, int64_t row,
                                      double* to) const {
  const auto finite = [](double x) { return x - x == 0; };
  for (int64_t unit = this->first_unit(); unit < this->end_unit(); unit += L) {
    const int64_t count = size() - unit < L ? size() - unit : L;
    const V value = load(dh + unit);
    const V h = load(at.y.at(row, unit), count);
    V others = {};  // 0 where all of them are finite
    for (int index = 0; index < beside(); ++index)
      others += dcarried_of<false>(at, index, row, unit) * A(0);
    for (int64_t i = 0; i < count; ++i) {
      bool good = finite(value[i]) && finite(others[i]);
      for (int gate = 0; gate < gates(); ++gate)
        good = good && finite(dp_at<false>(at, row, unit, gate)[i]);
      to[kNonfiniteGrad] += good ? 0 : 1;
      to[kNonfiniteState] += finite(h[i]) ? 0 : 1;
    }
  }
}

}  // namespace rnnfast::cpu::RNNFAST_LEVEL
