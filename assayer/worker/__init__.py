"""Workers: one process a GPU slot, each evaluation in a child of its own."""
