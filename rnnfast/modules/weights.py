"""The weights of an RNN, by the names and in the order of nn.RNNBase."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized


class FlatWeights(list):
    """The weights of an RNN in nn.RNN's order, among them one that is set here."""

    def __init__(self, rnn: Weights) -> None:
        super().__init__(map(rnn._weight, rnn._flat_weights_names))
        self._rnn = rnn

    def __setitem__(self, index, weight) -> None:
        super().__setitem__(index, weight)
        names = self._rnn._flat_weights_names[index]
        several = isinstance(index, slice)
        for name, put in zip(names, self[index]) if several else [(names, weight)]:
            self._rnn._put(name, put)


class Weights(nn.RNNBase):
    """Looks its weights up at each call: parameters, or whatever is in the place of one."""

    def _weight(self, name: str) -> Tensor | None:
        """As getattr, which takes ten times as long to find a parameter; what is parametrized,
        pruned or replicated is no parameter."""
        weight = self._parameters.get(name)
        return getattr(self, name, None) if weight is None else weight

    def _device(self) -> torch.device | None:
        """Where the weights are; None where there is none. Something else may hold the parameters,
        as FullyShardedDataParallel does, and a plain tensor be in the place of each."""
        weight = next(self.parameters(), self.__dict__.get("weight_hh_l0"))
        return None if weight is None else weight.device

    # nn.RNNBase keeps a list of the weights, and weak references to them, beside the parameters.
    # Here the parameters are looked up at each call: no way of changing one can be missed.

    @property
    def _flat_weights(self) -> FlatWeights:
        return FlatWeights(self)

    @_flat_weights.setter
    def _flat_weights(self, weights: Sequence[Tensor | None] | None) -> None:
        """
        Raises:
            ValueError: there are more or fewer than the RNN has.
        """
        names = self._flat_weights_names
        if weights is None:  # to be collected, which this module does at each call
            return
        if len(weights) != len(names):
            raise ValueError(f"_flat_weights: given {len(weights)}, wanted {len(names)}: {names}")
        for name, weight in zip(names, weights):
            self._put(name, weight)

    def _put(self, name: str, weight: Tensor | None) -> None:
        """Computes with that weight from now on, a Parameter or what was made of one.

        Raises:
            TypeError: it is no tensor, or a parametrization computes that weight.
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

    def _replicate_for_data_parallel(self) -> Weights:
        return nn.Module._replicate_for_data_parallel(self)
