"""Offloads: from the location of a file to the headers that make a reverse proxy or a store send it."""
