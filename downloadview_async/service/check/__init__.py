"""`downloadview check`: compares a running installation with its settings."""
