"""What a method is: its parts, the recipes made of them, and the table of names.

A part answers one question of a step (`flatmin.methods.part`); the base class of a question stands with its parts in a
file of its own. A `Recipe` is one part for each question, and `compose` makes one from names. All that a plugin needs
is here.
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

# Each file says what it offers, so that a new part is named in its own file only.
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
