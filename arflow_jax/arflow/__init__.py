"""The trajectory-sequence branch: ARFlow (arXiv 2501.16085)."""
