"""What `manage.py` knows because of this application."""
