"""Training: what a run freezes and optimizes, its jitted step, its loop, its log."""
