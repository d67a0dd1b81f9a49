"""Classes of functions, defined by the hypotheses of the theorems."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from flatmin.words import suggest

WORDS: dict[str, tuple[dict[str, Any], str]] = {
    "convex": ({"convex": True}, "f is convex"),
    "unique": ({"minimisers": "unique"}, "there is one minimiser"),
    "bounded": ({"minimisers": "bounded"}, "the set of minimisers is bounded and not empty"),
    "unbounded": ({"minimisers": "unbounded"}, "the set of minimisers is unbounded"),
    "none": ({"minimisers": "none"}, "there is no minimiser"),
    "coercive": ({"bounded_levels": True}, "the sets {f <= a} are bounded"),
    "falling": ({"bounded_below": False}, "f is not bounded below"),
    "analytic": ({"has_kl": True}, "f has the KL property with some exponent, as real-analytic functions do"),
}
"""The words that describe a class, with their fields and meanings; L=... and kl=... are further words."""
Minimisers = Literal["unique", "bounded", "unbounded", "none", "unknown"]


@dataclass(frozen=True, kw_only=True)
class FunctionClass:
    """A class of functions, described by what its members are known to satisfy.

    Args:
        L: Lipschitz constant of the gradient; None if it exists but is not known. Default: None.
        convex: whether f is convex. Default: False.
        minimisers: the set of minimisers: "unique" (one point), "bounded" (and nonempty), "unbounded", "none", or
            "unknown". Default: "unknown".
        bounded_below: whether inf f > -inf. Default: True.
        bounded_levels: whether {f <= a} is bounded for every a, so that iterates with bounded f accumulate. Default:
            False.
        kl: exponent q in (0, 1) of the Kurdyka-Lojasiewicz property with phi(s) = M s^q, that is
            ||grad f|| >= (f - f(x))^(1-q) / (M q) near every stationary x: 1/2 where the Hessian is nondegenerate, 1/4
            for x^4. Default: None, not known.
        has_kl: whether the property holds with some exponent, as for every real-analytic f (Lojasiewicz 1963).
            Default: False, or True if `kl` is given.
        spectrum: eigenvalues of the Hessian if f is a single quadratic. Default: empty.
        where: the region where L holds. Default: "everywhere".

    Raises:
        ValueError: L is not positive and finite, kl is outside (0, 1), the largest modulus of the spectrum is not L, or
            the statements contradict each other: f has minimisers or is coercive but is not bounded below, or f is
            coercive but has no minimiser or an unbounded set of minimisers.
    """

    L: float | None = None
    convex: bool = False
    minimisers: Minimisers = "unknown"
    bounded_below: bool = True
    bounded_levels: bool = False
    kl: float | None = None
    has_kl: bool = False
    spectrum: tuple[float, ...] = ()
    where: str = "everywhere"

    def __post_init__(self) -> None:
        if self.L is not None and not 0 < self.L < math.inf:
            raise ValueError(f"L must be positive and finite, or None if it is not known, got {self.L!r}.")
        if self.kl is not None and not 0 < self.kl < 1:
            raise ValueError(f"the KL exponent q must be within (0, 1), got {self.kl!r}.")
        if self.minimisers not in ("unique", "bounded", "unbounded", "none", "unknown"):
            raise ValueError(
                f"minimisers must be unique, bounded, unbounded, none or unknown, got {self.minimisers!r}."
            )
        if self.spectrum and (self.L is None or not math.isclose(max(map(abs, self.spectrum)), self.L)):
            raise ValueError(f"the largest modulus of the spectrum must be L = {self.L!r}, got {self.spectrum!r}.")
        if not self.bounded_below and (self.minimisers in ("unique", "bounded", "unbounded") or self.bounded_levels):
            minimum = "has bounded sets {f <= a}" if self.bounded_levels else f"has minimisers ({self.minimisers})"
            raise ValueError(f"contradictory class: f {minimum} but is not bounded below.")
        if self.bounded_levels and self.minimisers in ("none", "unbounded"):
            raise ValueError(f"contradictory class: f has bounded sets {{f <= a}} but minimisers {self.minimisers}.")
        if self.kl is not None:
            object.__setattr__(self, "has_kl", True)

    @property
    def accumulates(self) -> bool:
        """Whether iterates with bounded f have an accumulation point."""
        return self.bounded_levels or (self.convex and self.minimisers in ("unique", "bounded"))

    @classmethod
    def read(cls, words: str) -> FunctionClass:
        """Read a class from text, as on the command line.

            >>> FunctionClass.read("convex, L=4, unique")
            FunctionClass(L=4.0, convex=True, minimisers='unique', ...)

        Args:
            words: words separated by commas: "convex"; "unique", "bounded", "unbounded" or "none" (minimisers);
                "coercive" (bounded level sets); "falling" (not bounded below); "analytic" (KL with an unknown
                exponent); "L=4"; "kl=0.5".

        Raises:
            ValueError: an unknown word, an invalid number, or words that contradict each other.
        """
        given: dict[str, Any] = {}
        said: dict[str, str] = {}
        for word in filter(None, (w.strip() for w in words.split(","))):
            key, _, text = word.partition("=")
            about = next(iter(WORDS[word][0])) if word in WORDS else key.strip()
            if said.setdefault(about, word) != word:
                raise ValueError(f"{said[about]!r} and {word!r} contradict each other.")
            if word in WORDS:
                given |= WORDS[word][0]
            elif key.strip() in ("L", "kl") and text:
                try:
                    given[key.strip()] = float(text)
                except ValueError:
                    raise ValueError(f"{key.strip()} must be a number, got {text!r}.") from None
            else:
                allowed = [*WORDS, "L=4", "kl=0.5"]
                raise ValueError(f"unknown word {word!r}{suggest(word, allowed)} (words: {', '.join(allowed)}).")
        return cls(**given)

    def __str__(self) -> str:
        words = ["quadratic"] if self.spectrum else []
        words.append("convex" if self.convex else "not known to be convex")
        words.append("L not known" if self.L is None else f"L = {self.L:g}")
        words.append(f"minimisers {self.minimisers}")
        words.append(f"KL q = {self.kl:g}" if self.kl else "KL, exponent not known" if self.has_kl else "KL not known")
        return ", ".join(words)
