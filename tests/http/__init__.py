"""What HTTP says about a download, as tables: values in, values out."""
