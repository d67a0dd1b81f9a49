"""The convergence theory of sharpness-aware training as code: rules, theorems, functions, and runs that test them.

    >>> from flatmin import theory
    >>> theory.check("diminish1", 0.1, theory.Square()).theorem
    'Theorem 3.2 (SAM, convex)'
    >>> trace = theory.run(theory.Square(), "sam", steps=0.1, radius=0.1, updates=300)
    >>> round(float(trace.distance[-1]), 10)
    0.0111111111

Source of the statements: Khanh, Luong, Mordukhovich & Tran, Fundamental Convergence Analysis of Sharpness-Aware
Minimization, NeurIPS 2024.
"""

from flatmin.theory.bounds import Bound, gradient_bound, sam_floor
from flatmin.theory.checker import check
from flatmin.theory.classes import FunctionClass
from flatmin.theory.closed import factor, largest_step, limit_distance, orbit_square
from flatmin.theory.families import Family, family
from flatmin.theory.functions import Function, LeastSquares, Quadratic, Square, random_system
from flatmin.theory.landscapes import LogSum, MexicanHat, Quartic, Rosenbrock, Wave
from flatmin.theory.logistic import Logistic, breast_cancer, digits_pair
from flatmin.theory.methods import Trace, run
from flatmin.theory.named import FUNCTIONS, read_function
from flatmin.theory.parse import FORMS, read_radius, read_rule
from flatmin.theory.rules import Asymptotics, ConstantRule, Custom, PowerRule, Product, Rule, Tied
from flatmin.theory.schedules import Cosine, Diminish
from flatmin.theory.verdict import PROPERTIES, Condition, Property, Theorem, Verdict

__all__ = [
    "FORMS",
    "FUNCTIONS",
    "PROPERTIES",
    "Asymptotics",
    "Bound",
    "Condition",
    "ConstantRule",
    "Cosine",
    "Custom",
    "Diminish",
    "Family",
    "Function",
    "FunctionClass",
    "LeastSquares",
    "LogSum",
    "Logistic",
    "MexicanHat",
    "PowerRule",
    "Product",
    "Property",
    "Quadratic",
    "Quartic",
    "Rosenbrock",
    "Rule",
    "Square",
    "Theorem",
    "Tied",
    "Trace",
    "Verdict",
    "Wave",
    "breast_cancer",
    "check",
    "digits_pair",
    "factor",
    "family",
    "gradient_bound",
    "largest_step",
    "limit_distance",
    "orbit_square",
    "random_system",
    "read_function",
    "read_radius",
    "read_rule",
    "run",
    "sam_floor",
]
