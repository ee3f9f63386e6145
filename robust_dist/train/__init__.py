"""Recipe, loop, evaluation; `fit` is the face for Python."""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robust_dist.train.fit import fit as fit


class _Room(ModuleType):
    """This package: its `fit` is the function, imported when it is asked for, also beside the module of that name."""

    @property
    def fit(self) -> Any:
        from robust_dist.train.fit import fit

        return fit

    @fit.setter
    def fit(self, module: ModuleType) -> None:
        """The import system's word that the module `robust_dist.train.fit` is there."""


sys.modules[__name__].__class__ = _Room
