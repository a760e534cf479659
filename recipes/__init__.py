"""One file an experiment; its docstring is its contract."""
