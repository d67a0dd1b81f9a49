"""What any sharpness-aware optimizer should do, run against any implementation; see docs/conformance.md."""
