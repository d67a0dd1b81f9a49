"""Studies of many runs: specification, execution, stored results and tables."""
