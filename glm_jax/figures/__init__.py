"""What notebooks and reports draw, in one style."""
