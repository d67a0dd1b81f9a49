"""unifiedsam with lambda = 1, which is SAM, with the two calls of its documentation."""

from __future__ import annotations

from typing import Any

from unifiedsam import unifiedSAM

from conformance.adapter import Adapter, Base, Form, Subject
from conformance.adapters.single_file import TwoCallSubject


class ADAPTER(Adapter):
    """How it is built."""

    title = "unifiedsam"
    distribution = "unifiedsam"

    def build(
        self, params: Any, base: Base, *, rho: float, form: Form | None = None, model: Any = None, **options: Any
    ) -> Subject:
        """Build it from parameters and the base optimizer's class. It has no helper for BatchNorm."""
        self.claims(form, options)
        return TwoCallSubject(unifiedSAM(params, base.cls, rho=rho, lambd=1.0, **base.options), None)
