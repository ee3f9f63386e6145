"""Recipe, loop, evaluation; `fit` is the Python interface."""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robust_dist.train.fit import fit as fit


class _Room(ModuleType):
    """This package; its `fit` is the function, imported on access, although a module has the same name."""

    @property
    def fit(self) -> Any:
        from robust_dist.train.fit import fit

        return fit

    @fit.setter
    def fit(self, module: ModuleType) -> None:
        """Called by the import system once the module `robust_dist.train.fit` is loaded."""


sys.modules[__name__].__class__ = _Room
