"""The training loop and what it needs: checkpoints, averages, schedules, tracking."""
