"""Cards, and pushing of models and datasets to the Hub."""
