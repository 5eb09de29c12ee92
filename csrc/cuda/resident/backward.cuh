// Backpropagation through time (kernel.cuh).
#pragma once

#include "cuda/problem.h"
#include "cuda/resident/backward_step.cuh"

namespace rnnfast::cuda {

template <class K, bool kNorm, bool kClip>
RT_KERNEL(K::kThreads)
backward_kernel(Backward a) {
  using Step = BackwardStep<K, kNorm, kClip>;
  using Clip = ClipAfterProduct<K>;
  const Place<K> place(a.shape);
  const int steps = a.shape.steps;
  Weights<K> weights;
  load_weights<K, true>(a.w_hh, place, weights);
  OwnerData<K> own;
  Step step(a, place, own);
  step.begin();
  Exchange<K>::template begin<Step::kSums>(place);
  step.fetch_inputs(0);

  bool again = false;  // the step is to be taken once more (clipping.cuh)
  for (int i = 0, turn = 0; i < steps; ++turn) {
    const bool once_more = again;
    again = false;
    if (place.owner()) {
      if (once_more) {
        step.put_once_more(turn);
      } else {
        step.make_da(i, turn);
      }
    }
    Exchange<K>::await_state(turn);  // all of da_t is in its half
    if (place.owner()) step.begin_carry();
    Products<K> sums;
    begin_product<K>(weights, state_of<K>(turn), place, own.carry, sums);
    Exchange<K>::expect_state(turn, place);
    if (place.owner() && !once_more && i + 1 < steps) step.fetch_inputs(i + 1);
    finish_product<K>(sums, place, own.carry, [&] {
      if constexpr (Step::kClipAfterProduct) {
        if (place.owner() && !once_more) again = step.await_clip(i);
        // The first part's warp owns a tile: it tells the band's warps that own nothing.
        if (!K::kAllOwn && place.part == 0 && place.lane == 0) {
          *Clip::retry_flag(turn, place) = again;
        }
      }
    });
    if (Step::kClipAfterProduct && !K::kAllOwn && !place.owner()) {
      again = *Clip::retry_flag(turn, place);
    }
    if (!again) ++i;
    if (place.owner()) step.finish_carry();
  }
  if (place.owner()) step.finish();
}

}  // namespace rnnfast::cuda
