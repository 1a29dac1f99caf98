"""Text becomes a corpus, the corpus becomes a function from a number to a micro-batch."""
