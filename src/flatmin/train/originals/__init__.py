"""The command lines of the original research projects, in words of `flatmin train`."""
