"""The hidden states of a CLIP text model that SDXL reads: those before its last layer."""

from __future__ import annotations

from copy import copy
from weakref import WeakKeyDictionary

from jaxtyping import Float, Int
from torch import Tensor, nn

_SHORTER: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def last_but_one(encoder: nn.Module, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
    """`encoder(ids, output_hidden_states=True).hidden_states[-2]`; nothing after it is computed where that is known."""
    if not hasattr(encoder, "encoder"):  # before transformers 5.6
        return encoder(ids, output_hidden_states=True).hidden_states[-2]
    return _all_but_last(encoder)(ids).last_hidden_state


def _all_but_last(encoder: nn.Module) -> nn.Module:
    """A CLIP text model over the same modules, without the last layer and what comes after it."""
    if encoder not in _SHORTER:
        shorter, layers = _over_the_same(encoder), _over_the_same(encoder.encoder)
        layers.layers = encoder.encoder.layers[:-1]
        shorter.encoder, shorter.final_layer_norm = layers, nn.Identity()
        _SHORTER[encoder] = shorter
    return _SHORTER[encoder]


def _over_the_same(module: nn.Module) -> nn.Module:
    other = copy(module)
    other._modules = dict(module._modules)
    return other
