"""Images as latents of an autoencoder."""
