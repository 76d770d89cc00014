"""Tables of experiments: what is run, on which images, and what the numbers say."""
