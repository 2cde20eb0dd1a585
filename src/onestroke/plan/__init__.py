"""What a run will need: memory by part, operations and time, told from configs before any weights are loaded."""
