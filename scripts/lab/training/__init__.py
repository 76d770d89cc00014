"""Training and evaluating a model: options, data, loading, the folder of a run."""
