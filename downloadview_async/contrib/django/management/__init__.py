"""The commands of `manage.py`, for a project with this package in INSTALLED_APPS."""
