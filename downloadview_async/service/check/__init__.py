"""`downloadview check`: compares a running installation with what its settings promise."""
