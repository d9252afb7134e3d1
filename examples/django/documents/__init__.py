"""The application `documents`: each document belongs to a user."""
