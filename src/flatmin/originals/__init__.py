"""Command lines of research repositories, translated to settings of `flatmin train`."""
