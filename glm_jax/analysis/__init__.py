"""What is looked at after a run: its report, and figures."""
