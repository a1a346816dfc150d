"""Image sources, class-grouped sequences and the input pipeline. No JAX."""
