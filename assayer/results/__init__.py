"""What the records say, shown and published: ``python -m assayer.results``."""
