"""The papers' command lines, translated to settings of `flatmin train`."""
