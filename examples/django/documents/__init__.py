"""The application: documents that belong to somebody."""
