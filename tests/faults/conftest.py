"""Servers that other tests use, too."""

from tests.accounts.test_completions import postgres as postgres
