"""Behaviours that any sharpness-aware optimizer should have, tested on any implementation; see docs/conformance.md."""
