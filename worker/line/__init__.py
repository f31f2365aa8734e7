"""What happens to an image: the stages, the threads and batches that run them, and the records of what became of it."""
