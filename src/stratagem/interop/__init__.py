"""Official checkpoints in, one file per family; the only place that knows their conventions."""
