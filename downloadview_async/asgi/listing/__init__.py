"""Folders as pages: which entries are on a page, and the page as HTML, as JSON and as a stream of lines."""
