"""Glue to training frameworks, one module each, for what they offer no public means to do.

Nothing here is imported by the rest of flatmin, and each module needs its framework:
`pip install '.[lightning]'` or `pip install '.[hf]'` in a clone of flatmin.
"""
