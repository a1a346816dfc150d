"""FlowAR (arXiv 2412.15205): next-scale prediction with a flow head."""
