"""Training of masked diffusion language models in the shape of TRL."""
