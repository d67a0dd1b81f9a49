"""The demonstrations of the convergence theory by name."""

from collections.abc import Sequence

from flatmin.theory.demonstrations.checker import CHECKER
from flatmin.theory.demonstrations.demonstration import Claim, Demonstration, DemonstrationResult, Marks, Panel
from flatmin.theory.demonstrations.diminishing import DIMINISHING
from flatmin.theory.demonstrations.network import NETWORK
from flatmin.theory.demonstrations.noise import NOISE
from flatmin.theory.demonstrations.orbit import ORBIT
from flatmin.theory.demonstrations.properties import PROPERTIES
from flatmin.theory.demonstrations.quadratic import QUADRATIC
from flatmin.theory.demonstrations.radius import RADIUS
from flatmin.theory.demonstrations.rates import RATES
from flatmin.theory.demonstrations.usam import USAM
from flatmin.words import suggest

__all__ = ["DEMONSTRATIONS", "Claim", "Demonstration", "DemonstrationResult", "Marks", "Panel", "find"]

DEMONSTRATIONS: dict[str, Demonstration] = {
    d.name: d for d in (ORBIT, QUADRATIC, DIMINISHING, USAM, RADIUS, PROPERTIES, RATES, NOISE, CHECKER, NETWORK)
}


def find(name: str, others: Sequence[str] = ()) -> Demonstration:
    """The demonstration with a given name.

    Args:
        name: a name from `DEMONSTRATIONS`.
        others: further words that the error message may suggest.

    Raises:
        ValueError: an unknown name.
    """
    if name not in DEMONSTRATIONS:
        names = ", ".join(DEMONSTRATIONS)
        raise ValueError(
            f"unknown demonstration {name!r}{suggest(name, [*DEMONSTRATIONS, *others])} (demonstrations: {names})."
        )
    return DEMONSTRATIONS[name]
