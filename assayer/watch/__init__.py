"""Watching: one tick lists, tells what is new and whole, and queues it."""
