"""A Django app with a model that has a file."""
