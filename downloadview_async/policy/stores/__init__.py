"""Keeps how often links were used, and which links and keys are revoked."""
