"""What was sent: the outcome of each answer."""
