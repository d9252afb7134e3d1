"""Commands that this application adds to `manage.py`."""
