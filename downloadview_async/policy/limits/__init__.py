"""How much each client may have: requests, transfers at once, bytes per second, and quotas."""
