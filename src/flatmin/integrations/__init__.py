"""Integrations with training frameworks, one module each, for what their public hooks do not allow.

The rest of flatmin does not import these modules. Each module needs its framework: `pip install '.[lightning]'` or
`pip install '.[hf]'` in a clone of flatmin.
"""
