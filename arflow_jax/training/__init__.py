"""Training any branch: state, step, optimiser, checkpoints, telemetry, loop."""
