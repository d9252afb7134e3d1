"""Accounts of the bytes that were sent: the outcome of each answer."""
