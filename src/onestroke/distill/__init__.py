"""How a student learns: the teacher's target, the discriminator, the losses, and one file per method.

The public function `onestroke.distill` has the name of this package, and Python puts the package in its place as soon
as any module in it is imported. So the package can be called, and does what the function does.
"""

import sys
from pathlib import Path
from types import ModuleType


class _CallablePackage(ModuleType):
    def __call__(self, *args, **kwargs) -> Path:
        """`onestroke.api.distill`."""
        from onestroke import api

        return api.distill(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
