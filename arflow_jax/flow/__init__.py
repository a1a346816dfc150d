"""Flow matching: paths, objectives, solvers, guidance. Knows no model."""
