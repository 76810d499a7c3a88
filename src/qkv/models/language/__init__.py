"""Language models. `masked_diffusion`: a small bidirectional masked-diffusion LM and its training on plain text."""
