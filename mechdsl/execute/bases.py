"""Bases computed from arrays, as coordinate systems of a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Floats
from mechdsl.base.hashing import stable_hash
from mechdsl.dictionaries.features import load_dictionary
from mechdsl.dictionaries.folder import DictionaryFile
from mechdsl.forward.hooks.coordinates import CoordinateSystem, LinearBasis, StandardBasis
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.forward.hooks.module_exchange import load_weights
from mechdsl.forward.hooks.weight_maps import NoLinearMap, WeightMaps
from mechdsl.program.basis_methods import BASIS_METHODS, linear_map
from mechdsl.resolve.types import BasisMember, DrawnBasis


@dataclass(frozen=True, eq=False)
class _BasisArrays:
    """Implementation of `mechdsl.program.basis_methods.BasisInput`."""

    member: BasisMember
    rows: Callable[[], Tensor]

    @property
    def width(self) -> int:
        return self.member.width

    def matrix(self) -> Floats:
        return self.rows().double().numpy()

    def normal(self, rows: int) -> Floats:
        operand = self.member.operand
        if not isinstance(operand, DrawnBasis):
            raise TypeError('`normal` needs a method with `takes = "nothing"`')
        seed = stable_hash(operand.seed, "basis", operand.draw)
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed])))
        return random.standard_normal((rows, self.width))


def compute_system(member: BasisMember, rows: Callable[[], Tensor]) -> CoordinateSystem:
    """Compute a basis.

    Args:
        rows: Returns the operand, [row, width].

    Raises:
        MethodError: A class from outside the package fails.
        ValueError: The operand has no such basis.
    """
    if isinstance(member.operand, DictionaryFile):
        return load_dictionary(member.operand)
    if member.method == "neurons":
        return StandardBasis(member.size)
    arrays = _BasisArrays(member, rows)
    found = linear_map(BASIS_METHODS[member.method], arrays, member.options, member.size)
    center = None if found.center is None else torch.from_numpy(found.center)
    return LinearBasis.of(torch.from_numpy(found.directions), center)


def read_written_weights(model: LoadedModel, site: str, layer: int) -> Tensor:
    """Return [width, input]: the map that writes to a site, with the gain of a norm after it.

    Raises ValueError if it isn't a linear map.
    """
    maps = WeightMaps(model)
    try:
        with load_weights(model.module), torch.no_grad():
            found = maps.neurons(layer) if site == "mlp_out" else maps.output(layer).flatten(0, 1)
    except NoLinearMap as error:
        raise ValueError(str(error)) from error
    return found.T.double().cpu()
