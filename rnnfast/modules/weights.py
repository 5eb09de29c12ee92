"""The weights of a module, by the names and in the order of nn.RNNBase."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..recurrence import precision


class FlatWeights(list):
    """The weights in nn.RNN's order. An assignment to an item changes the module."""

    def __init__(self, rnn: WeightLookup) -> None:
        super().__init__(map(rnn._weight, rnn._flat_weights_names))
        self._rnn = rnn

    def __setitem__(self, index, weight) -> None:
        super().__setitem__(index, weight)
        names = self._rnn._flat_weights_names[index]
        several = isinstance(index, slice)
        for name, put in zip(names, self[index]) if several else [(names, weight)]:
            self._rnn._put(name, put)


class WeightLookup(nn.RNNBase):
    """An nn.RNNBase that looks its weights up at each call.

    nn.RNNBase keeps a list of the weights beside the parameters, and a change of one can miss the
    other. Here the parameters are the only place.
    """

    def _weight(self, name: str) -> Tensor | None:
        """The weight of that name, or None. getattr takes ten times as long to find a parameter;
        only a weight that is parametrized, pruned or replicated needs it."""
        weight = self._parameters.get(name)
        return getattr(self, name, None) if weight is None else weight

    def _device(self) -> torch.device | None:
        """The device of the weights; None without weights. FullyShardedDataParallel holds the
        parameters itself and leaves a plain tensor in the place of each."""
        weight = next(self.parameters(), self.__dict__.get("weight_hh_l0"))
        return None if weight is None else weight.device

    # --------------------------------------------------------------------------- those of a layer

    def _layer_weights(self, index: int) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """w_ih, b_ih, b_hh and w_hh of all directions of a layer, as rnnfast.ops.layer takes
        them."""
        if not self.bidirectional:
            w_ih, w_hh, *biases = map(self._weight, self._all_weights[index])
            return w_ih, *(biases or (None, None)), w_hh
        pairs = zip(self._all_weights[2 * index], self._all_weights[2 * index + 1])
        w_ih, w_hh, *biases = ([self._weight(a), self._weight(b)] for a, b in pairs)
        return (
            torch.cat(w_ih),
            *(map(torch.cat, biases) if biases else (None, None)),
            torch.cat(w_hh),
        )

    def _norm_weights(self, index: int) -> tuple[Tensor, Tensor | None]:
        """norm_weight and norm_bias of all directions of a layer, in the dtype that a norm
        computes in."""
        found = []
        for kind in ("weight", "bias"):
            parts = [self._weight(name) for name in self._norm_names(index, kind)]
            whole = None if parts[0] is None else parts[0] if len(parts) == 1 else torch.cat(parts)
            found.append(precision.widened(whole))
        return found[0], found[1]

    def _norm_names(self, index: int, kind: str) -> list[str]:
        suffixes = ["", "_reverse"] if self.bidirectional else [""]
        return [f"norm_{kind}_l{index}{suffix}" for suffix in suffixes]

    # ------------------------------------------------------------- the list that nn.RNNBase keeps

    @property
    def _flat_weights(self) -> FlatWeights:
        return FlatWeights(self)

    @_flat_weights.setter
    def _flat_weights(self, weights: Sequence[Tensor | None] | None) -> None:
        """
        Raises:
            ValueError: the number of weights is not that of the module.
        """
        names = self._flat_weights_names
        if weights is None:  # asks nn.RNNBase to collect them, which happens here at each call
            return
        if len(weights) != len(names):
            raise ValueError(f"_flat_weights: given {len(weights)}, wanted {len(names)}: {names}")
        for name, weight in zip(names, weights):
            self._put(name, weight)

    def _put(self, name: str, weight: Tensor | None) -> None:
        """Computes with ``weight`` from now on: a Parameter, or a tensor made of one.

        Raises:
            TypeError: it is no tensor, or a parametrization computes the weight of that name.
        """
        here = self._weight(name)
        if weight is here:
            return
        if not isinstance(weight, Tensor):
            given = type(weight).__name__
            raise TypeError(f"_flat_weights: given {given} for {name}, wanted a tensor")
        if is_parametrized(self, name):
            if weight.shape == here.shape and torch.equal(weight, here):
                return
            raise TypeError(
                f"_flat_weights: given another {name}, wanted the one that its parametrization "
                "computes; set the attribute of that name"
            )
        if name in self._parameters:
            self._parameters[name] = weight  # where torch.func.functional_call puts its own
        else:
            setattr(self, name, weight)

    def _init_flat_weights(self) -> None:
        self.flatten_parameters()

    def _update_flat_weights(self) -> None:
        pass

    def _replicate_for_data_parallel(self) -> WeightLookup:
        return nn.Module._replicate_for_data_parallel(self)
