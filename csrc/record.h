// What backward measures of each step, in the order of rnnfast/record.py.
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
  kFields
};

}  // namespace rnnfast
