"""Publishing a model: its folder, its card, the Hub."""
