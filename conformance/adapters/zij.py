"""zij's SAM, a port of the common single file."""

from __future__ import annotations

from typing import Any

import zij

from conformance.adapter import Adapter, Base, Form, Subject
from conformance.adapters.single_file import TwoCallSubject


class ADAPTER(Adapter):
    """How it is built."""

    title = "zij"
    distribution = "zij"
    forms = frozenset({"sam", "asam"})

    def build(
        self, params: Any, base: Base, *, rho: float, form: Form | None = None, model: Any = None, **options: Any
    ) -> Subject:
        """Build it from parameters and the base optimizer's class. It has no helper for BatchNorm."""
        self.claims(form, options)
        return TwoCallSubject(zij.SAM(params, base.cls, rho=rho, adaptive=form == "asam", **base.options), None)
