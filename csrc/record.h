// The sums that backward measures at each step, in the order of rnnfast/recurrence/record.py.
#pragma once

namespace rnnfast {

enum Field {
  kStateSquares,
  kCarrySquares,
  kClippedSquares,
  kPreactSquares,
  kStateMax,
  kSlopes,
  kNonfiniteGrad,
  kNonfiniteState,
  kEntries,
  kCarried,
  kCellSquares,
  kCellCarrySquares,
  kFields
};

}  // namespace rnnfast
