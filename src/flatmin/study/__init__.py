"""Studies of many runs: specification, execution, stored results, tables and pages."""
