"""The pipeline: schedules, stages, and the loop that runs them."""
