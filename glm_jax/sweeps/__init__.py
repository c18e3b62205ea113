"""Training many models together: members, groups, verdicts and results."""
