"""What a program costs: FLOPs and measured speed."""
