"""Methods: parts, the recipes composed of them, and the table of names.

A part answers one question about a step (`flatmin.methods.part`). Each question has a file of its own with its base
class and its parts. A `Recipe` holds one part for each question; `compose` makes a recipe from names. A plugin can
import everything that it needs from this package.
"""

from flatmin.methods import (
    combine,
    context,
    curvature,
    direction,
    entries,
    finite_differences,
    geometry,
    inner_loop,
    mask,
    names,
    objective,
    part,
    radius,
    recipe,
    samples,
    schedule,
)
from flatmin.methods.combine import *
from flatmin.methods.context import *
from flatmin.methods.curvature import *
from flatmin.methods.direction import *
from flatmin.methods.entries import *
from flatmin.methods.finite_differences import *
from flatmin.methods.geometry import *
from flatmin.methods.inner_loop import *
from flatmin.methods.mask import *
from flatmin.methods.names import *
from flatmin.methods.objective import *
from flatmin.methods.part import *
from flatmin.methods.radius import *
from flatmin.methods.recipe import *
from flatmin.methods.samples import *
from flatmin.methods.schedule import *

# Each file lists its own exports, so that a new part is listed in its own file only.
__all__ = [*combine.__all__]
__all__ += context.__all__
__all__ += curvature.__all__
__all__ += direction.__all__
__all__ += entries.__all__
__all__ += finite_differences.__all__
__all__ += geometry.__all__
__all__ += inner_loop.__all__
__all__ += mask.__all__
__all__ += names.__all__
__all__ += objective.__all__
__all__ += part.__all__
__all__ += radius.__all__
__all__ += recipe.__all__
__all__ += samples.__all__
__all__ += schedule.__all__
