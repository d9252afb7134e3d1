"""Files of other HTTP servers."""
