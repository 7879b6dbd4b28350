"""Training on one machine: losses, schedules, local steps, evaluation, checkpoints."""
